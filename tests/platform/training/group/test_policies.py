"""Failures and resizing, as Ray Train's controller sees them. Nothing here starts a cluster."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from calumma.platform.specification import Recovery
from calumma.platform.training import errors
from calumma.platform.training.group import policies
from calumma.platform.training.group.control import WorkerControl


def failure(error: Exception) -> Any:
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("a worker failed", {1: error})


def decisions(reached: list[int], errors: list[Exception], restarts: int) -> list[str]:
    from ray.train.v2.api.config import FailureConfig

    steps = iter(reached)
    policy = policies.failure_policy(FailureConfig(max_failures=restarts), lambda: next(steps))
    return [policy.make_decision(failure(error)).name for error in errors]


def test_failures_count_from_the_last_checkpoint_on() -> None:
    lost = [ConnectionError("worker died")] * 6
    assert decisions([0, 0, 0, 0], lost[:4], 3) == ["RETRY", "RETRY", "RETRY", "RAISE"]
    assert decisions([0, 10, 20, 30, 40, 50], lost, 1) == ["RETRY"] * 6


def test_an_error_that_would_come_again_ends_the_run_at_once() -> None:
    assert decisions([0, 0], [errors.TrainingFailed("diverged")], 3) == ["RAISE"]


def test_only_a_group_that_is_well_is_asked_for_a_checkpoint_before_resizing() -> None:
    asked: list[str] = []
    line = WorkerControl(lambda: 0, lambda action, why: asked.append(f"{action}: {why}"), lambda: True)
    callback = policies.checkpoint_before_resizing(line, Recovery(stop_seconds=1))
    to_three = SimpleNamespace(num_workers=3)
    callback.before_controller_execute_resize_decision(to_three)  # the first start: there is no group yet
    callback.after_worker_group_training_start(None)
    callback.after_worker_group_poll_status(SimpleNamespace(errors={0: "died"}, finished=False))
    callback.before_controller_execute_resize_decision(to_three)
    assert asked == []
    callback.after_worker_group_poll_status(SimpleNamespace(errors={}, finished=False))
    callback.before_controller_execute_resize_decision(to_three)
    assert asked == ["checkpoint: the group is resized to 3 workers"]


class Coordinator:
    """Ray's actor that counts what is there, as it was when it last looked, in place of a handle to it."""

    def __init__(self) -> None:
        self.cpus: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self.get_reserved_resources = SimpleNamespace(remote=self._count)

    def _count(self, requester: str, recompute: bool = False) -> dict[str, dict[str, float]]:
        if recompute:
            self._seen = dict(self.cpus)
        return {node: {"CPU": cpus} for node, cpus in self._seen.items()}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Two nodes as Ray knows them. Only the first accepts connections."""
    import ray

    monkeypatch.setattr(policies, "_PAUSE", 0)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as closed:
        ports = [listening.getsockname()[1], closed.getsockname()[1]]
        closed.close()
        found = [{"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Alive": True} for port in ports]
        monkeypatch.setattr(ray, "nodes", lambda: found)
        monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
        yield found


def scaling(coordinator: Coordinator, multiple: int = 1) -> Any:
    from ray.train.v2.api.config import ScalingConfig

    policy = policies.scaling_policy(ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 1}), multiple)
    policy.GET_RESERVED_RESOURCES_INTERVAL_S = 0
    asked = SimpleNamespace(maybe_send_resource_request=lambda *given: None, _autoscaling_coordinator=coordinator)
    policy._coordinator_client = asked
    return policy


def test_a_group_does_not_count_on_a_node_that_is_silent_until_ray_knows_whether_it_is_lost(
    nodes: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = Coordinator()
    coordinator.cpus = {"first": 2, "second": 1}
    policy = scaling(coordinator)
    assert not hasattr(policy.make_decision_for_non_running_worker_group(), "num_workers")
    assert f"no answer from 127.0.0.1:{nodes[1]['NodeManagerPort']}: waiting" in caplog.text
    nodes[1]["Alive"] = False
    coordinator.cpus.pop("second")
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2


def test_a_node_that_ray_keeps_though_it_is_silent_holds_nobody_up_for_ever(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "_UNREACHABLE_LIMIT", 0)
    coordinator = Coordinator()
    coordinator.cpus = {"first": 2, "second": 1}
    assert scaling(coordinator).make_decision_for_non_running_worker_group().num_workers == 3


def test_a_running_group_sees_a_node_that_joined_at_its_next_look() -> None:
    import ray

    coordinator = Coordinator()
    coordinator.cpus = {"first": 2}
    policy = scaling(coordinator)
    policy.scaling_config.elastic_resize_monitor_interval_s = 0
    running = SimpleNamespace(start_time=0.0, num_workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", lambda answer, timeout: answer)
        assert not hasattr(policy.make_decision_for_running_worker_group(running, None), "num_workers")
        coordinator.cpus["second"] = 1
        assert policy.make_decision_for_running_worker_group(running, None).num_workers == 3


def test_groups_whose_workers_share_rows_grow_and_shrink_by_whole_ones(nodes: list[dict[str, Any]]) -> None:
    nodes[1]["Alive"] = False
    coordinator = Coordinator()
    policy = scaling(coordinator, multiple=2)
    for cpus, workers in ((3, 2), (2, 2)):
        coordinator.cpus = {"first": cpus}
        assert policy.make_decision_for_non_running_worker_group().num_workers == workers
    coordinator.cpus = {"first": 1}
    assert not hasattr(policy.make_decision_for_non_running_worker_group(), "num_workers")
