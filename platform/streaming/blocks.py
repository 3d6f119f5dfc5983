"""What reading tasks do: steps become blocks of one worker's sequences, each read while the one before is taken.

A block is a table of one row, which `tensors.py` turns into tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from calumma.platform import storage
from calumma.platform.shards.row_groups import RowGroup, RowGroupReader, ShardError
from calumma.platform.streaming.plan import Piece, Plan, Share

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = (
    16 << 20
)  # bytes that travel together: the object store has a price a block, and the first step waits for one
_THREADS = 8  # row groups a task reads at once: object storage answers slowly, but many at a time
_LOCAL_THREADS = 3  # of a local disk: reading is decoding, and more would only be in each other's way
_TOKEN_BYTES = 7  # bytes of a token in a block: the token, its mask, and the number of its document
_ASSUMED_CONTEXT = 4096  # tokens a row is taken to have where no manifest says
_PLANNED = 1024  # micro-batches whose steps are looked up together


def step_bytes(plan: Plan, world: int) -> int:
    """Bytes of a block that holds a worker's part of one step."""
    return max(1, plan.division.most(world)) * _TOKEN_BYTES * ((plan.context or _ASSUMED_CONTEXT) + 1)


def read_blocks(
    first: int, last: int, plan: Plan, reader: RowGroupReader, rank: int, world: int
) -> Iterator[pyarrow.Table]:
    """Steps first .. last - 1 as blocks of one worker's sequences, in order; the next is read while one is taken."""
    pool = ThreadPoolExecutor(_THREADS if any(map(storage.is_remote, plan.sources)) else _LOCAL_THREADS)
    try:
        pending: _PendingBlock | None = None
        for shares in _block_shares(first, last, plan, rank, world):
            pieces = [piece for share in shares for piece in share.pieces]
            values, memory = _allocate(pieces, plan.context)
            row_groups = [
                pool.submit(_read_piece, reader, piece, arrays) for piece, arrays in zip(pieces, memory, strict=True)
            ]
            if pending is not None:
                yield _finished_block(pending, plan, rank, world)
            pending = _PendingBlock(shares, row_groups, values)
        if pending is not None:
            yield _finished_block(pending, plan, rank, world)
    finally:
        pool.shutdown(cancel_futures=True)


class _TokenArrays(NamedTuple):
    """Of a block or a part of it: what is of each token, end to end."""

    tokens: np.ndarray  # int32
    mask: np.ndarray  # bool
    segments: np.ndarray  # int16, or int32 where a row may have so many documents

    @classmethod
    def empty(cls, length: int, context: int | None) -> _TokenArrays:
        # The number of a document within its row: there are no more of them than tokens.
        small = np.int16 if (context or 1 << 15) < 1 << 15 else np.int32
        return cls(np.empty(length, np.int32), np.empty(length, np.bool_), np.empty(length, small))

    def view(self, begin: int, end: int) -> _TokenArrays:
        return _TokenArrays(*(values[begin:end] for values in self))

    def fill(self, group: RowGroup) -> RowGroup:
        """The row group, kept here."""
        kept = [values.reshape(group.tokens.shape) for values in self]
        for values, found in zip(kept, (group.tokens, group.mask, group.segments), strict=True):
            np.copyto(values, found, casting="same_kind")
        return RowGroup(*kept)


class _PendingBlock(NamedTuple):
    """A block that is being read."""

    shares: list[Share]
    row_groups: list[Future[RowGroup | str]]
    values: _TokenArrays | None
    """Those of the row groups, where it is known beforehand how long they are."""


def _allocate(pieces: list[Piece], context: int | None) -> tuple[_TokenArrays | None, Sequence[_TokenArrays | None]]:
    """Memory for the values of a block, and in it the place of each piece; none if rows are of unknown length."""
    if context is None:
        return None, [None] * len(pieces)
    lengths = [(piece.end - piece.begin) * (context + 1) for piece in pieces]
    ends = list(accumulate(lengths, initial=0))
    values = _TokenArrays.empty(ends[-1], context)
    return values, [values.view(end - length, end) for end, length in zip(ends[1:], lengths, strict=True)]


def _block_shares(first: int, last: int, plan: Plan, rank: int, world: int) -> Iterator[list[Share]]:
    """What goes into one block each: first a step, so that training can begin, then twice as much up to the limit."""
    size, waiting = 1, list[Share]()
    most = max(1, BLOCK_BYTES // step_bytes(plan, world))
    ahead = max(1, _PLANNED // plan.micro_batches)
    for start in range(first, last, ahead):
        waiting += plan.shares(start, min(start + ahead, last), rank, world)
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
            size = min(2 * size, most)
    if waiting:
        yield waiting


def _read_piece(reader: RowGroupReader, piece: Piece, arrays: _TokenArrays | None) -> RowGroup | str:
    """Rows of a row group, or the error: handed on as data it reaches the worker that needs the row group, in its turn
    and in plain words, where an exception in a task would arrive as a page of Ray's frames.

    Copied to its place at once, where that is known: what was just decoded is still in the processor's cache."""
    try:
        group = reader.read(piece.micro_batch).rows(piece.begin, piece.end)
        return group if arrays is None else arrays.fill(group)
    except (ShardError, storage.StorageError) as error:
        return str(error)


def _finished_block(pending: _PendingBlock, plan: Plan, rank: int, world: int) -> pyarrow.Table:
    """One row: lists of the steps' properties, and their values end to end, up to an error if there is one. Of the step
    that has the error nothing is handed on."""
    import pyarrow as pa

    shares, groups, error = list[Share](), list[RowGroup](), ""
    futures = iter(pending.row_groups)
    for share in pending.shares:
        found = [next(futures).result() for _ in share.pieces]
        error = next((group for group in found if isinstance(group, str)), "")
        if error:
            break
        shares.append(share)
        groups += [group for group in found if isinstance(group, RowGroup)]
    ends = list(accumulate((group.tokens.size for group in groups), initial=0))
    length = next((group.tokens.shape[1] for group in groups), (plan.context or 0) + 1)
    if (values := pending.values) is None:
        if {group.tokens.shape[1] for group in groups} - {length}:
            error, shares, ends = error or "token shards hold sequences of different lengths", [], [0]
        values = _TokenArrays.empty(ends[-1], plan.context)
        for group, begin, end in zip(groups, ends, ends[1:], strict=False):
            values.view(begin, end).fill(group)

    def listed(joined: np.ndarray) -> pa.Array:
        return pa.LargeListArray.from_arrays(pa.array([0, ends[-1]], pa.int64()), pa.array(joined[: ends[-1]]))

    return pa.table(
        {
            "rank": [rank],
            "world": [world],
            "error": [error],
            "length": [length],
            "rows": [plan.division.rows],
            "steps": pa.array([[share.step for share in shares]], pa.list_(pa.int64())),
            "firsts": pa.array([[share.first for share in shares]], pa.list_(pa.int64())),
            "passes": pa.array([[share.passes for share in shares]], pa.list_(pa.list_(pa.int64()))),
            "tokens": listed(values.tokens),
            "mask": listed(values.mask.view(np.uint8)),
            "segments": listed(values.segments),
        }
    )
