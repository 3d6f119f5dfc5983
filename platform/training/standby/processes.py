"""Processes that need not start: workers that live on when one of their group is lost, and spares that have imported
everything. A group that starts over takes them in place of new ones.

Ray Train ends every process of a group before the next one starts. Its group of workers has no public interface for
another way (ray/train/v2/_internal/execution/worker_group, Ray 2.60): here it is a class derived from Ray's, which
keeps the processes and their place when a group has failed, and the group that follows has the same size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from calumma.platform.training.standby.keeper import Keeper, keeper_name
from calumma.platform.training.standby.leaving import left_group, preload

logger = logging.getLogger(__name__)
_LEAVE = 20.0  # seconds that a living worker gets to notice, at its next collective, that its group has lost a part
_READY = 10.0  # seconds that a spare gets to finish importing: about what a new process takes to start
_SETTLE = 10.0  # seconds that a group has the cores to itself before spares import and rehearse beside it


@dataclass
class Kept:
    """What a failed group has left."""

    placement: Any
    context: Any
    living: dict[int, Any]
    """Workers by the number of their place."""
    nodes: dict[int, str]
    """Node by the number of a place."""
    synchronizer: Any
    """Ray Train's actor for barriers."""


@dataclass
class Standby:
    """What the controller of a run has ready. `spare_work`: what spares import and rehearse, packed; none: there are no
    spares, and processes are not used again."""

    spare_work: bytes | None
    keepers_run: str | None
    """The run whose state is copied in memory; none: it is not."""
    kept: Kept | None = None
    spares: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Node -> a spare, and what tells that it has imported everything."""
    keepers: dict[str, Any] = field(default_factory=dict)
    """Node -> its keeper."""
    resizing: int | None = None
    """Workers of the group that is about to follow."""

    # -- processes --

    def keep(self, state: Any, context: Any) -> bool:
        """Keep what lives of a group that has failed; whether it can be used again."""
        import ray

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        nodes = {worker.placement_group_bundle_index: worker.metadata.node_id for worker in state.workers}
        if self.spare_work is None or self.resizing != len(state.workers) or not set(nodes.values()) <= alive:
            return False
        asked = {worker.actor.execute.remote(left_group, _LEAVE): worker for worker in state.workers}
        ray.wait(list(asked), num_returns=len(asked), timeout=1.5 * _LEAVE)
        living = {}
        for answer, worker in asked.items():
            if value_of(answer) is True:
                living[worker.placement_group_bundle_index] = worker
            else:
                ray.kill(worker.actor)
        state.sync_actor.reset.remote()
        state.sync_actor.set_required_ranks.remote(None)
        self.kept = Kept(state.placement_group_handle, context, living, nodes, state.sync_actor)
        return True

    def take(self, context: Any) -> Kept | None:
        """What was kept, if a group of this kind can use it; else it is given up."""
        kept, self.kept = self.kept, None
        if kept is None:
            return None
        same = (context.num_workers, context.resources_per_worker)
        if same == (kept.context.num_workers, kept.context.resources_per_worker):
            return kept
        _give_up(kept)
        return None

    def spare(self, node: str) -> tuple[Any, Any] | None:
        """A spare of a node and its metadata; none when there is none that lives."""
        import ray

        actor, _ = self.spares.pop(node, (None, None))
        if actor is None:
            return None
        try:
            return actor, ray.get(actor.get_metadata.remote(), timeout=_READY)
        except ray.exceptions.RayError as error:  # a new process is started in its place
            logger.warning("the spare process of a node has died, or is not ready: %s", error)
            ray.kill(actor)
            return None

    def start_spares(self, nodes: Iterable[str], worker_class: Any, runtime_env: Any) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self.spare_work is None:
            return
        for node in nodes:
            if node not in self.spares:
                actor = (
                    ray.remote(runtime_env=runtime_env, num_cpus=0)(worker_class)
                    .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
                    .remote()
                )
                self.spares[node] = actor, actor.execute.remote(preload, self.spare_work)

    # -- keepers --

    def start_keepers(self, nodes: Sequence[str]) -> None:
        """A keeper on each of these nodes, in a ring: each copies its node's state to the next."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self.keepers_run is None:
            return
        for node in nodes:
            if node not in self.keepers or not _lives(self.keepers[node]):
                name = keeper_name(self.keepers_run, node)
                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
                keeper: Any = ray.remote(Keeper)
                options = {"num_cpus": 0, "max_concurrency": 4, "scheduling_strategy": strategy}
                self.keepers[node] = keeper.options(name=name, **options).remote(name)
        for node, following in zip(nodes, [*nodes[1:], *nodes[:1]], strict=True):
            self.keepers[node].follow.remote(self.keepers[following] if following != node else None)

    def release(self) -> None:
        """End everything that stands ready."""
        import ray

        kept, self.kept = self.kept, None
        if kept is not None:
            _give_up(kept)
        for actor, _ in self.spares.values():
            ray.kill(actor)
        for keeper in self.keepers.values():
            ray.kill(keeper)
        self.spares, self.keepers = {}, {}


def value_of(answer: Any) -> Any:
    """What a call has returned; None where it has failed, or has not yet."""
    import ray

    try:
        return ray.get(answer, timeout=0)
    except ray.exceptions.RayError:
        return None


def _lives(actor: Any) -> bool:
    import ray

    try:
        ray.get(actor.ready.remote(), timeout=5)
    except ray.exceptions.RayError:
        return False
    return True


def _give_up(kept: Kept) -> None:
    import ray

    for worker in kept.living.values():
        ray.kill(worker.actor)
    ray.kill(kept.synchronizer)
    kept.placement.shutdown()


def standby_callback(standby: Standby) -> Any:
    """A callback of Ray Train's controller by which its groups use and fill what stands ready."""
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class StandbyCallback(ControllerCallback, WorkerGroupCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            from ray.train.v2._internal.execution.controller.controller import TrainController

            TrainController.worker_group_cls = living_workers(standby)  # of this process, which is this run's alone

        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            standby.resizing = resize_decision.num_workers

        def after_worker_group_start(self, worker_group: Any) -> None:
            standby.start_keepers(nodes_of(worker_group))

        async def before_controller_shutdown(self) -> None:
            standby.release()

        def before_controller_abort(self) -> None:
            standby.release()

    return StandbyCallback()


@dataclass(frozen=True)
class _Existing:
    """An actor that exists, in place of the class of which one would be started."""

    actor: Any

    def options(self, **given: Any) -> _Existing:
        return self

    def remote(self, **given: Any) -> Any:
        return self.actor


def nodes_of(worker_group: Any) -> list[str]:
    """The nodes of a group's workers, each once, by rank."""
    return list(dict.fromkeys(worker.metadata.node_id for worker in worker_group.get_workers()))


def shut_down(worker_group: Any, end: Callable[[Any], object]) -> None:
    """What Ray Train's `WorkerGroup.shutdown` does, with `end(its state)` for ending all of its processes."""
    from ray.train.v2._internal.util import invoke_context_managers

    callbacks = worker_group._callbacks
    with invoke_context_managers([callback.on_worker_group_shutdown for callback in callbacks]):
        for callback in callbacks:
            callback.before_worker_group_shutdown(worker_group)
        end(worker_group._worker_group_state)
        worker_group._clear_state()
        for callback in callbacks:
            callback.after_worker_group_shutdown(worker_group._worker_group_context)


def living_workers(standby: Standby) -> Any:
    """Ray Train's group of workers, with three differences: one that fails leaves its living processes and its place to
    the next of its size; that takes them, and spares for those that are lost; and once it has settled it starts spares
    for the next that is lost on each node."""
    import ray.train.v2._internal.execution.worker_group.worker_group
    from ray.train.v2._internal.execution.worker_group.worker import Worker
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    theirs: Any = ray.train.v2._internal.execution.worker_group.worker_group

    class LivingWorkers(WorkerGroup):
        _taken: Kept | None = None
        _spared = False

        def _start_impl(self, builder: Any) -> None:
            new = theirs.SynchronizationActor
            try:
                super()._start_impl(builder)
            finally:
                theirs.SynchronizationActor = new

        def poll_status(self, timeout: float | None = None) -> Any:
            status = super().poll_status(timeout)
            if not self._spared and time.monotonic() > self.get_worker_group_state().start_time + _SETTLE:
                self._spared = True
                self._start_spares()
            return status

        def shutdown(self) -> None:
            status = self.get_latest_poll_status()
            if standby.resizing is None or status is None or not status.errors:
                super().shutdown()
                return
            shut_down(self, lambda state: standby.keep(state, self._worker_group_context) or state.shutdown())

        def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
            standby.resizing = None
            self._taken = standby.take(worker_group_context)
            if self._taken is not None:
                theirs.SynchronizationActor = _Existing(self._taken.synchronizer)
                return self._taken.placement
            return super()._create_placement_group(scaling_config, worker_group_context)

        def _create_workers(
            self,
            num_workers: int,
            placement_group: Any,
            resources_per_worker: dict[str, float],
            *given: Any,
            **named: Any,
        ) -> list[Any]:
            kept, self._taken = self._taken, None
            if kept is None:
                created: list[Any] = super()._create_workers(
                    num_workers, placement_group, resources_per_worker, *given, **named
                )
                return created
            found, missing = dict[Any, Any](), list[int]()
            for place in range(num_workers):
                old = kept.living.get(place)
                ready = (old.actor, old.metadata) if old is not None else standby.spare(kept.nodes[place])
                if ready is None:
                    missing.append(place)
                else:
                    found[place] = Worker(*ready, resources_per_worker, placement_group_bundle_index=place)
            if missing:
                started = super()._create_workers(
                    len(missing), placement_group, resources_per_worker, placement_group_bundle_indices=missing
                )
                found |= {worker.placement_group_bundle_index: worker for worker in started}
            logger.warning("%d living processes go on, %d have started", num_workers - len(missing), len(missing))
            ranked: list[Any] = WorkerGroup._assign_worker_ranks([found[place] for place in range(num_workers)])
            return ranked

        def _start_spares(self) -> None:
            settings: Any = self._train_run_context.run_config
            environment = self._get_worker_runtime_env(custom_runtime_env=settings.worker_runtime_env)
            standby.start_spares(nodes_of(self), self._worker_cls, environment)

    return LivingWorkers
