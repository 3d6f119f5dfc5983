"""Token shards as files: Parquet (zstd), a row group for every micro-batch, with a checksum for each.

A reader fetches a single row group by its byte range and checks just that. The ranges and digests are in the footer,
under `calumma.row_groups`, as JSON `[[offset, length, digest], ...]`: from the first column chunk's start to the last
one's end, digest the first 32 characters of the SHA-256 in hex. The footer's own checksum is in the manifest.
A loss mask is null where every token but padding (segment -1, which readers never train) is trained.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calumma.platform.storage.manifest import FooterDigest

ROW_GROUPS_KEY = b"calumma.row_groups"  # key in the Parquet footer
DIGEST_LENGTH = 32  # characters of a row group's digest
_TAIL = 8  # bytes of a Parquet file after its Thrift metadata: their length, and the magic


@dataclass(frozen=True)
class PackedRow:
    """One row of a token shard. `loss_mask` None means that every token but padding is trained."""

    tokens: NDArray[np.int32]  # [length]
    loss_mask: NDArray[np.bool_] | None  # [length]
    segments: NDArray[np.int32]  # [length], document number within the row, -1 for padding

    @property
    def padding(self) -> int:
        return int(np.count_nonzero(self.segments == PADDING_SEGMENT))

    @property
    def trained(self) -> int:
        return len(self.tokens) - self.padding if self.loss_mask is None else int(np.count_nonzero(self.loss_mask))


def schema() -> Any:
    """The Arrow schema of a token shard: lists of context + 1."""
    import pyarrow as pa

    ints, bools = pa.list_(pa.int32()), pa.list_(pa.bool_())
    return pa.schema([("tokens", ints), ("loss_mask", bools), ("segments", ints)])


def to_parquet(rows: Sequence[PackedRow], micro_batch: int) -> bytes:
    """A token shard's bytes: a row group for every `micro_batch` rows, the last may be smaller."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    groups: list[tuple[int, int, str]] = []
    with pq.ParquetWriter(buffer, schema(), compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        table = _table(rows)
        for first in range(0, len(rows), micro_batch):
            begin = buffer.tell()
            writer.write_table(table.slice(first, micro_batch), row_group_size=micro_batch)
            with buffer.getbuffer() as written:
                groups.append((begin, len(written) - begin, row_group_digest(written[begin:])))
        writer.add_key_value_metadata({ROW_GROUPS_KEY.decode(): json.dumps(groups, separators=(",", ":"))})
    return buffer.getvalue()


def row_group_digest(data: bytes | memoryview) -> str:
    """The checksum of a row group's bytes."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]


def footer_digest(data: bytes) -> FooterDigest:
    """What a manifest says about the end of a Parquet file."""
    size = int.from_bytes(data[-_TAIL:][:4], "little") + _TAIL
    return FooterDigest(bytes=size, sha256=hashlib.sha256(data[-size:]).hexdigest())


def _table(rows: Sequence[PackedRow]) -> Any:
    import pyarrow as pa

    def lists(arrays: list[NDArray[Any]], missing: Any = None) -> Any:
        ends = pa.array(np.cumsum([0, *map(len, arrays)]), pa.int32())
        return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(arrays)), mask=missing)

    none = np.zeros(0, np.bool_)
    masks = [none if row.loss_mask is None else row.loss_mask for row in rows]
    columns = [
        lists([row.tokens for row in rows]),
        lists(masks, pa.array([row.loss_mask is None for row in rows])),
        lists([row.segments for row in rows]),
    ]
    return pa.Table.from_arrays(columns, schema=schema())


PADDING_SEGMENT = -1
