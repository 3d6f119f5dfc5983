"""From the plan to tensors: each training worker's dataset, read by Ray Data ahead of the training that consumes it.

Whenever Ray Train (re)starts its group of workers each is given its `PlanShard`, and lays out its own dataset from the
step that all have agreed on: a group of another size, or one that resumes, simply gets other pieces of the same plan.
`micro_batches` is the worker's end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calumma.platform.shards.cache import ShardCache
from calumma.platform.shards.row_groups import RowGroupReader, ShardError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.streaming.blocks import BLOCK_BYTES, step_bytes
from calumma.platform.streaming.datasource import layout
from calumma.platform.streaming.plan import Plan

if TYPE_CHECKING:
    import pyarrow
    import torch
    from ray import ObjectRef
    from ray.data import DataIterator

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_BLOCKS_PER_TASK = 64  # blocks, about, that one reading task delivers one after the other
_MOST_TASKS = 1024  # at most, of a worker's dataset: each is an object in its worker's Ray store


@dataclass(frozen=True)
class MicroBatchTensors:
    """Packed sequences of one forward pass, T = context. B is 0 for the empty micro-batch of a short worker."""

    tokens: torch.Tensor
    """LongTensor [B, T+1]: inputs are [:, :-1], targets [:, 1:]."""

    mask: torch.Tensor
    """BoolTensor [B, T+1], aligned with `tokens`: true where the token is a target that is trained."""

    segments: torch.Tensor
    """LongTensor [B, T+1]: number of the document within its row, -1 for padding."""

    number: int = 0
    """Its number among the passes of the global batch, the same on any number of workers where passes are whole."""


class PlanData:
    """The order of the data of all steps before `last_step`, and how they are read."""

    def __init__(
        self,
        seed: int,
        mixture: Mapping[str, float],
        manifests: Mapping[str, Manifest],
        micro_batches: int,
        last_step: int,
        verify: bool = True,
        cache: ShardCache | None = None,
        rows: int | None = None,
        whole: bool = False,
        sharing: int = 1,
    ) -> None:
        """Arguments of Plan, the last three too, and the steps. Whether to check what is read, and where to keep copies
        of shards. Raises PlanError."""
        self.plan = Plan(seed, mixture, manifests, micro_batches, rows, whole, sharing)
        self._shared: ObjectRef[tuple[Plan, RowGroupReader]] | None = None
        self.reader = RowGroupReader(self.plan.context, verify, cache)
        self.last_step = last_step
        for uri in self.plan.sources if verify else ():
            without = sum(1 for file in manifests[uri].files if file.row_groups and not file.footer)
            if without:
                logger.warning(
                    "%s: %s of its shards have no checksums of their row groups, so they are not verified; tokenize "
                    "the documents again to have them",
                    *(uri, without),
                )

    def shards(self, world: int) -> list[PlanShard]:
        """What each worker of a group is given, in the order of the ranks."""
        shared, size = self._share_plan(), step_bytes(self.plan, world)
        return [PlanShard(shared, self.last_step, size, rank, world) for rank in range(world)]

    def _share_plan(self) -> ObjectRef[tuple[Plan, RowGroupReader]]:
        """The plan as one object of the cluster: nodes fetch it once, and its arrays are read where they lie."""
        import ray

        if self._shared is None:
            self._shared = ray.put((self.plan, self.reader))
        return self._shared

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shared": None}  # an object belongs to the process that put it


@dataclass(frozen=True)
class PlanShard:
    """Worker r of W's share of the plan: a reference to it, and how it is cut. Ray Train takes it for a provider of
    datasets, so that `ray.train.get_dataset_shard` returns it."""

    shared: ObjectRef[tuple[Plan, RowGroupReader]]
    last_step: int
    step_bytes: int
    rank: int
    world: int

    def get_dataset_shard(self, asked: object) -> PlanShard:
        return self

    def iterator(self, first: int) -> DataIterator:
        """The data of steps `first` .. last_step - 1. Raises ValueError where there are none."""
        # Tasks are ranges of steps, and look up their micro-batches: to lay out every micro-batch of a long run here
        # would take minutes and gigabytes at each start.
        steps = self.last_step - first
        if steps <= 0:
            raise ValueError(f"there is nothing to read: the first step is {first}, the end {self.last_step}")
        length = max(1, _BLOCKS_PER_TASK * BLOCK_BYTES // self.step_bytes, -(-steps // _MOST_TASKS))
        dataset = layout(self.shared, range(first, self.last_step, length), self.last_step, self.rank, self.world)
        context = dataset.context
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # Every block that a task yields goes its way at once, of whatever size: it is one row, and not cut further.
        context.target_max_block_size = 1
        return dataset.iterator()


def plan_callback(data: PlanData) -> Any:
    """A callback of Ray Train's controller that gives every worker of a group its share of a plan.

    Ray's own (`DatasetsCallback`, Ray 2.60) starts a process for it with each group, which workers wait for, and sends
    the whole plan to each of them as part of the trainer's settings.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class PlanCallback(WorkerGroupCallback):
        def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
            return {"dataset_shard_provider": list(data.shards(len(workers)))}

    return PlanCallback()


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


def begun(make: Callable[[], Iterator[Item]], device: torch.device) -> Iterator[Item]:
    """The items of `make()`, which a thread begins to make at once: it takes the first, whoever iterates the others.
    `device`: whose memory is pinned, if any is. What the thread raises comes with the first item."""

    import torch

    def begin() -> tuple[list[Item], Iterator[Item]]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: or every worker of a node would open a context on its first
        items = make()
        return list(islice(items, 1)), items

    pool = ThreadPoolExecutor(1, thread_name_prefix="data")
    beginning = pool.submit(begin)
    pool.shutdown(wait=False)

    def all_of_them(beginning: Future[tuple[list[Item], Iterator[Item]]]) -> Iterator[Item]:
        first, others = beginning.result()
        del beginning  # which would keep the first item as long as there are others
        while first:
            yield first.pop()
        yield from others

    return all_of_them(beginning)


def _quiet_ray_data() -> None:
    """Keep Ray Data's running commentary out of this process's output; its log file still has it."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no progress bars


@dataclass(frozen=True)
class _BlockRow:
    """A row that `blocks.py` made; the values share its memory."""

    rank: int
    world: int
    error: str
    length: int
    rows: int
    steps: list[int]
    firsts: list[int]
    passes: list[list[int]]
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

        begin, length = 0, self.length
        for step, first, passes in zip(self.steps, self.firsts, self.passes, strict=True):
            for rows in passes:
                within = slice(begin, begin := begin + rows * length)
                tensors = MicroBatchTensors(
                    tokens=copied(self.tokens[within], (rows, length), torch.long),
                    mask=copied(self.mask[within], (rows, length), torch.bool),
                    segments=copied(self.segments[within], (rows, length), torch.long),
                    number=first // self.rows,
                )
                yield step, tensors
                first += rows
