"""Local files: listed, read in ranges, and replaced whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from calumma.platform.storage.error_translation import translated_errors
from calumma.platform.storage.uri import BrokenRead, local_path


def local_sizes(path: Path) -> Iterator[tuple[str, int]]:
    if path.is_file():
        yield str(path), path.stat().st_size
        return
    for folder, _, names in os.walk(path):
        for name in names:
            if not (name.startswith(".") and name.endswith(".tmp")):  # see replace_file
                file = Path(folder, name)
                with suppress(FileNotFoundError):  # deleted since it was listed
                    yield str(file), file.stat().st_size


def local_range(uri: str, offset: int, length: int) -> bytes:
    with translated_errors(uri, "read"), local_path(uri).open("rb", buffering=0) as file:
        file.seek(offset)
        data = file.read(length)
        while len(data) < length and (more := file.read(length - len(data))):
            data += more
    if len(data) < length:
        raise BrokenRead(f"it ends {length - len(data):,} bytes before byte {offset + length:,}")
    return data


def replace_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a local file under a temporary name beside it, flush it to the disk, and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some network file systems cannot flush a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def create_file(path: Path, data: bytes) -> bool:
    """Write a local file where there is none; whether it was. It appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def local_age(path: Path) -> float:
    """Seconds since a file was written, by the clock of its file system, which may be a server's."""
    written = path.stat().st_mtime
    probe = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - written)
    finally:
        probe.unlink(missing_ok=True)
