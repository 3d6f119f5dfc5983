"""The file of API keys: read again when it has changed, so that keys are added and revoked while the server runs."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from calumma.serve.http.access.api_keys import FORM, distinct, hash_key, new_key, parse_keys
from calumma.serve.settings import APIKey

log = logging.getLogger(__name__)

HEAD = f"# Who may use the server, by the hash of their key: {FORM}\n"
# A change within the same tick of the file system's clock as the last look could go unseen (git calls it racy).
SETTLED_NS = 2 * 10**9


class KeyFile:
    """The keys of a file as it is now. While it cannot be read, or holds what is no key, those that it had before go
    on, and the log says so once. A file without any key, but with a comment, lets nobody in; an empty one is a file
    that somebody is writing."""

    def __init__(self, path: Path, others: tuple[APIKey, ...] = ()) -> None:
        """others: keys besides, whose names are taken. Raises ValueError, OSError on a file that is not fit now."""
        self._path, self._others = path, others
        self._seen: tuple[int, ...] | None = None
        self._text = path.read_text()
        self._keys = self._parse(self._text)

    def keys(self) -> Mapping[str, APIKey]:
        """By their hash. A look at a file that has not changed takes microseconds."""
        try:
            state = self._path.stat()
            now = (state.st_mtime_ns, state.st_ino, state.st_dev, state.st_size)
            if now != self._seen:
                self._read(self._path.read_text())
                self._seen = now if time.time_ns() - state.st_mtime_ns > SETTLED_NS else None
        except (OSError, ValueError) as error:  # bytes that are no text among them
            self._read(f"{type(error).__name__}: {error}", bad=True)
        return self._keys

    def _read(self, text: str, bad: bool = False) -> None:
        if text == self._text:
            return
        self._text = text
        try:
            if bad:
                raise ValueError(text)
            found = self._parse(text)
        except ValueError as error:
            log.error("the API keys stay as they were before %s changed: %s", self._path, error)
            return
        log.warning("API keys of %s: %s", self._path, _difference(self._keys, found))
        self._keys = found

    def _parse(self, text: str) -> dict[str, APIKey]:
        if not text.strip():
            raise ValueError(f"{self._path} is empty; a comment (#) says that nobody is meant to be let in")
        found = parse_keys(text.splitlines(), str(self._path))
        distinct([*self._others, *found])
        return {key.sha256: key for key in found}


def add_key(path: Path, name: str, running: int | None = None, priority: int = 0) -> str:
    """A new key, whose hash is put into a file; that is made where it is missing. Raises ValueError, OSError."""
    secret = new_key()
    line = f"{hash_key(secret)} {name}" + (f" {running}" if running else "")
    line += f" priority={priority}" if priority else ""

    def add(lines: list[str]) -> list[str]:
        distinct([*parse_keys(lines, str(path)), *parse_keys([line], "the new key")])
        return [*(lines or [HEAD.strip()]), line]

    _edit(path, add)
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of a file. Raises ValueError where there is none of that name, OSError."""

    def revoke(lines: list[str]) -> list[str]:
        known = {key.name for key in parse_keys(lines, str(path))}
        if name not in known:
            raise ValueError(f"{path} has no key of the name {name!r}; it has {', '.join(sorted(known)) or 'none'}")
        note = f"# revoked: {name}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
        return [note if name in {key.name for key in parse_keys([line], str(path))} else line for line in lines]

    _edit(path, revoke)


def _edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Change a file's lines. Readers see the old or the new whole; who edits at the same time waits."""
    path = path.resolve()
    with _locked(path.parent):
        there = path.exists()
        lines = change(path.read_text().splitlines() if there else [])
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # for its owner alone
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if there:
                partial.chmod(path.stat().st_mode & 0o7777)
            partial.replace(path)
        except BaseException:
            partial.unlink()
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _difference(old: Mapping[str, APIKey], new: Mapping[str, APIKey]) -> str:
    added = [new[sha256].name for sha256 in new.keys() - old.keys()]
    revoked = [old[sha256].name for sha256 in old.keys() - new.keys()]
    told = [f"{what} {', '.join(sorted(names))}" for what, names in (("added", added), ("revoked", revoked)) if names]
    return "; ".join(told) or "none added, none revoked"
