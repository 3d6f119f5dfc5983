"""Processes that one training hands on to the next, where several follow each other on one machine: each start of Ray
Train's costs a process for every worker, which imports torch and DeepSpeed anew. For CPUs alone.

Ray Train ends the processes of a group that has finished, and has no public interface for another way
(ray/train/v2/_internal/execution/worker_group, Ray 2.60): here its group is a class derived from its own, which takes
processes of the driver's and leaves them to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from calumma.platform.training.standby.leaving import leave_finished, preload
from calumma.platform.training.standby.processes import shut_down, value_of

logger = logging.getLogger(__name__)
_LEAVE = 20.0  # seconds that a process gets to leave a group that has finished, and to answer


@dataclass
class Processes:
    """What the driver has."""

    actors: list[Any] = field(default_factory=list)

    def take(self, number: int, work: bytes) -> list[Any]:
        """So many that live, those that were there first; new ones begin to import what `work` needs (see `preload`).
        Empty where the cluster has more than one node: which of them a worker will be on is Ray's to say."""
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
        end(self.actors)
        self.actors = []


_kept: ContextVar[Processes | None] = ContextVar("kept", default=None)


@contextmanager
def handing_on() -> Iterator[Processes]:
    """Within the block trainings hand their processes on; they end with it, or when they are closed."""
    processes = Processes()
    before = _kept.set(processes)
    try:
        yield processes
    finally:
        _kept.reset(before)
        processes.close()


def taken(number: int, work: bytes) -> list[Any]:
    """What a group of so many workers has of them; none outside of such a block."""
    processes = _kept.get()
    return processes.take(number, work) if processes is not None else []


@contextmanager
def ended_by_failure(actors: list[Any]) -> Iterator[None]:
    """Processes end where the block does not end well: whoever ran their group may be gone, and they would go on."""
    try:
        yield
    except BaseException:
        end(actors)
        raise


def end(actors: list[Any]) -> None:
    """End processes; those of a cluster that has ended have ended with it."""
    if not actors:
        return
    import ray

    for actor in actors if ray.is_initialized() else ():
        try:
            ray.kill(actor)
        except Exception:  # the others end all the same
            logger.warning("a process that was handed on could not be ended", exc_info=True)


def _lives(actor: Any) -> bool:
    import ray

    try:
        ray.get(actor.get_metadata.remote(), timeout=_LEAVE)
    except ray.exceptions.RayError:
        ray.kill(actor)
        return False
    return True


def handed_on_callback(actors: list[Any], patience: float) -> Any:
    """A callback of Ray Train's controller by which its first group has these processes, if they answer within
    `patience` seconds."""
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class HandedOnCallback(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            from ray.train.v2._internal.execution.controller.controller import TrainController

            TrainController.worker_group_cls = group_of(actors, patience)  # of this process, which is this run's alone

    return HandedOnCallback()


def group_of(actors: list[Any], patience: float) -> Any:
    """Ray Train's group of workers, with two differences: the first has the processes `actors`, and where it finishes
    it leaves those that have left what they did. One that fails, or does not start, ends them, and those that follow
    start their own."""
    import ray
    from ray.train.v2._internal.execution.worker_group.worker import Worker
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    ready, own = list(actors), {actor._actor_id for actor in actors}

    class HandedOn(WorkerGroup):
        def _create_workers(self, num_workers: int, *given: Any, **named: Any) -> list[Any]:
            mine, ready[:] = list(ready), []
            if not mine:
                return list(super()._create_workers(num_workers, *given, **named))
            try:
                known = ray.get([actor.get_metadata.remote() for actor in mine], timeout=patience)
            except ray.exceptions.RayError as error:
                logger.warning("processes of the training before cannot be used again: %s", error)
                known = []
            if len(known) != num_workers:
                end(mine)
                return list(super()._create_workers(num_workers, *given, **named))
            resources = self._worker_group_context.resources_per_worker
            workers = [
                Worker(actor, metadata, resources, placement_group_bundle_index=place)
                for place, (actor, metadata) in enumerate(zip(mine, known, strict=True))
            ]
            ranked: list[Any] = WorkerGroup._assign_worker_ranks(workers)
            return ranked

        def shutdown(self) -> None:
            status: Any = self.get_latest_poll_status()
            if status is None or status.errors or not status.finished:
                super().shutdown()
            else:
                shut_down(self, _end_others)

    def _end_others(state: Any) -> None:
        """End a group but for the driver's processes that say that they have left it."""
        theirs = [worker for worker in state.workers if worker.actor._actor_id in own]
        for worker in theirs:
            worker.actor.shutdown.remote()
        asked = {worker.actor.execute.remote(leave_finished): worker.actor._actor_id for worker in theirs}
        if asked:
            ray.wait(list(asked), num_returns=len(asked), timeout=_LEAVE)
        left = {actor for answer, actor in asked.items() if value_of(answer) is True}
        if others := [worker for worker in state.workers if worker.actor._actor_id not in left]:
            replace(state, workers=others).shutdown()
        else:
            ray.kill(state.sync_actor)
            state.placement_group_handle.shutdown()

    return HandedOn
