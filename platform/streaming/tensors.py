"""From the plan to tensors: each training worker's dataset, read by Ray Data ahead of the training that consumes it.

`PlanDataConfig` builds the datasets whenever Ray Train (re)starts its group of workers, so a group of another size, or
one that resumes, simply gets other pieces of the same plan. `micro_batches` is the worker's end.
https://docs.ray.io/en/latest/train/user-guides/data-loading-preprocessing.html
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ray.train import DataConfig

from calumma.platform import storage
from calumma.platform.shards.cache import ShardCache
from calumma.platform.shards.row_groups import MicroBatch, RowGroup, RowGroupReader, ShardError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.streaming.plan import Plan

if TYPE_CHECKING:
    import pyarrow
    import torch
    from ray.data import DataIterator, Dataset

logger = logging.getLogger(__name__)
_BLOCK_BYTES = (
    16 << 20
)  # bytes that travel together: the object store has a price a block, and the first step waits for one
_BLOCKS_PER_TASK = 64  # blocks, about, that one reading task delivers one after the other
_MOST_TASKS = 1024  # at most, of a worker's dataset: laying them out takes the driver's time at each start
_THREADS = 8  # row groups a task reads at once: object storage answers slowly, but many at a time
_LOCAL_THREADS = 3  # of a local disk: reading is decoding, and more would only be in each other's way
_TOKEN_BYTES = 7  # bytes of a token in a block: the token, its mask, and the number of its document
_ASSUMED_CONTEXT = 4096  # tokens a row is taken to have where no manifest says


@dataclass(frozen=True)
class MicroBatchTensors:
    """Packed sequences of one row group, T = context. B is 0 for the empty micro-batch of a short worker."""

    tokens: torch.Tensor
    """LongTensor [B, T+1]: inputs are [:, :-1], targets [:, 1:]."""

    mask: torch.Tensor
    """BoolTensor [B, T+1], aligned with `tokens`: true where the token is a target that is trained."""

    segments: torch.Tensor
    """LongTensor [B, T+1]: number of the document within its row, -1 for padding."""

    source: str = ""
    """Which token shards it comes from."""


class PlanDataConfig(DataConfig):
    """Gives worker r of W its share of steps first_step .. last_step - 1 (as `range`, so last_step is not included).

    Pass it to the trainer as `dataset_config`, with `datasets=PlanDataConfig.datasets()`. `first_step` may be a
    function: it is asked each time the workers (re)start, so that they go on from the newest checkpoint.
    """

    def __init__(
        self,
        seed: int,
        mixture: Mapping[str, float],
        manifests: Mapping[str, Manifest],
        micro_batches: int,
        first_step: int | Callable[[], int],
        last_step: int,
        name: str = "train",
        verify: bool = True,
        cache: ShardCache | None = None,
    ) -> None:
        """Arguments of Plan, then the steps. Whether to check what is read, and where to keep copies of shards. Raises
        PlanError."""
        super().__init__(datasets_to_split="all")  # the workers wait for each other: one plan for all of them
        self.plan = Plan(seed, mixture, manifests, micro_batches)
        self.reader = RowGroupReader(self.plan.context, verify, cache)
        self.first_step = first_step
        self.last_step = last_step
        self.name = name
        for uri in self.plan.sources if verify else ():
            without = sum(1 for file in manifests[uri].files if file.row_groups and not file.footer)
            if without:
                logger.warning(
                    "%s: %s of its shards have no checksums of their row groups, so they are not verified; tokenize "
                    "the documents again to have them",
                    *(uri, without),
                )

    @staticmethod
    def datasets(name: str = "train") -> dict[str, Callable[[], Dataset]]:
        """What the trainer wants to be given: a stand-in that is never read, since the plan is the dataset."""
        return {name: _placeholder_dataset}

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """One iterator a worker, in the order of the ranks. Called by Ray Train."""
        first = self.first_step() if callable(self.first_step) else self.first_step
        return [{self.name: self._dataset(first, rank, world_size).iterator()} for rank in range(world_size)]

    def _dataset(self, first: int, rank: int, world: int) -> Dataset:
        import ray

        # Items are ranges of steps, and the tasks look up their micro-batches: to lay out every micro-batch of a long
        # run here would take minutes and gigabytes at each start.
        steps = self.last_step - first
        if steps < 1:
            raise ValueError(f"there is nothing to read: the first step is {first}, the end {self.last_step}")
        row_group = self.plan.most_sequences * _row_bytes(self.plan)
        length = max(
            1, _BLOCKS_PER_TASK * _BLOCK_BYTES // (row_group * self.plan.slots(world)), -(-steps // _MOST_TASKS)
        )
        starts = range(first, self.last_step, length)
        items = [{"first": start, "last": min(start + length, self.last_step)} for start in starts]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        context = dataset.context
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # Every block that a task yields goes its way at once, of whatever size: it is one row, and not cut further.
        context.target_max_block_size = 1
        return dataset.map_batches(
            partial(_read_blocks, plan=self.plan, reader=self.reader, rank=rank, world=world),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            # Reading waits for storage and needs next to no processor. Asking for none, it can never wait for a
            # cluster that is full of the very workers that wait for it.
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=1),
        )


def micro_batches(
    shard: DataIterator, rank: int, world: int, prefetch: int = 2
) -> Iterator[tuple[int, list[MicroBatchTensors]]]:
    """The steps of this worker in order, each with its micro-batches: the same number for every worker.

    `prefetch` blocks (of about 16 MB) are fetched ahead. The tensors are in pinned memory where there is CUDA. Raises
    ShardError, and RuntimeError when the data was laid out for another rank or number of workers.
    """
    _quiet_ray_data()
    step, group = -1, list[MicroBatchTensors]()
    blocks = shard.iter_batches(
        batch_size=None,  # type: ignore[arg-type]  # None is a whole block: documented, and not in the annotation
        batch_format="pyarrow",
        prefetch_batches=prefetch,
    )
    block: Any
    for block in blocks:
        for row in map(_BlockRow.from_table, range(block.num_rows), [block] * block.num_rows):
            if (row.rank, row.world) != (rank, world):
                actual = f"{row.rank} of {row.world}"
                raise RuntimeError(f"worker {rank} of {world} was given the data of worker {actual}")
            for number, tensors in row.tensors():
                if number != step and group:
                    yield step, group
                    group = []
                step = number
                group.append(tensors)
            if row.error:
                raise ShardError(row.error)
    if group:
        yield step, group


def _placeholder_dataset() -> Dataset:
    import ray

    return ray.data.range(1)


def _quiet_ray_data() -> None:
    """Keep Ray Data's running commentary out of this process's output; its log file still has it."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no progress bars


def _row_bytes(plan: Plan) -> int:
    return _TOKEN_BYTES * ((plan.context or _ASSUMED_CONTEXT) + 1)


def _read_blocks(
    items: pyarrow.Table, plan: Plan, reader: RowGroupReader, rank: int, world: int
) -> Iterator[pyarrow.Table]:
    """Ranges of steps -> blocks of their micro-batches, in order; the next block is read while one is taken."""
    pool = ThreadPoolExecutor(_THREADS if any(map(storage.is_remote, plan.sources)) else _LOCAL_THREADS)
    try:
        pending: _PendingBlock | None = None
        for share in _block_shares(items, plan, rank, world):
            values, memory = _allocate(share, plan.context)
            row_groups = [
                pool.submit(_read_row_group, reader, micro_batch, arrays)
                for (_, micro_batch), arrays in zip(share, memory, strict=True)
            ]
            if pending is not None:
                yield _finished_block(pending, plan, rank, world)
            pending = _PendingBlock(share, row_groups, values)
        if pending is not None:
            yield _finished_block(pending, plan, rank, world)
    finally:
        pool.shutdown(cancel_futures=True)


_Share = list[tuple[int, MicroBatch | None]]


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

    share: _Share
    row_groups: list[Future[RowGroup | str]]
    values: _TokenArrays | None
    """Those of the row groups, where it is known beforehand how long they are."""


def _allocate(share: _Share, context: int | None) -> tuple[_TokenArrays | None, Sequence[_TokenArrays | None]]:
    """Memory for the values of a block, and in it the place of each micro-batch; none if rows are of unknown length."""
    if context is None:
        return None, [None] * len(share)
    lengths = [micro_batch.sequences * (context + 1) if micro_batch else 0 for _, micro_batch in share]
    ends = list(accumulate(lengths))
    values = _TokenArrays.empty(ends[-1], context)
    return values, [values.view(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _block_shares(items: pyarrow.Table, plan: Plan, rank: int, world: int) -> Iterator[_Share]:
    """What goes into one block each: first a step, so that training can begin, then twice as much up to the limit."""
    size, waiting = plan.slots(world), _Share()
    most = max(1, _BLOCK_BYTES // (plan.most_sequences * _row_bytes(plan)))
    for item in items.to_pylist():
        planned = max(1, 1024 // plan.slots(world))
        for first in range(item["first"], item["last"], planned):
            waiting += plan.share(first, min(first + planned, item["last"]), rank, world)
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
                size = min(2 * size, most)
    if waiting:
        yield waiting


def _read_row_group(
    reader: RowGroupReader, micro_batch: MicroBatch | None, arrays: _TokenArrays | None
) -> RowGroup | str:
    """A row group, an empty one for None, or the error: handed on as data it reaches the worker that needs the row
    group, in its turn and in plain words, where an exception in a task would arrive as a page of Ray's frames.

    Copied to its place at once, where that is known: what was just decoded is still in the processor's cache."""
    if micro_batch is None:
        return RowGroup.empty(reader.context)
    try:
        group = reader.read(micro_batch)
        return group if arrays is None else arrays.fill(group)
    except (ShardError, storage.StorageError) as error:
        return str(error)


def _finished_block(pending: _PendingBlock, plan: Plan, rank: int, world: int) -> pyarrow.Table:
    """One row: lists of the micro-batches' properties, and their values end to end, up to an error if there is one."""
    import pyarrow as pa

    steps, sources, groups, error = list[int](), list[str](), list[RowGroup](), ""
    for (step, micro_batch), future in zip(pending.share, pending.row_groups, strict=True):
        row_group = future.result()
        if isinstance(row_group, str):
            error = row_group
            break
        steps.append(step)
        sources.append(micro_batch.source if micro_batch else "")
        groups.append(row_group)
    ends = list(accumulate((group.tokens.size for group in groups), initial=0))
    if (values := pending.values) is None:
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
            "steps": pa.array([steps], pa.list_(pa.int64())),
            "sources": pa.array([sources], pa.list_(pa.string())),
            "sequences": pa.array([[len(group.tokens) for group in groups]], pa.list_(pa.int64())),
            "lengths": pa.array([[group.tokens.shape[1] for group in groups]], pa.list_(pa.int64())),
            "tokens": listed(values.tokens),
            "mask": listed(values.mask.view(np.uint8)),
            "segments": listed(values.segments),
        }
    )


@dataclass(frozen=True)
class _BlockRow:
    """A row that `_finished_block` made; the values share its memory."""

    rank: int
    world: int
    error: str
    steps: list[int]
    sources: list[str]
    sequences: list[int]
    lengths: list[int]
    tokens: np.ndarray
    mask: np.ndarray
    segments: np.ndarray

    @classmethod
    def from_table(cls, row: int, table: pyarrow.Table) -> _BlockRow:
        plain = {name: table[name][row].as_py() for name in table.column_names[:-3]}
        values = {name: table[name][row].values.to_numpy() for name in table.column_names[-3:]}
        return cls(**plain, **values)

    def tensors(self) -> Iterator[tuple[int, MicroBatchTensors]]:
        """(step, micro-batch) in order."""
        import torch

        pinned = torch.cuda.is_available()

        def copied(values: np.ndarray, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            tensor = torch.empty(shape, dtype=dtype, pin_memory=pinned)
            np.copyto(tensor.numpy(), values.reshape(shape), casting="unsafe")
            return tensor

        begin = 0
        for step, source, *shape in zip(self.steps, self.sources, self.sequences, self.lengths, strict=True):
            rows, length = shape
            within = slice(begin, begin := begin + rows * length)
            yield (
                step,
                MicroBatchTensors(
                    tokens=copied(self.tokens[within], (rows, length), torch.long),
                    mask=copied(self.mask[within], (rows, length), torch.bool),
                    segments=copied(self.segments[within], (rows, length), torch.long),
                    source=source,
                ),
            )
