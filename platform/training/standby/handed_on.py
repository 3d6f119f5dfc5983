"""Processes that one training hands on to the next, where several follow each other on one machine: each start of Ray
Train's costs a process for every worker, which imports torch and DeepSpeed anew. For CPUs alone.

Ray Train ends the processes of a group that has finished, and has no public interface for another way
(ray/train/v2/_internal/execution/worker_group, Ray 2.60): here its group is a class derived from its own, which takes
processes of the driver's and leaves them to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from calumma.platform.training.standby.leaving import leave_finished, preload

logger = logging.getLogger(__name__)
_LEAVE = 20.0  # seconds that a process gets to leave a group that has finished


@dataclass
class Processes:
    """What the driver has."""

    actors: list[Any] = field(default_factory=list)

    def take(self, number: int, work: bytes) -> list[Any]:
        """So many that live, those that were there first; new ones begin to import what `work` needs (see `preload`).
        None where the cluster has more than one node: which of them a worker will be on is Ray's to say."""
        import ray
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
        from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

        if sum(node["Alive"] for node in ray.nodes()) != 1:
            return []
        self.actors = [actor for actor in self.actors if _lives(actor)]
        while len(self.actors) < number:
            environment = WorkerGroup._get_worker_runtime_env(custom_runtime_env={})
            # The group's placement has the cores: these have none of their own.
            actor: Any = ray.remote(num_cpus=0, runtime_env=environment)(RayTrainWorker).remote()
            actor.execute.remote(preload, work)
            self.actors.append(actor)
        return self.actors[:number]

    def close(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


_kept: Processes | None = None


@contextmanager
def handing_on() -> Iterator[Processes]:
    """Within the block trainings hand their processes on; they end with it, or when they are closed."""
    global _kept
    before, _kept = _kept, Processes()
    try:
        yield _kept
    finally:
        import ray

        mine, _kept = _kept, before
        if ray.is_initialized():
            mine.close()


def taken(number: int, work: bytes) -> list[Any]:
    """What a group of so many workers has of them; none outside of such a block."""
    return _kept.take(number, work) if _kept is not None else []


def _lives(actor: Any) -> bool:
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(actor.get_metadata.remote(), timeout=_LEAVE)
        return True
    ray.kill(actor)
    return False


def handed_on_callback(actors: list[Any]) -> Any:
    """A callback of Ray Train's controller by which its first group has these processes."""
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class HandedOnCallback(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            from ray.train.v2._internal.execution.controller.controller import TrainController

            TrainController.worker_group_cls = group_of(actors)  # of this process, which is this run's alone

    return HandedOnCallback()


def group_of(actors: list[Any]) -> Any:
    """Ray Train's group of workers, with two differences: the first has the processes `actors`, and where it finishes
    it leaves them. One that fails ends them, and those that follow start their own."""
    import ray
    from ray.train.v2._internal.execution.worker_group.worker import Worker
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
    from ray.train.v2._internal.util import invoke_context_managers

    ready, own = list(actors), {actor._actor_id for actor in actors}

    class HandedOn(WorkerGroup):
        def _create_workers(
            self,
            num_workers: int,
            placement_group: Any,
            resources_per_worker: dict[str, float],
            *given: Any,
            **named: Any,
        ) -> list[Any]:
            mine, ready[:] = list(ready), []
            known: list[Any] = []
            if len(mine) == num_workers:
                try:
                    known = ray.get([actor.get_metadata.remote() for actor in mine])
                except ray.exceptions.RayError as error:
                    logger.warning("processes of the training before cannot be used again: %s", error)
            if not known:
                started: list[Any] = super()._create_workers(
                    num_workers, placement_group, resources_per_worker, *given, **named
                )
                return started
            ranked: list[Any] = WorkerGroup._assign_worker_ranks(
                [
                    Worker(actor, metadata, resources_per_worker, placement_group_bundle_index=place)
                    for place, (actor, metadata) in enumerate(zip(mine, known, strict=True))
                ]
            )
            return ranked

        def shutdown(self) -> None:
            status: Any = self.get_latest_poll_status()
            if status is None or status.errors or not status.finished:
                super().shutdown()
                return
            state: Any = self._worker_group_state
            around: list[Any] = [callback.on_worker_group_shutdown for callback in self._callbacks]
            with invoke_context_managers(around):
                for callback in self._callbacks:
                    callback.before_worker_group_shutdown(self)
                others = self._without_handed_on(state.workers)
                if others:
                    replace(state, workers=others).shutdown()
                else:
                    ray.kill(state.sync_actor)
                    state.placement_group_handle.shutdown()
                self._clear_state()
                for callback in self._callbacks:
                    callback.after_worker_group_shutdown(self._worker_group_context)

        def _without_handed_on(self, workers: list[Any]) -> list[Any]:
            """Those that end: all but the driver's that have left what they did."""
            asked = {w.actor.execute.remote(leave_finished): w for w in workers if w.actor._actor_id in own}
            if not asked:
                return workers
            done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LEAVE)
            left = [asked[answer].actor._actor_id for answer in done]
            return [worker for worker in workers if worker.actor._actor_id not in left]

    return HandedOn
