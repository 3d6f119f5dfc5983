"""Receipts: what the finished tasks of an unfinished directory have made, so that a killed job goes on from there.

A task writes its receipt after the shards that the receipt names. One counts while those are in storage at their size
and its name carries the fingerprint (publishing.py) of what is asked for now: equal specification, equal inputs.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from calumma.platform import storage
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry, Manifest

FOLDER = ".receipts"  # below the job's output, a folder in it for each directory
_THREADS = 16
_SUFFIX = ".json"


class Receipt(BaseModel):
    """What one task has made: shards, and numbers to add up."""

    model_config = ConfigDict(extra="forbid")

    files: list[FileEntry]
    counts: Counter[str]
    dropped: Counter[str]


def receipt_uri(folder: str, shard_prefix: str) -> str:
    """Where the receipt of the task with this prefix of shard names is."""
    return storage.join(folder, shard_prefix + _SUFFIX)


def finished_receipts(output: str, folder: str, shard_prefixes: set[str]) -> dict[str, Receipt]:
    """The receipts of the tasks that need not be done again, by prefix of shard names.

    Deletes everything else that earlier attempts left, receipts and shards, but nothing that a manifest in `output`
    names. Raises StorageError, ManifestError.
    """
    sizes = {storage.relative(file, output): size for file, size in storage.sizes(output).items()}
    files = {storage.relative(file, folder): file for file in storage.list_files(folder)}
    own = {
        name.removesuffix(_SUFFIX): file for name, file in files.items() if name.removesuffix(_SUFFIX) in shard_prefixes
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        receipts = dict(zip(own, pool.map(_read, own.values()), strict=True))
    complete = {
        shard_prefix: receipt
        for shard_prefix, receipt in receipts.items()
        if receipt and all(sizes.get(entry.path) == entry.bytes for entry in receipt.files)
    }
    publishing.delete_files(file for name, file in files.items() if name.removesuffix(_SUFFIX) not in complete)
    published = Manifest.find(output)
    keep = [entry.path for receipt in complete.values() for entry in receipt.files]
    publishing.delete_stale_shards(
        output, [*keep, *(entry.path for entry in published.files if published)] if published else keep
    )
    return complete


def delete_receipts(folder: str) -> None:
    """Delete the receipts of a directory that is published. Raises StorageError."""
    storage.delete(folder)
    if not storage.is_remote(folder):
        with suppress(OSError):  # other directories have receipts in it, or it is gone
            storage.local_path(folder).parent.rmdir()


def _read(file: str) -> Receipt | None:
    try:
        return Receipt.model_validate_json(storage.read_bytes(file))
    except ValidationError:  # of another version
        return None
