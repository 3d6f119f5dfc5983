"""A folder that appears whole or not at all: written beside its place, and moved there at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calumma.model.convert.names import ConversionError


@contextmanager
def atomic_folder(destination: str | Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `destination` when the block ends well and is removed when it does not.

    Raises ConversionError when there is something at `destination` already; an empty folder is fine.
    """
    destination = Path(destination)
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise ConversionError(f"{destination} exists already; remove it, or choose another place to write to")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, destination)  # noqa: PTH105 (Path.replace says nothing of empty folders, os.replace does)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    """The mode bits this process masks; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
