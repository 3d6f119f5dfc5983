"""From the plan to tensors: each training worker's dataset, read by Ray Data ahead of the training that consumes it.

`PlanDataConfig` builds the datasets whenever Ray Train (re)starts its group of workers, so a group of another size, or
one that resumes, simply gets other pieces of the same plan. `micro_batches` is the worker's end.
https://docs.ray.io/en/latest/train/user-guides/data-loading-preprocessing.html
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.train import DataConfig

from calumma.platform import storage
from calumma.platform.data.manifest import Manifest
from calumma.platform.data.plan import MicroBatch, Plan

if TYPE_CHECKING:
    import pyarrow
    import torch
    from ray.data import DataIterator, Dataset

_BLOCK = 64  # micro-batches one reading task delivers: few enough to start soon, many enough to pay for a task
_THREADS = 8  # row groups a task reads at once: object storage answers slowly, but many at a time
_BUFFER = 256 << 10  # bytes a request; row groups are small and visited in random order


_PLAIN = ("step", "rank", "world", "source", "error", "sequences", "length")
_COLUMNS = ["tokens", "loss_mask", "segments"]


class ShardError(ValueError):
    """A token shard is missing, damaged, or not what its manifest says; the message names it."""


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
    ) -> None:
        """Arguments of Plan, then the steps. Raises PlanError."""
        super().__init__(datasets_to_split="all")  # the workers wait for each other: one plan for all of them
        self.plan = Plan(seed, mixture, manifests, micro_batches)
        self.first_step = first_step
        self.last_step = last_step
        self.name = name

    @staticmethod
    def datasets(name: str = "train") -> dict[str, Callable[[], Dataset]]:
        """What the trainer wants to be given: a stand-in that is never read, since the plan is the dataset."""
        return {name: _stand_in}

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
        length = max(1, _BLOCK // self.plan.slots(world))
        starts = range(first, self.last_step, length)
        items = [{"first": start, "last": min(start + length, self.last_step)} for start in starts]
        if not items:
            raise ValueError(f"there is nothing to read: the first step is {first}, the end {self.last_step}")
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        context = dataset.context
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        return dataset.map_batches(
            partial(_read, plan=self.plan, rank=rank, world=world),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            # Reading waits for storage and needs next to no processor. Asking for none, it can never wait for a
            # cluster that is full of the very workers that wait for it.
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=1),
        )


def micro_batches(
    shard: DataIterator, rank: int, world: int, prefetch: int = 1
) -> Iterator[tuple[int, list[MicroBatchTensors]]]:
    """The steps of this worker in order, each with its micro-batches: the same number for every worker.

    `prefetch` blocks of 64 micro-batches are fetched ahead. Raises ShardError, and RuntimeError when the data was laid
    out for another rank or number of workers.
    """
    _hush()
    step, group = -1, list[MicroBatchTensors]()
    blocks = shard.iter_batches(
        batch_size=None,  # type: ignore[arg-type]  # None is a whole block: documented, and not in the annotation
        batch_format="pyarrow",
        prefetch_batches=prefetch,
    )
    for block in blocks:
        for row in _rows(block):
            if (row["rank"], row["world"]) != (rank, world):
                given = f"{row['rank']} of {row['world']}"
                raise RuntimeError(f"worker {rank} of {world} was given the data of worker {given}")
            if row["error"]:
                raise ShardError(row["error"])
            if row["step"] != step and group:
                yield step, group
                group = []
            step = row["step"]
            group.append(_tensors(row))
    if group:
        yield step, group


def _stand_in() -> Dataset:
    import ray

    return ray.data.range(1)


def _hush() -> None:
    """Keep Ray Data's running commentary out of this process's output; its log file still has it."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no progress bars


def _read(items: pyarrow.Table, plan: Plan, rank: int, world: int) -> pyarrow.Table:
    """Ranges of steps -> one row a micro-batch, in order; tokens, mask and segments are lists of B * (T+1)."""
    import pyarrow as pa

    steps = [step for item in items.to_pylist() for step in range(item["first"], item["last"])]
    work = [(step, micro_batch) for step in steps for micro_batch in plan.worker(step, rank, world)]
    with ThreadPoolExecutor(_THREADS) as pool:
        groups = list(pool.map(lambda pair: _read_or_explain(pair[1], plan.context), work))
    ends = pa.array(np.cumsum([0, *(group.tokens.size for group in groups)]), pa.int64())

    def lists(arrays: list[np.ndarray]) -> pa.Array:
        return pa.LargeListArray.from_arrays(ends, pa.array(np.concatenate([a.ravel() for a in arrays])))

    return pa.table(
        {
            "step": pa.array([step for step, _ in work], pa.int64()),
            "rank": pa.array([rank] * len(work), pa.int64()),
            "world": pa.array([world] * len(work), pa.int64()),
            "source": pa.array([micro_batch.source if micro_batch else "" for _, micro_batch in work], pa.string()),
            "error": pa.array([group.error for group in groups], pa.string()),
            "sequences": pa.array([len(group.tokens) for group in groups], pa.int64()),
            "length": pa.array([group.tokens.shape[1] for group in groups], pa.int64()),
            "tokens": lists([group.tokens for group in groups]),
            "mask": lists([group.mask for group in groups]),
            "segments": lists([group.segments for group in groups]),
        }
    )


@dataclass(frozen=True)
class _RowGroup:
    tokens: np.ndarray  # int32 [B, T+1]
    mask: np.ndarray  # bool [B, T+1]
    segments: np.ndarray  # int32 [B, T+1]
    error: str = ""

    @classmethod
    def empty(cls, context: int | None, error: str = "") -> _RowGroup:
        none = np.zeros((0, (context or 0) + 1), np.int32)
        return cls(none, none.astype(bool), none, error)


def _read_or_explain(micro_batch: MicroBatch | None, context: int | None) -> _RowGroup:
    """A row group, an empty one for None, or the error: handed on as data it reaches the worker that needs the row
    group, in its turn and in plain words, where an exception in a task would arrive as a page of Ray's frames."""
    if micro_batch is None:
        return _RowGroup.empty(context)
    try:
        return _read_row_group(micro_batch, context)
    except (ShardError, storage.StorageError) as error:
        return _RowGroup.empty(context, str(error))


def _read_row_group(micro_batch: MicroBatch, context: int | None) -> _RowGroup:
    """One row group of a shard, checked against what the manifest says. Raises ShardError, StorageError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shard = micro_batch.shard
    with storage.open_read(shard, buffer=_BUFFER) as file:
        size = file.seek(0, 2)
        if size != micro_batch.shard_bytes:
            raise ShardError(f"{shard} has {size} bytes, where its manifest says {micro_batch.shard_bytes}")
        try:
            table = pq.ParquetFile(file).read_row_group(micro_batch.row_group, _COLUMNS)
        except (pa.ArrowInvalid, IndexError, OSError) as error:
            said = f"{shard}: row group {micro_batch.row_group} cannot be read ({error})"
            raise ShardError(f"{said}; if that is no passing failure, write the shard again") from error
    if table.column_names != _COLUMNS:
        raise ShardError(f"{shard} has no columns {', '.join(_COLUMNS)}: it is not a token shard")
    rows = table.num_rows
    lengths = set(table["tokens"].combine_chunks().value_lengths().to_pylist())
    if rows != micro_batch.sequences or len(lengths) != 1 or (context and lengths != {context + 1}):
        found = f"{rows} sequences of {sorted(lengths)} tokens"
        wanted = f"{micro_batch.sequences} of {context + 1 if context else 'one length'}"
        raise ShardError(f"{shard}: row group {micro_batch.row_group} holds {found}, where the manifest says {wanted}")
    shape = (rows, lengths.pop())
    segments = table["segments"].combine_chunks().flatten().to_numpy().reshape(shape)
    mask = segments >= 0  # padding is never trained
    masks = table["loss_mask"]
    if masks.null_count == 0:
        mask &= masks.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(shape)
    else:
        for row, given in enumerate(masks.to_pylist()):
            if given is not None:
                mask[row] &= np.array(given, bool)
    return _RowGroup(table["tokens"].combine_chunks().flatten().to_numpy().reshape(shape), mask, segments)


def _rows(block: pyarrow.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table that `_read` made, lists as numpy arrays that share its memory."""
    for batch in block.to_batches():
        plain = {name: batch[name].to_pylist() for name in _PLAIN}
        ends = batch["tokens"].offsets.to_numpy()
        values = {name: batch[name].values.to_numpy(zero_copy_only=False) for name in ("tokens", "mask", "segments")}
        for row in range(batch.num_rows):
            within = slice(ends[row], ends[row + 1])
            yield {name: column[row] for name, column in plain.items()} | {
                name: value[within] for name, value in values.items()
            }


def _tensors(row: dict[str, Any]) -> MicroBatchTensors:
    import torch

    shape = (row["sequences"], row["length"])
    return MicroBatchTensors(
        tokens=torch.tensor(row["tokens"], dtype=torch.long).reshape(shape),
        mask=torch.tensor(row["mask"], dtype=torch.bool).reshape(shape),
        segments=torch.tensor(row["segments"], dtype=torch.long).reshape(shape),
        source=row["source"],
    )
