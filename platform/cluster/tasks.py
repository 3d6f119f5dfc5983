"""Independent tasks on the cluster through Ray Data, their results in order.

A task here is coarse (a file, a group of shards) and does its reading and writing itself: documents and images never
cross the object store, and what a task writes depends on nothing but the task, so any cluster makes equal shards.
Ray Data runs the tasks, retries them when a machine dies and scales the actors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from calumma.platform.cluster import capacity
from calumma.platform.cluster.restart_notice import hold_back_restart_notice
from calumma.platform.specification import Resources

MAX_BLOCKS = 4096  # tasks beyond it share a block: Ray Data's bookkeeping stays small
T = TypeVar("T")
JsonObject = dict[str, Any]  # plain values, as JSON has them


def map_in_order(
    tasks: Sequence[JsonObject],
    work: Callable[[JsonObject], JsonObject] | type[Any],
    resources: Resources,
    arguments: JsonObject | None = None,
) -> Generator[JsonObject, None, None]:
    """`work(task)` of every task, yielded in the order of the tasks.

    `work` is a function, or a class that each actor makes once with `arguments`. With no workers the tasks run in this
    process, without Ray. Raises SpecificationError when the cluster cannot hold the workers, and what `work` raises.
    """
    if not tasks:
        return
    if resources.max_workers == 0:
        yield from _in_process(tasks, work, arguments or {})
        return
    workers = capacity.require_workers(resources)

    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
    from ray.exceptions import RayTaskError

    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # It warns that there are no progress bars, which is what we ask for.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    actors = isinstance(work, type)
    if actors:
        hold_back_restart_notice()
    function: Any = _JsonActor if actors else _json_task
    with DataContext.current(context):
        # JSON keeps Ray Data from guessing a schema for results that differ in shape.
        items = [{"task": json.dumps(task)} for task in tasks]
        dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map(
            function,
            fn_constructor_kwargs={"work": work, "arguments": arguments or {}} if actors else None,
            fn_kwargs=None if actors else {"work": work},
            compute=ActorPoolStrategy(size=min(workers, len(items))) if actors else TaskPoolStrategy(workers),
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker or None,
        )
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["result"])
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise


def _in_process(
    tasks: Sequence[JsonObject], work: Callable[[JsonObject], JsonObject] | type[Any], arguments: JsonObject
) -> Iterator[JsonObject]:
    function = work(**arguments) if isinstance(work, type) else work
    for task in tasks:  # through JSON, as on the cluster
        yield json.loads(_json_task({"task": json.dumps(task)}, function)["result"])


def _json_task(row: JsonObject, work: Callable[[JsonObject], JsonObject]) -> JsonObject:
    return {"result": json.dumps(work(json.loads(row["task"])))}


class _JsonActor:
    def __init__(self, work: type[Any], arguments: JsonObject) -> None:
        self._work = work(**arguments)

    def __call__(self, row: JsonObject) -> JsonObject:
        return _json_task(row, self._work)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
