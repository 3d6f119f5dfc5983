"""Copies of shards on a local disk, up to a size, shared by all processes of a machine.

A copy appears whole or not at all, and is downloaded by one process while others wait for it. The copies that were not
read for longest make room. Whoever reads one checks its content, and discards it when it is damaged.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calumma.platform import storage

_ABANDONED_SECONDS = 3600  # seconds without a change after which an unfinished copy is nobody's


class ShardCache:
    """At most `limit` bytes of shards below a local folder."""

    def __init__(self, directory: str | Path, limit: int) -> None:
        self.directory = Path(directory).expanduser()
        self.limit = limit

    def copy_of(self, uri: str, size: int, version: bytes = b"") -> Path | None:
        """The local copy of a shard of `size` bytes, made now if there is none; None for a shard beyond the limit.

        `version` tells a shard from another that was at the same URI. Raises StorageError. Another process may delete
        the copy again before it is read.
        """
        if size > self.limit:
            return None
        name = hashlib.sha256(b"\n".join([uri.encode(), str(size).encode(), version])).hexdigest()[:32]
        path = self.directory / f"{name}.shard"
        if _touch(path):
            return path
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory / f"{name[:2]}.lock"):  # few files, and downloads seldom wait for one of another
            if not _touch(path):
                self._download(uri, size, path)
        return path

    def discard(self, path: Path) -> None:
        """Delete a damaged copy."""
        path.unlink(missing_ok=True)

    def _download(self, uri: str, size: int, path: Path) -> None:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with _locked(self.directory / "all.lock"):
                self._make_room(size)
                with temporary.open("xb") as file:
                    file.truncate(size)  # takes its room before it has its content
            with temporary.open("r+b") as file:
                storage.copy_to(uri, file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        copies = []
        for entry in os.scandir(self.directory):
            if entry.name.endswith((".shard", ".tmp")):
                with suppress(FileNotFoundError):
                    copies.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
        total = sum(length for _, length, _ in copies)
        for used, length, path in sorted(copies):
            finished = path.suffix == ".shard"
            if (total + size > self.limit and finished) or (not finished and time.time() - used > _ABANDONED_SECONDS):
                path.unlink(missing_ok=True)
                total -= length


def _touch(path: Path) -> bool:
    """Whether the copy is there; if so it was used just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of this opening, so that it holds back threads, too
        yield
