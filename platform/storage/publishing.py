"""How a directory of shards is published: their names, the manifest that replaces the earlier one, what is deleted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from calumma.platform import storage
from calumma.platform.specification import JobSpecification
from calumma.platform.storage.manifest import Manifest

SHARD_NAME = re.compile(r"[a-z]+-[0-9a-f]{8}-\d{5,}-\d{5,}\.parquet")


# What a killed storage.write_bytes leaves of a local shard or manifest.
UNFINISHED = re.compile(rf"\.({SHARD_NAME.pattern}|manifest\.json)\.[0-9a-f]+\.tmp")
_THREADS = 16


def fingerprint(specification: JobSpecification, inputs: Mapping[str, Any]) -> str:
    """Eight characters for the names of shards: what is made differently never overwrites what is published."""
    values = specification.model_dump(mode="json", exclude={"tracking", "resources", "run_name"})
    return hashlib.sha256(json.dumps([values, inputs], sort_keys=True).encode()).hexdigest()[:8]


def shard_prefix(kind: str, fingerprint: str, task: int) -> str:
    """How the names of a task's shards begin; `fingerprint` as of the function of that name."""
    return f"{kind}-{fingerprint}-{task:05d}"


def shard_name(prefix: str, number: int) -> str:
    """The name of a task's n-th shard."""
    return f"{prefix}-{number:05d}.parquet"


def combined_manifest(kind: str, specification: JobSpecification, parts: Mapping[str, Manifest]) -> Manifest:
    """One manifest over published subdirectories (name -> manifest): they can be read as one directory, too."""
    files = [
        entry.model_copy(update={"path": f"{name}/{entry.path}"}) for name, m in parts.items() for entry in m.files
    ]
    return Manifest(
        kind=kind,
        files=files,
        specification=specification.model_dump(mode="json"),
        report={"sources": {name: manifest.report for name, manifest in parts.items()}},
        inputs={uri: fingerprint for manifest in parts.values() for uri, fingerprint in manifest.inputs.items()},
    )


def publish(uri_dir: str, manifest: Manifest) -> None:
    """Write the manifest, which replaces any earlier one at once, then delete shards that no longer belong: those of
    an earlier specification and of killed attempts. Files that we did not name are left alone. Raises StorageError."""
    manifest.write(uri_dir)
    delete_stale_shards(uri_dir, (entry.path for entry in manifest.files))


def delete_stale_shards(uri_dir: str, keep: Iterable[str]) -> None:
    """Delete shards of ours that are not among `keep`, and what killed attempts left. Raises StorageError."""
    kept = set(keep)
    names = {storage.relative(uri, uri_dir): uri for uri in storage.list_files(uri_dir)}
    delete_files(uri for name, uri in names.items() if name not in kept and SHARD_NAME.fullmatch(name))
    delete_unfinished_files(uri_dir)


def delete_unfinished_files(uri_dir: str) -> None:
    """Delete what killed writers left unfinished in a local folder; S3 has no such thing."""
    if not storage.is_remote(uri_dir):
        for file in storage.local_path(uri_dir).glob(".*.tmp"):
            if UNFINISHED.fullmatch(file.name):
                file.unlink(missing_ok=True)


def delete_files(uris: Iterable[str]) -> None:
    """Delete files of unpublished attempts. Raises StorageError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(storage.delete, uris):
            pass
