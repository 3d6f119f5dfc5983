"""A model as a system: workers on the cluster's nodes, or one in this process.

Invariants: every chunk of work is given to one worker at a time and its result taken once; results stand in the order
of the work, whoever made them. Workers that the cluster has no room for yet join when they have started; one that is
lost gives its chunk to another, and the run ends only when none is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from calumma.platform.evaluation.systems.prompts import Answer, Progress, Prompt, Score, UnusableSystem
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import Resources, Tracking

if TYPE_CHECKING:
    from calumma.platform.evaluation.systems.worker import ModelWorker

T = TypeVar("T")
CHUNKS_A_BATCH = 4  # a worker is handed so many batches at once: its engine fills seats as they become free


class LocalSystem:
    """One worker in this process, without a cluster."""

    def __init__(self, spec: SystemSpecification, tracking: Tracking) -> None:
        from calumma.platform.evaluation.systems.worker import ModelWorker

        assert spec.model is not None
        self.name, self._size = spec.title, CHUNKS_A_BATCH * spec.batch
        self._worker: ModelWorker | None = ModelWorker(
            spec.model, tracking, spec.batch, dtype=spec.dtype, pictures=spec.pictures
        )

    def answer(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Answer]:
        return self._each("answer", prompts, progress)

    def score(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Score]:
        return self._each("score", pairs, progress)

    def score_whole(self, texts: Sequence[str], progress: Progress | None = None) -> list[Score]:
        return self._each("score_whole", texts, progress)

    def close(self) -> None:
        self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, method: str, items: Sequence[Any], progress: Progress | None) -> list[Any]:
        results: list[Any] = []
        for chunk in _chunks(items, self._size):
            results += getattr(self._worker, method)(chunk)
            if progress is not None:
                progress(len(results), len(items))
        return results


class ClusterSystem(LocalSystem):
    """Workers as Ray actors, up to `resources.workers`; those start that the cluster has room for."""

    def __init__(self, spec: SystemSpecification, tracking: Tracking, resources: Resources) -> None:
        import ray

        from calumma.platform.cluster import capacity
        from calumma.platform.evaluation.systems.worker import ModelWorker

        capacity.require_workers(resources)
        self.name, self._size = spec.title, CHUNKS_A_BATCH * spec.batch
        actor: Any = ray.remote(ModelWorker).options(
            num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_restarts=2, max_task_retries=2
        )
        threads = max(1, round(resources.cpus_per_worker))
        self._batch = spec.batch
        self._starting: dict[Any, Any] = {}  # ping -> actor
        for _ in range(resources.max_workers):
            one = actor.remote(spec.model, tracking, spec.batch, threads, spec.dtype, spec.pictures)
            self._starting[one.ping.remote()] = one
        self._ready: list[Any] = []

    def close(self) -> None:
        import ray

        for one in [*self._ready, *self._starting.values()]:
            ray.kill(one)
        self._ready, self._starting = [], {}

    def _each(self, method: str, items: Sequence[Any], progress: Progress | None) -> list[Any]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        even = -(-len(items) // max(1, len(self._ready) + len(self._starting)))  # no worker waits for another's share
        chunks = list(_chunks(items, min(self._size, max(self._batch, even))))
        results: list[list[Any] | None] = [None] * len(chunks)
        waiting = deque(range(len(chunks)))
        running: dict[Any, tuple[int, Any]] = {}  # result -> (chunk, actor)
        idle = list(self._ready)
        done = 0
        while waiting or running:
            while waiting and idle:
                number, one = waiting.popleft(), idle.pop()
                running[getattr(one, method).remote(chunks[number])] = number, one
            if not (events := [*running, *self._starting]):
                raise UnusableSystem(f"{self.name}: every worker is lost; see the cluster's log of dead actors")
            [event], _ = ray.wait(events, num_returns=1)
            chunk = None
            if event in self._starting:
                one = self._starting.pop(event)
            else:
                chunk, one = running.pop(event)
            try:
                value = ray.get(event)
            except RayActorError as error:
                if chunk is not None:
                    waiting.appendleft(chunk)
                    if one in self._ready:
                        self._ready.remove(one)
                    self._starting[one.ping.remote()] = one  # Ray starts it again, as often as it may
                elif not (self._ready or self._starting):
                    raise UnusableSystem(f"{self.name}: no worker could be started: {error}") from error
                continue
            except RayTaskError as error:
                if isinstance(error.cause, Exception):
                    raise error.cause from error
                raise
            if chunk is None:
                self._ready.append(one)
            else:
                results[chunk] = value
                done += len(value)
                if progress is not None:
                    progress(done, len(items))
            idle.append(one)
        return [value for chunk_results in results for value in chunk_results or ()]


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
