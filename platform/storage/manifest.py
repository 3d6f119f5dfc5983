"""The manifest of a published directory: which files belong to it, what they hold, and which specification made them.

It is written after every file it names, so a directory with a manifest is whole, and one without does not exist yet."""

from __future__ import annotations

import builtins
import gc
import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calumma.platform import storage

MANIFEST = storage.MANIFEST


class ManifestError(ValueError):
    """A manifest that cannot be read, or files that are not what their manifest says."""


class FooterDigest(BaseModel):
    """The end of a Parquet file: the last `bytes` bytes, from where its Thrift metadata begin to the final magic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=12)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class FileEntry(BaseModel):
    """One file of a directory. Row groups are micro-batches: all but the last hold `sequences_per_row_group` rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, description="relative to the manifest")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(0, ge=0)
    row_groups: int = Field(0, ge=0)
    tokens: dict[str, int] = Field({"text": 0, "image": 0}, description="trained and untrained, without padding")
    sequences_per_row_group: int | None = Field(None, ge=1)
    footer: FooterDigest | None = Field(None, description="of a token shard whose row groups have checksums")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.path.startswith("/") or "://" in self.path or ".." in self.path.split("/"):
            raise ValueError(f"path {self.path!r} must be relative, below the manifest")
        if self.row_groups and not self.row_groups <= self.rows:
            raise ValueError(f"{self.path}: {self.row_groups} row groups cannot hold {self.rows} rows")
        size = self.sequences_per_row_group
        if size is not None and not (self.row_groups - 1) * size < self.rows <= self.row_groups * size:
            raise ValueError(f"{self.path}: {self.rows} rows are not {self.row_groups} row groups of {size}")
        return self

    @classmethod
    def from_bytes(cls, path: str, data: builtins.bytes, **fields: Any) -> Self:
        """The entry of a file with this content."""
        return cls(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **fields)

    def sequences(self, row_group: int) -> int:
        """Rows of one row group. Raises ManifestError when the entry does not say."""
        if not 0 <= row_group < self.row_groups:
            raise ManifestError(f"{self.path} has {self.row_groups} row groups, and no number {row_group}")
        size = self.sequences_per_row_group or -(-self.rows // self.row_groups)
        before = (self.row_groups - 1) * size
        if not before < self.rows:
            raise ManifestError(f"{self.path}: the manifest does not say how many sequences a row group holds")
        return size if row_group < self.row_groups - 1 else self.rows - before


class Manifest(BaseModel):
    """What a directory holds. `report` is what the job says about itself, `inputs` are what it was made from."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    files: list[FileEntry] = []
    specification: dict[str, Any] = {}
    report: dict[str, Any] = {}
    inputs: dict[str, str] = Field({}, description="location or models:/ URI -> its fingerprint when it was read")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        twice = [path for path, count in Counter(entry.path for entry in self.files).items() if count > 1]
        if twice:
            raise ValueError(f"files named twice: {', '.join(twice[:5])}")
        return self

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.files)

    @property
    def row_groups(self) -> int:
        return sum(entry.row_groups for entry in self.files)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of all files by modality."""
        total: Counter[str] = Counter({"text": 0, "image": 0})
        for entry in self.files:
            total.update(entry.tokens)
        return dict(total)

    def write(self, uri_dir: str) -> None:
        """Publish the directory: call it when every file is in storage. Raises StorageError."""
        storage.write_bytes(storage.join(uri_dir, MANIFEST), self.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def read(cls, uri_dir: str) -> Manifest:
        """The manifest of a directory. Raises StorageError (NotFound: not published) and ManifestError."""
        uri = storage.join(uri_dir, MANIFEST)
        data = storage.read_bytes(uri)
        try:
            with _without_garbage_collection():
                return cls.model_validate_json(data)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5])
            raise ManifestError(f"{uri} is not a manifest this version reads: {problems}") from error

    @classmethod
    def find(cls, uri_dir: str) -> Manifest | None:
        """The manifest of a directory, or None when nothing is published there. Raises as `read`."""
        try:
            return cls.read(uri_dir)
        except storage.NotFound:
            return None

    def verify(self, uri_dir: str, content: bool = False) -> None:
        """Check that every file is there at its size and, with `content`, its sha256. Raises ManifestError."""
        sizes = storage.sizes(uri_dir)
        present = {storage.relative(uri, uri_dir): size for uri, size in sizes.items()}
        for entry in self.files:
            if entry.path not in present:
                raise ManifestError(f"{uri_dir}: {entry.path} is in the manifest and not in storage")
            if present[entry.path] != entry.bytes:
                difference = f"{present[entry.path]} bytes, where the manifest says {entry.bytes}"
                raise ManifestError(f"{uri_dir}: {entry.path} has {difference}")
            if content and sha256(storage.join(uri_dir, entry.path)) != entry.sha256:
                raise ManifestError(f"{uri_dir}: the content of {entry.path} is not what the manifest says")


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """No garbage collection meanwhile: walking the new entries again and again takes longer than making them (of
    100,000 shards, 1.1 s of 1.6)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sha256(uri: str) -> str:
    """The checksum of a file in storage, read in pieces."""
    with storage.open_read(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_fingerprint(uri: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(storage.join(uri, MANIFEST))).hexdigest()
    except storage.NotFound:
        listing = [[_absolute(file), size, _modified(file)] for file, size in storage.list_inputs(uri).sizes.items()]
        return json_digest(listing) if listing else ""


def _absolute(file: str) -> str:
    """A file's name, the same from wherever a job is run."""
    return file if "://" in file else posixpath.normpath(storage.local_path(file).absolute())


def _modified(file: str) -> int | None:
    """When a local file was written, for repairs that leave its size; listings of S3 give sizes only."""
    return None if storage.is_remote(file) else storage.local_path(file).stat().st_mtime_ns


def json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_entries(uri_dir: str) -> list[FileEntry]:
    """Entries of all files below a directory but its own manifest, checksummed from storage."""
    sizes = storage.sizes(uri_dir)
    named = ((storage.relative(uri, uri_dir), uri) for uri in sorted(sizes))
    return [FileEntry(path=path, bytes=sizes[uri], sha256=sha256(uri)) for path, uri in named if path != MANIFEST]
