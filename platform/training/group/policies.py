"""Our policies for Ray Train's controller: after failures, before a resize, and which nodes count.

Its policies are classes of its own code, without a public interface (ray/train/v2/_internal/execution, Ray 2.60).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from calumma.platform.specification import Recovery

if TYPE_CHECKING:
    from calumma.platform.training.group.control import WorkerControl

logger = logging.getLogger(__name__)
_PAUSE = 0.5  # seconds between two looks for place; Ray Train's own loop has none
_PROBE_TIMEOUT = 2.0  # seconds that a node gets to accept a connection
_UNREACHABLE_LIMIT = 60.0  # seconds; Ray declares a node that does not answer dead after 15, by default


def failure_policy(config: Any, newest_step: Callable[[], int]) -> Any:
    """Ray Train's policy, with two differences: failures count from the last checkpoint on, so that a run of months may
    lose any number of workers; and errors that would come again (training diverged, say) end the run at once."""
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

    class FailuresSinceCheckpoint(DefaultFailurePolicy):
        _reached = -1

        def make_decision(self, training_failed_error: Any) -> Any:
            failures = getattr(training_failed_error, "worker_failures", {})
            if any(_not_retryable(error) for error in failures.values()):
                return FailureDecision.RAISE
            try:
                reached = newest_step()
            except OSError:  # storage is away: it counts as no progress
                reached = self._reached
            if reached > self._reached:
                self._worker_group_failures = 0
            self._reached = reached
            return super().make_decision(training_failed_error)

    return FailuresSinceCheckpoint(config)


def _not_retryable(error: BaseException) -> bool:
    # by name: where the error was unpickled its class may be another one
    return type(getattr(error, "_base_exc", error)).__name__ in (
        "TrainingFailed",
        "SpecificationError",
        "OutputTaken",
    )


def checkpoint_before_resizing(control: WorkerControl, recovery: Recovery) -> Any:
    """A callback of Ray Train's controller: a group that is well checkpoints before another size takes its place, so
    that few steps are taken twice."""
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class CheckpointBeforeResizing(ControllerCallback, WorkerGroupCallback):
        _healthy = False

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            self._healthy = True

        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            self._healthy = not worker_group_status.errors and not worker_group_status.finished

        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            if not self._healthy:
                return
            self._healthy = False
            try:
                control.notify("checkpoint", f"the group is resized to {resize_decision.num_workers} workers")
                grace = control.grace(recovery.stop_seconds)
                if not wait_until(grace, control.acknowledged):
                    logger.warning("no checkpoint before resizing within %g s", grace)
            except OSError as error:  # resizing goes on from an older checkpoint
                logger.warning("no checkpoint before resizing: %s", error)

    return CheckpointBeforeResizing()


def scaling_policy(config: Any, multiple: int = 1) -> Any:
    """Ray Train's elastic policy, which sees nodes come and go sooner, and does not count on a node that was just lost;
    groups have a multiple of `multiple` workers.

    Ray's takes its count from an actor that looks at the cluster every 20 s. And Ray needs 15 s to declare a node dead:
    a group that starts over meanwhile would wait for a place on that node.
    """
    import ray
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    class ReachableNodes(ElasticScalingPolicy):
        _unreachable_since: float | None = None

        def make_decision_for_non_running_worker_group(self) -> Any:
            decision = NoopDecision() if self._in_doubt() else super().make_decision_for_non_running_worker_group()
            if isinstance(decision, NoopDecision):
                time.sleep(_PAUSE)
            return decision

        def _in_doubt(self) -> bool:
            """Whether a node is unreachable that Ray has not declared dead yet."""
            lost = unreachable_nodes(node for node in ray.nodes() if node["Alive"])
            if not lost:
                self._unreachable_since = None
                return False
            if self._unreachable_since is None:
                self._unreachable_since = time.monotonic()
                logger.warning("no answer from %s: waiting until Ray knows whether it is lost", ", ".join(lost))
            return time.monotonic() - self._unreachable_since < _UNREACHABLE_LIMIT

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            return int(super()._count_possible_workers(reserved_resources)) // multiple * multiple

        def _get_reserved_resources(self) -> Any:
            since = time.monotonic() - self._latest_reserved_resources_query_time
            if since >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
                # its answer comes after this look at the cluster: the actor takes one call after the other
                self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return super()._get_reserved_resources()

    return ReachableNodes(config)


def unreachable_nodes(nodes: Iterable[dict[str, Any]]) -> list[str]:
    """Addresses of those of Ray's nodes that do not accept connections any more."""
    addresses = [(node["NodeManagerAddress"], int(node["NodeManagerPort"])) for node in nodes]
    with ThreadPoolExecutor(16) as pool:
        return [
            f"{host}:{port}"
            for (host, port), answers in zip(addresses, pool.map(_accepts_connections, addresses), strict=True)
            if not answers
        ]


def _accepts_connections(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_PROBE_TIMEOUT).close()
    except OSError:
        return False
    return True


def wait_until(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether the condition held within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(1.0)
    return False
