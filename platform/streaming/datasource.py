"""A worker's part of the plan as a source of Ray Data: lazy tasks that find the plan in Ray's object store.

Nothing of the plan travels with a worker's dataset but the reference to it, and laying one out puts no object anywhere:
the tasks of a dataset are listed where it is read.
https://docs.ray.io/en/latest/data/custom-datasource-example.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from calumma.platform.shards.row_groups import RowGroupReader
from calumma.platform.streaming.blocks import read_blocks
from calumma.platform.streaming.plan import Plan

if TYPE_CHECKING:
    import pyarrow
    from ray import ObjectRef
    from ray.data import Dataset


def layout(
    shared: ObjectRef[tuple[Plan, RowGroupReader]], starts: range, last_step: int, rank: int, world: int
) -> Dataset:
    """One worker's dataset: a task for each range of steps, from one of `starts` up to the next or to `last_step`."""
    import ray

    # Reading waits for storage and needs next to no processor. Asking for none, it can never wait for a cluster that is
    # full of the very workers that wait for it.
    return ray.data.read_datasource(
        _StepsDatasource(shared, starts, last_step, rank, world),
        num_cpus=0,
        concurrency=1,
        override_num_blocks=len(starts),
    )


class _StepsDatasource(Datasource):
    def __init__(
        self, shared: ObjectRef[tuple[Plan, RowGroupReader]], starts: range, last_step: int, rank: int, world: int
    ) -> None:
        super().__init__()
        self._shared, self._starts, self._last_step, self._rank, self._world = shared, starts, last_step, rank, world

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *given: Any, **named: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self._task(start), unknown) for start in self._starts]

    def _task(self, start: int) -> Callable[[], Iterator[pyarrow.Table]]:
        end = min(start + self._starts.step, self._last_step)
        return partial(_read, self._shared, start, end, self._rank, self._world)


def _read(
    shared: ObjectRef[tuple[Plan, RowGroupReader]], first: int, last: int, rank: int, world: int
) -> Iterator[pyarrow.Table]:
    import ray

    plan, reader = ray.get(shared)
    yield from read_blocks(first, last, plan, reader, rank, world)
