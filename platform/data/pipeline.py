"""Independent tasks on the cluster through Ray Data, their results in order; and how a directory is published.

A task here is coarse (a file, a group of shards) and does its reading and writing itself: documents and images never
cross the object store, and what a task writes depends on nothing but the task, so any cluster makes equal shards.
Ray Data runs the tasks, retries them when a machine dies and scales the actors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from calumma.platform import cluster, storage
from calumma.platform.config import JobSpecification, Resources
from calumma.platform.data.manifest import Manifest, ManifestError, finished
from calumma.platform.data.notices import hold_back_restart_notice

MAX_BLOCKS = 4096  # tasks beyond it share a block: Ray Data's bookkeeping stays small
T = TypeVar("T")
SHARD_NAME = re.compile(r"[a-z]+-[0-9a-f]{8}-\d{5,}-\d{5,}\.parquet")
# What a killed storage.write_bytes leaves of a local shard or manifest.
UNFINISHED = re.compile(rf"\.({SHARD_NAME.pattern}|manifest\.json)\.[0-9a-f]+\.tmp")
_THREADS = 16
Values = dict[str, Any]  # plain values, as JSON has them


def in_order(
    tasks: Sequence[Values],
    work: Callable[[Values], Values] | type[Any],
    resources: Resources,
    arguments: Values | None = None,
) -> Generator[Values, None, None]:
    """`work(task)` of every task, yielded in the order of the tasks.

    `work` is a function, or a class that each actor makes once with `arguments`. With no workers the tasks run in this
    process, without Ray. Raises SpecificationError when the cluster cannot hold the workers, and what `work` raises.
    """
    if not tasks:
        return
    if resources.max_workers == 0:
        yield from _in_process(tasks, work, arguments or {})
        return
    workers = cluster.require(resources)

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
    tasks: Sequence[Values], work: Callable[[Values], Values] | type[Any], arguments: Values
) -> Iterator[Values]:
    function = work(**arguments) if isinstance(work, type) else work
    for task in tasks:  # through JSON, as on the cluster
        yield json.loads(_json_task({"task": json.dumps(task)}, function)["result"])


def _json_task(row: Values, work: Callable[[Values], Values]) -> Values:
    return {"result": json.dumps(work(json.loads(row["task"])))}


class _JsonActor:
    def __init__(self, work: type[Any], arguments: Values) -> None:
        self._work = work(**arguments)

    def __call__(self, row: Values) -> Values:
        return _json_task(row, self._work)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def fingerprint(specification: JobSpecification, inputs: Mapping[str, Any]) -> str:
    """Eight characters for the names of shards: what is made differently never overwrites what is published."""
    values = specification.model_dump(mode="json", exclude={"tracking", "resources", "run_name"})
    return hashlib.sha256(json.dumps([values, inputs], sort_keys=True).encode()).hexdigest()[:8]


def stem(kind: str, mark: str, task: int) -> str:
    """How the names of a task's shards begin; `mark` is a fingerprint."""
    return f"{kind}-{mark}-{task:05d}"


def shard_name(stem: str, number: int) -> str:
    """The name of a task's n-th shard."""
    return f"{stem}-{number:05d}.parquet"


def standing(uri_dir: str, specification: JobSpecification) -> Manifest | None:
    """The manifest of a directory that need not be made again: equal specification, equal inputs, files all there."""
    manifest = finished(uri_dir, specification)
    try:
        if manifest is not None:
            manifest.verify(uri_dir)
    except ManifestError:
        return None
    return manifest


def together(kind: str, specification: JobSpecification, parts: Mapping[str, Manifest]) -> Manifest:
    """One manifest over published subdirectories (name -> manifest), so that they can be read as one, too."""
    files = [
        entry.model_copy(update={"path": f"{name}/{entry.path}"}) for name, m in parts.items() for entry in m.files
    ]
    return Manifest(
        kind=kind,
        files=files,
        specification=specification.model_dump(mode="json"),
        report={"sources": {name: manifest.report for name, manifest in parts.items()}},
        inputs={uri: mark for manifest in parts.values() for uri, mark in manifest.inputs.items()},
    )


def publish(uri_dir: str, manifest: Manifest) -> None:
    """Write the manifest, which replaces any earlier one at once, then delete shards that no longer belong: those of
    an earlier specification and of killed attempts. Files that we did not name are left alone. Raises StorageError."""
    manifest.write(uri_dir)
    tidy(uri_dir, (entry.path for entry in manifest.files))


def tidy(uri_dir: str, keep: Iterable[str]) -> None:
    """Delete shards of ours that are not among `keep`, and what killed attempts left. Raises StorageError."""
    kept = set(keep)
    names = {storage.relative(uri, uri_dir): uri for uri in storage.list_files(uri_dir)}
    discard(uri for name, uri in names.items() if name not in kept and SHARD_NAME.fullmatch(name))
    sweep(uri_dir)


def sweep(uri_dir: str) -> None:
    """Delete what killed writers left unfinished in a local folder; S3 has no such thing."""
    if not storage.is_remote(uri_dir):
        for file in storage.local_path(uri_dir).glob(".*.tmp"):
            if UNFINISHED.fullmatch(file.name):
                file.unlink(missing_ok=True)


def discard(uris: Iterable[str]) -> None:
    """Delete files of unpublished attempts. Raises StorageError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(storage.delete, uris):
            pass
