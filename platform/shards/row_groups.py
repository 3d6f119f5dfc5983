"""Single row groups of token shards, fetched by their byte range and checked before they are decoded.

The manifest has the digest of a shard's footer, and the footer those of its row groups (tokens.py). Footers are kept,
so that a row group costs one request. Shards written before there were digests are read unchecked. What has its
digest is what our writer wrote, and is decoded without pyarrow (parquet_pages.py) where the layout allows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from calumma.platform import storage
from calumma.platform.shards import parquet_pages
from calumma.platform.shards.cache import ShardCache
from calumma.platform.shards.partial import PartialFile, extent
from calumma.platform.shards.tokens import ROW_GROUPS_KEY, row_group_digest

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import FileMetaData, ParquetFile

    from calumma.platform.storage.manifest import Manifest


_COLUMNS = ["tokens", "loss_mask", "segments"]
_TAIL_BYTES = 64 << 10  # bytes read for a footer whose length the manifest does not tell
_FOOTER_CACHE_BYTES = 64 << 20  # bytes of footers kept by a process; parsed they take some times that


class MicroBatch(NamedTuple):
    """One row group of one token shard: `sequences` packed rows, the unit that is read, assigned and counted."""

    source: str
    shard: str
    row_group: int
    sequences: int
    shard_bytes: int
    footer_bytes: int = 0
    """Length of the shard's footer, which holds the checksums of its row groups; 0 when the manifest has none of it."""
    footer_sha256: bytes = b""


class ShardError(ValueError):
    """A shard is missing, damaged, or not what its manifest says; the message names it."""


def all_micro_batches(uri: str, manifest: Manifest) -> list[MicroBatch]:
    """Every row group of the token shards at `uri`, in the order of their manifest. Raises ManifestError where it does
    not say how many sequences one holds."""
    return [
        MicroBatch(
            uri,
            storage.join(uri, file.path),
            row_group,
            file.sequences(row_group),
            file.bytes,
            *((file.footer.bytes, bytes.fromhex(file.footer.sha256)) if file.footer else (0, bytes(32))),
        )
        for file in manifest.files
        for row_group in range(file.row_groups)
    ]


def context_of(manifest: Manifest) -> int | None:
    """Tokens that a sequence of these token shards predicts (rows hold one more), where their manifest says."""
    context = manifest.specification.get("context")
    return context if isinstance(context, int) else None


@dataclass(frozen=True)
class RowGroup:
    """Packed sequences, T = context."""

    tokens: np.ndarray  # int32 [B, T+1]
    mask: np.ndarray  # bool [B, T+1], true where the token is trained
    segments: np.ndarray  # int32 [B, T+1], -1 for padding

    def rows(self, begin: int, end: int) -> RowGroup:
        """Some of its sequences, in the same memory."""
        return RowGroup(self.tokens[begin:end], self.mask[begin:end], self.segments[begin:end])


@dataclass(frozen=True)
class RowGroupReader:
    """Reads the row groups of a plan. Threads may share it; it travels to other processes."""

    context: int | None = None
    """Tokens a sequence predicts, where the manifests say."""
    verify: bool = True
    """Compare what is read with its digest, where there is one."""
    cache: ShardCache | None = None

    def read(self, micro_batch: MicroBatch) -> RowGroup:
        """Raises ShardError, and StorageError when storage fails."""
        footer = self._footer(micro_batch)
        number = micro_batch.row_group
        if number >= footer.metadata.num_row_groups:
            actual = f"has {footer.metadata.num_row_groups} row groups"
            raise ShardError(f"{micro_batch.shard} {actual}, where its manifest names number {number}")
        offset, length, expected = footer.range_of(number)
        check = _digest_check(f"row group {number}", expected, row_group_digest) if self.verify and expected else None
        try:
            data = self._fetch(micro_batch, offset, length, check)
        except storage.Damaged as error:
            raise ShardError(f"{error}; write the shard again") from error
        decoded = footer.decode_own_layout(micro_batch, data, offset, self.context) if check else None
        return decoded or self._decoded(micro_batch, data, offset, footer)

    def _footer(self, micro_batch: MicroBatch) -> _ShardFooter:
        known = micro_batch.footer_bytes > 0
        key = (micro_batch.shard, micro_batch.shard_bytes, micro_batch.footer_sha256, self.verify)
        cache = _footer_cache()
        if (cached := cache.get(key)) is not None:
            return cached
        shard, end = micro_batch.shard, micro_batch.shard_bytes
        try:
            if known:
                check = _digest_check("the footer", micro_batch.footer_sha256.hex(), _sha256) if self.verify else None
                tail = self._fetch(micro_batch, end - micro_batch.footer_bytes, micro_batch.footer_bytes, check)
            else:
                _check_size(micro_batch)
                tail = self._unknown_footer(micro_batch)
            footer = _ShardFooter.parse(shard, tail)
        except storage.NotFound:
            raise
        except storage.StorageError as error:
            _check_size(micro_batch)
            if isinstance(error, storage.Damaged):
                raise ShardError(f"{error}; write the shard again") from error
            raise
        cache.put(key, footer, len(tail))
        return footer

    def _unknown_footer(self, micro_batch: MicroBatch) -> bytes:
        end = micro_batch.shard_bytes
        tail = self._fetch(micro_batch, end - min(_TAIL_BYTES, end), min(_TAIL_BYTES, end), None)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= end:
            tail = self._fetch(micro_batch, end - length, length, None)
        return tail

    def _fetch(self, micro_batch: MicroBatch, offset: int, length: int, check: storage.ContentCheck | None) -> bytes:
        """Part of the shard, by way of the cache if there is one; where that fails, from storage itself."""
        shard, size = micro_batch.shard, micro_batch.shard_bytes
        if self.cache is not None and storage.is_remote(shard):
            for _ in range(2):  # a copy may be damaged, or gone since it was looked up
                copy = self.cache.copy_of(shard, size, micro_batch.footer_sha256)
                if copy is None:
                    break
                try:
                    return storage.read_range(str(copy), offset, length, check)
                except storage.StorageError:
                    self.cache.discard(copy)
        return storage.read_range(shard, offset, length, check)

    def _decoded(self, micro_batch: MicroBatch, data: bytes, offset: int, footer: _ShardFooter) -> RowGroup:
        import pyarrow as pa

        where = f"{micro_batch.shard}: row group {micro_batch.row_group}"
        try:
            table = footer.decode(micro_batch, data, offset)
        except (pa.ArrowException, OSError, ValueError) as error:
            message = f"{where} cannot be read ({error})"
            raise ShardError(f"{message}; if that is no passing failure, write the shard again") from error
        if table.column_names != _COLUMNS:
            raise ShardError(f"{micro_batch.shard} has no columns {', '.join(_COLUMNS)}: it is not a token shard")
        rows, length = table.num_rows, self.context + 1 if self.context else None
        tokens, masks, segments = (_single_array(table[name]) for name in _COLUMNS)
        lengths = set(np.diff(tokens.offsets.to_numpy()).tolist())
        if rows != micro_batch.sequences or len(lengths) != 1 or (length and lengths != {length}):
            actual = f"{rows} sequences of {sorted(lengths)} tokens"
            expected = f"{micro_batch.sequences} of {length or 'one length'}"
            raise ShardError(f"{where} holds {actual}, where the manifest says {expected}")
        try:
            numbers = [column.flatten().to_numpy() for column in (tokens, segments)]
            return _row_group(numbers[0], masks, numbers[1], (rows, lengths.pop()))
        except ValueError as error:
            raise ShardError(f"{where}: its columns are of different lengths; write the shard again") from error


def _single_array(column: Any) -> Any:
    """A column's values as one array; `combine_chunks` would copy them even if they are that already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _row_group(tokens: np.ndarray, masks: Any, segments: np.ndarray, shape: tuple[int, int]) -> RowGroup:
    """From the columns' values, and the list column of masks, None where they are all null.

    Raises ValueError when they do not have this shape.
    """
    segments = segments.reshape(shape)
    mask = segments >= 0  # padding is never trained
    if masks is not None and masks.null_count < shape[0]:
        listed = masks.is_valid().to_numpy(zero_copy_only=False)
        mask[listed] &= masks.flatten().to_numpy(zero_copy_only=False).reshape(-1, shape[1])
    return RowGroup(tokens.reshape(shape), mask, segments)


@dataclass(frozen=True)
class _ShardFooter:
    metadata: FileMetaData
    ranges: list[tuple[int, int, str]] | None
    """Offset, length and digest of each row group, in shards that have them."""
    own_layout: bool = False
    """Whether the file may be laid out as `decode_own_layout` needs it."""
    idle_files: list[tuple[PartialFile, ParquetFile]] = field(default_factory=list)
    """Files that no thread reads now: opening one costs a third of decoding a row group of 32,000 tokens."""

    def decode_own_layout(
        self, micro_batch: MicroBatch, data: bytes, offset: int, context: int | None
    ) -> RowGroup | None:
        """A row group whose digest was compared, without pyarrow; None where its layout or shape is another."""
        import pyarrow as pa

        rows, content = micro_batch.sequences, memoryview(data)
        try:
            if not self.own_layout:
                return None
            columns = parquet_pages.column_chunks(self.metadata, micro_batch.row_group)
            parts = [content[begin - offset : end - offset] for begin, end, _ in columns]
            tokens, segments = (parquet_pages.decode_equal_lists(parts[n], columns[n].values, rows) for n in (0, 2))
            if tokens.shape != segments.shape or (context and tokens.shape[1] != context + 1):
                return None
            masks = None
            if columns[1].values != rows or not parquet_pages.all_null(bytes(parts[1]), rows):
                masks = _single_array(self.decode(micro_batch, data, offset, ["loss_mask"])["loss_mask"])
            return _row_group(tokens, masks, segments, (rows, tokens.shape[1]))
        except (pa.ArrowException, OSError, ValueError):  # pyarrow reads it, or says what is wrong
            return None

    def decode(
        self, micro_batch: MicroBatch, data: bytes, offset: int, columns: Sequence[str] = _COLUMNS
    ) -> pyarrow.Table:
        """A row group, from the shard's bytes from `offset` on. Raises what pyarrow does."""
        import pyarrow.parquet as pq

        try:
            part, file = self.idle_files.pop()
        except IndexError:
            part = PartialFile(micro_batch.shard_bytes)
            file = pq.ParquetFile(part, metadata=self.metadata)
        part.set_bytes(data, offset)
        try:
            return file.read_row_group(micro_batch.row_group, list(columns), use_threads=False)
        finally:
            part.set_bytes(b"", 0)
            self.idle_files.append((part, file))

    @classmethod
    def parse(cls, shard: str, tail: bytes) -> _ShardFooter:
        """From a shard's last bytes. Raises ShardError."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_metadata(pa.BufferReader(tail))
            ranges = (metadata.metadata or {}).get(ROW_GROUPS_KEY)
            return cls(metadata, json.loads(ranges) if ranges else None, parquet_pages.is_token_shard(metadata))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShardError(f"{shard}: its footer cannot be read ({error}); write the shard again") from error

    def range_of(self, number: int) -> tuple[int, int, str]:
        """Offset, length and digest ("" for none) of a row group."""
        if self.ranges is not None:
            offset, length, expected = self.ranges[number]
            return offset, length, expected
        begin, end = extent(self.metadata, number)
        return begin, end - begin, ""


class _FooterCache:
    """The footers used last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Any, tuple[_ShardFooter, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> _ShardFooter | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, footer: _ShardFooter, size: int) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = footer, size
                self._bytes += size
            while self._bytes > self._limit and len(self._kept) > 1:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._bytes -= dropped


@functools.cache
def _footer_cache() -> _FooterCache:
    """Of this process: reading tasks come and go, and read the same shards."""
    return _FooterCache(_FOOTER_CACHE_BYTES)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_check(what: str, expected: str, compute: Callable[[bytes], str]) -> storage.ContentCheck:
    def check(data: bytes) -> str | None:
        actual = compute(data)
        return (
            None if actual == expected else f"{what} has checksum {actual[:16]}…, where {expected[:16]}… is on record"
        )

    return check


def _check_size(micro_batch: MicroBatch) -> None:
    size = storage.size(micro_batch.shard)
    if size != micro_batch.shard_bytes:
        raise ShardError(f"{micro_batch.shard} has {size} bytes, where its manifest says {micro_batch.shard_bytes}")
