"""Room on a disk for checkpoints: looked for before a stage starts and before each is written."""

from __future__ import annotations

import shutil

from calumma.platform import storage

_MARGIN = 1.02  # of what is needed, for what file systems keep for themselves


def free_bytes(uri: str) -> int | None:
    """What can still be written below a local folder, which need not be there yet; None in object storage."""
    if storage.is_remote(uri):
        return None
    folder = storage.local_path(uri).resolve()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def lacking(uri: str, needed: int) -> str:
    """What is wrong with the room for `needed` bytes below a folder; empty when there is enough."""
    free = free_bytes(uri)
    if free is None or free >= needed * _MARGIN:
        return ""
    return f"there is no room for {needed / 1e9:,.3g} GB at {uri}: {free / 1e9:,.3g} GB are free"
