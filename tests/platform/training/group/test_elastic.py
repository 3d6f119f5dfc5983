"""What keeps a stage alive: hung workers, notices, signals, failures, resizing. Nothing here starts a cluster."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calumma.platform import storage
from calumma.platform.specification import Recovery
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training import errors
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.errors import Stopped
from calumma.platform.training.group import control, fit, notice, policies, supervisor, watchdog
from calumma.platform.training.group.chart import group_sizes_chart
from calumma.platform.training.group.control import WorkerControl
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.specification import PretrainSpecification

PREEMPTED = SimpleNamespace(deadline_ms=None, preempted_node_to_ranks={"node": [0]})


# -- a worker that hangs --


def hung_process(tmp_path: Path, wait: str) -> subprocess.CompletedProcess[str]:
    """A process with a watchdog that beats once and then waits for ever, in the given way."""
    script = f"""
import ctypes, pathlib, threading, time
from calumma.platform.training.group.watchdog import Watchdog

def keep(text):
    pathlib.Path("stacks.txt").write_text(text)

dog = Watchdog(1.0, keep, grace=0.1)

def waiting_for_a_neighbour():
    {wait}

for _ in range(4):
    time.sleep(0.5)
    dog.beat()
print("alive", flush=True)
waiting_for_a_neighbour()
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_a_worker_without_progress_is_ended_and_its_stacks_are_kept(tmp_path: Path) -> None:
    ended = hung_process(tmp_path, "threading.Event().wait()")
    assert ended.returncode == watchdog.HUNG_EXIT_CODE
    assert ended.stdout == "alive\n"  # as long as it beat, it lived
    stacks = (tmp_path / "stacks.txt").read_text()
    assert stacks.startswith("no progress for")
    assert "in waiting_for_a_neighbour" in stacks
    assert "'MainThread'" in stacks


def test_even_where_no_python_thread_can_run_the_worker_ends_and_its_stacks_are_kept(tmp_path: Path) -> None:
    ended = hung_process(tmp_path, "ctypes.PyDLL(None).sleep(600)")  # C code that never gives the interpreter back
    assert ended.returncode == 1
    (file,) = tmp_path.glob("calumma-stacks-*.txt")
    assert "in waiting_for_a_neighbour" in file.read_text()


# -- notices --


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A torch.distributed group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Engine:
    device = torch.device("cpu")
    checkpoint_engine: Any = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.save({"weights": torch.ones(3)}, f"{folder}/{tag}/mp_rank_00_model_states.pt")

    def zero_optimization_stage(self) -> int:
        return 1


def assignment(output: str, first_step: int = 0, resume: Any = None, **recovery: Any) -> Any:
    spec = PretrainSpecification.model_validate(
        {
            "storage": "/nowhere",
            "mixture": {"tokens": 1.0},
            "output": output,
            "initial": "x",
            "steps": 100,
            "micro_batches": 4,
            "resources": {"recovery": recovery, "keep": {"last": 2}},
        }
    )
    return SimpleNamespace(spec=spec, inputs={}, output=output, first_step=first_step, resume=resume)


def keeper(output: str, **given: Any) -> supervisor.Supervisor:
    return supervisor.Supervisor(Engine(), assignment(output, **given), Worker(0, 1, torch.device("cpu")))  # type: ignore[arg-type]


def report(step: int) -> dict[str, Any]:
    return {"step": step, "schedule_step": step, "tokens": {}}


def train(
    kept: supervisor.Supervisor, first: int, last: int, until: Callable[[int], object] = lambda step: None
) -> None:
    for step in range(first, last):
        kept.check_step(step)
        kept.after_step(step + 1, report(step + 1), due=(step + 1) % 10 == 0)
        until(step + 1)


def wait_for(happened: Callable[[], bool]) -> None:
    while not happened():
        threading.Event().wait(0.05)


def test_a_notice_to_stop_brings_a_checkpoint_and_says_how_to_go_on(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "_POLL", 0.05)
    output = str(tmp_path)
    line = pickle.loads(pickle.dumps(control.worker_control(output)))  # it goes to Ray Train's controller
    assert line.acknowledged()
    with keeper(output) as kept:
        train(kept, 0, 3)
        line.notify("stop", "SIGTERM")
        assert not line.acknowledged()
        notices = kept._notices
        assert notices is not None
        wait_for(lambda: notices.pending is not None)
        with pytest.raises(Stopped, match=r"stopped after step 4 \(SIGTERM\).*step-00000004.*same command goes on"):
            train(kept, 3, 100)
    assert line.acknowledged()
    assert line.newest_step() == 4
    found = catalog.newest(output)
    assert found is not None
    found.manifest.verify(found.uri, content=True)


def test_a_preemption_brings_one_checkpoint_at_once_and_training_goes_on(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(supervisor, "_preemption", lambda: told[-1] if told else None)
    with keeper(str(tmp_path)) as kept:
        train(kept, 0, 6, lambda done: told.append(PREEMPTED) if done == 3 else None)
        assert catalog.published_steps(str(tmp_path)) == [4]
        train(kept, 6, 12)
    assert catalog.published_steps(str(tmp_path)) == [10, 4]


def test_weights_never_meet_the_data_of_another_step(group: None, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="data of step 7 were given to weights after step 5"),
        keeper(str(tmp_path), first_step=5) as kept,
    ):
        kept.check_step(7)


def test_checkpoints_remember_every_group_of_workers(group: None, tmp_path: Path) -> None:
    output = str(tmp_path)
    with keeper(output) as kept:
        train(kept, 0, 10)
    found = catalog.newest(output)
    with keeper(output, first_step=10, resume=found) as kept:
        train(kept, 10, 20)
    newest = catalog.newest(output)
    assert newest is not None
    groups = newest.manifest.report["groups"]
    assert [(group["step"], group["workers"]) for group in groups] == [(0, 1), (10, 1)]
    picture = group_sizes_chart([*groups, {"step": 15, "workers": 3}], 20)
    assert picture.width > picture.height > 100
    assert len(picture.getcolors(1 << 24) or []) > 2


def test_a_group_that_starts_goes_on_from_the_newest_checkpoint_of_then(group: None, tmp_path: Path) -> None:
    output = str(tmp_path)
    given = assignment(output)
    first_step = control.FirstStep(output, given.spec, {})
    assert first_step() == 0
    with keeper(output) as kept:
        train(kept, 0, 10)
    assert first_step() == 10


# -- failures and resizing, as Ray Train's controller sees them --


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


def scaling(coordinator: Coordinator) -> Any:
    from ray.train.v2.api.config import ScalingConfig

    policy = policies.scaling_policy(ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 1}))
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


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_asks_the_workers_for_a_checkpoint_and_a_second_ends_them(
    number: signal.Signals, ends_with: type[BaseException]
) -> None:
    asked, aborted, signals = list[str](), list[bool](), fit.Signals()
    line = WorkerControl(lambda: 0, lambda action, why: asked.append(f"{action}: {why}"), lambda: bool(asked))
    before = signal.getsignal(number)

    def twice() -> None:
        with fit._interruptible(signals):
            fit._stop_on_signals(line, 60, lambda: aborted.append(True), signals)
            os.kill(os.getpid(), number)
            wait_for(lambda: bool(asked))
            assert not aborted
            os.kill(os.getpid(), number)

    with pytest.raises(ends_with):
        twice()
    assert asked == [f"stop: {number.name}"]
    assert aborted == [True]
    assert signal.getsignal(number) is before


def test_workers_that_do_not_answer_are_ended_after_the_grace_period() -> None:
    aborted = threading.Event()
    signals = fit.Signals()
    line = WorkerControl(lambda: 0, lambda action, why: None, lambda: False)

    def once() -> None:
        with fit._interruptible(signals):
            fit._stop_on_signals(line, 0.1, aborted.set, signals)
            os.kill(os.getpid(), signal.SIGINT)
            aborted.wait()
            raise ConnectionError("the controller is gone")  # what Ray says in the driver then

    with pytest.raises(KeyboardInterrupt):
        once()


def test_a_notice_that_nobody_can_read_is_no_notice(tmp_path: Path) -> None:
    storage.write_bytes(notice.notice_file(str(tmp_path), "checkpoint"), b"{half")
    notices = notice.NoticeWatcher(str(tmp_path), poll=0.01)
    threading.Event().wait(0.1)
    assert notices.pending is None
    storage.write_bytes(notice.notice_file(str(tmp_path), "checkpoint"), b"{}")
    wait_for(lambda: notices.pending is not None)
    assert notices.pending == ("checkpoint", "")
    notices.acknowledge("checkpoint")
    assert notice.none_pending(str(tmp_path))
    notices.close()


@pytest.mark.parametrize("order", [("stop", "checkpoint"), ("checkpoint", "stop")])
def test_a_notice_to_stop_is_not_lost_beside_another(tmp_path: Path, order: tuple[notice.Action, ...]) -> None:
    place = str(tmp_path)
    for action in order:
        notice.notify(place, action, action)
    notices = notice.NoticeWatcher(place, poll=0.01)
    wait_for(lambda: notices.pending is not None)
    assert notices.pending == ("stop", "stop")
    notices.acknowledge("stop")
    assert notice.none_pending(place)
    notices.close()


def test_a_notice_to_stop_that_comes_during_a_checkpoint_is_followed_after_it(tmp_path: Path) -> None:
    place = str(tmp_path)
    notices = notice.NoticeWatcher(place, poll=0.01)
    notice.notify(place, "checkpoint", "the group is resized")
    wait_for(lambda: notices.pending is not None)
    notice.notify(place, "stop", "SIGTERM")
    notices.acknowledge("checkpoint")
    assert not notice.none_pending(place)
    wait_for(lambda: notices.pending == ("stop", "SIGTERM"))
    notices.close()


def test_a_checkpoint_is_asked_for_while_no_folder_exists_yet(tmp_path: Path) -> None:
    line = control.worker_control(str(tmp_path / "stage"))
    assert line.newest_step() == -1
    assert line.acknowledged()
    line.notify("checkpoint", "by hand")
    assert Manifest.find(str(tmp_path / "stage/checkpoints")) is None
    assert not line.acknowledged()
