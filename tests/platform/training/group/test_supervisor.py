"""What accompanies a worker's steps: watchdog, notices, preemptions, checkpoints. Nothing here starts a cluster."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calumma.platform import storage
from calumma.platform.specification import Resources, Retention
from calumma.platform.storage import lease
from calumma.platform.storage.lease import OutputTaken
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.errors import Stopped
from calumma.platform.training.group import control, notice, supervisor, watchdog
from calumma.platform.training.group.chart import group_sizes_chart
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.specification import PretrainSpecification

PREEMPTED = SimpleNamespace(deadline_ms=None, preempted_node_to_ranks={"node": [0]})
WaitFor = Callable[[Callable[[], bool]], None]


class Engine:
    device = torch.device("cpu")

    def whole_state(self) -> dict[str, Any]:
        return {"weights": torch.ones(3)}

    def zero_optimization_stage(self) -> int:
        return 1


def assignment(output: str, first_step: int = 0, resume: Any = None, fence: Any = None, **recovery: Any) -> Any:
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
    run = SimpleNamespace(fence=fence)
    return SimpleNamespace(spec=spec, inputs={}, output=output, first_step=first_step, resume=resume, run=run)


def supervised(output: str, **given: Any) -> supervisor.Supervisor:
    return supervisor.Supervisor(Engine(), assignment(output, **given), Worker(0, 1, torch.device("cpu")))  # type: ignore[arg-type]


def report(step: int) -> dict[str, Any]:
    return {"step": step, "schedule_step": step, "tokens": {}}


def train(
    stage: supervisor.Supervisor, first: int, last: int, until: Callable[[int], object] = lambda step: None
) -> None:
    for step in range(first, last):
        stage.check_step(step)
        stage.after_step(step + 1, report(step + 1), due=(step + 1) % 10 == 0)
        until(step + 1)


def test_the_watchdog_hears_of_every_step_and_of_progress_beside_them(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would end a worker that is well."""
    limits, beats = list[float](), list[int]()

    class Watchdog(watchdog.Watchdog):
        def __init__(self, limit: float, *given: Any) -> None:
            limits.append(limit)
            super().__init__(limit, *given)

        def beat(self) -> None:
            beats.append(1)
            super().beat()

    monkeypatch.setattr(supervisor, "Watchdog", Watchdog)
    with supervised(str(tmp_path), hang_seconds=1234) as stage:
        for step in range(12):  # with and without a checkpoint
            train(stage, step, step + 1)
            assert len(beats) == step + 1
        stage.beat()
    assert len(beats) == 13
    assert limits == [1234]


def test_a_notice_to_stop_brings_a_checkpoint_and_says_how_to_go_on(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor
) -> None:
    monkeypatch.setattr(notice, "_POLL", 0.05)
    output = str(tmp_path)
    line = pickle.loads(pickle.dumps(control.worker_control(output)))  # it goes to Ray Train's controller
    assert line.acknowledged()
    with supervised(output) as stage:
        train(stage, 0, 3)
        line.notify("stop", "SIGTERM")
        assert not line.acknowledged()
        notices = stage._notices
        assert notices is not None
        wait_for(lambda: notices.pending is not None)
        with pytest.raises(Stopped, match=r"stopped after step 4 \(SIGTERM\).*step-00000004.*same command goes on"):
            train(stage, 3, 100)
    assert line.acknowledged()
    assert line.newest_step() == 4
    found = catalog.newest(output)
    assert found is not None
    found.manifest.verify(found.uri, content=True)


def test_a_preemption_brings_one_checkpoint_at_once_and_training_goes_on(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(supervisor, "_preemption", lambda: told[-1] if told else None)
    with supervised(str(tmp_path)) as stage:
        train(stage, 0, 6, lambda done: told.append(PREEMPTED) if done == 3 else None)
        assert catalog.published_steps(str(tmp_path)) == [4]
        train(stage, 6, 12)
    assert catalog.published_steps(str(tmp_path)) == [10, 4]


def test_weights_never_meet_the_data_of_another_step(group_of_one: None, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="data of step 7 were given to weights after step 5"),
        supervised(str(tmp_path), first_step=5) as stage,
    ):
        stage.check_step(7)


def test_checkpoints_remember_every_group_of_workers(group_of_one: None, tmp_path: Path) -> None:
    output = str(tmp_path)
    with supervised(output) as stage:
        train(stage, 0, 10)
    found = catalog.newest(output)
    with supervised(output, first_step=10, resume=found) as stage:
        train(stage, 10, 20)
    newest = catalog.newest(output)
    assert newest is not None
    groups = newest.manifest.report["groups"]
    assert [(group["step"], group["workers"]) for group in groups] == [(0, 1), (10, 1)]
    picture = group_sizes_chart([*groups, {"step": 15, "workers": 3}], 20)
    assert picture.width > picture.height > 100
    assert len(picture.getcolors(1 << 24) or []) > 2


def test_checkpoints_come_by_time_too(group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seven minutes, of steps of two; those by steps begin the time anew."""
    now = [1000.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    given = assignment(str(tmp_path))
    spec = given.spec.model_copy(update={"checkpoint_minutes": 7.0, "resources": Resources(keep=Retention(last=99))})
    with supervisor.Supervisor(
        Engine(),  # type: ignore[arg-type]
        SimpleNamespace(**vars(given) | {"spec": spec}),  # type: ignore[arg-type]
        Worker(0, 1, torch.device("cpu")),
    ) as stage:

        def step_of_two_minutes(done: int) -> None:
            now[0] += 120

        train(stage, 0, 16, step_of_two_minutes)
    assert sorted(catalog.published_steps(str(tmp_path))) == [5, 9, 10, 14]


@pytest.mark.parametrize(("left", "told"), [(500.0, "before the node is taken away"), (-20.0, "it may come too late")])
def test_a_preemption_says_whether_its_checkpoint_came_in_time(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float, told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    deadline = SimpleNamespace(deadline_ms=int((time.time() + left) * 1000), preempted_node_to_ranks={"node": [0]})
    with supervised(str(tmp_path)) as stage:
        train(stage, 0, 1)
        monkeypatch.setattr(supervisor, "_preemption", lambda: deadline)
        train(stage, 1, 3)
    assert catalog.published_steps(str(tmp_path)) == [2]
    assert told in caplog.text
    assert ("after the node was to be taken away" in caplog.text) == (left < 0)


def test_the_grace_for_a_checkpoint_follows_what_writing_one_takes(group_of_one: None, tmp_path: Path) -> None:
    output = str(tmp_path)
    line = control.worker_control(output)
    assert line.grace(120) == 120
    with supervised(output) as stage:
        train(stage, 0, 10)
        stage.wait_until_published()
        stage._saver.write_seconds = 90.0
        train(stage, 10, 20)
    assert line.grace(120) == 270


def test_a_run_that_has_lost_its_output_ends_without_a_checkpoint(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: WaitFor
) -> None:
    monkeypatch.setattr(notice, "_POLL", 0.02)
    output = str(tmp_path / "stage")
    with lease.held(output, 1e6) as owned:
        with pytest.raises(OutputTaken, match="belongs to"):
            lose(output, owned.fence, wait_for)
        assert catalog.published_steps(output) == [10]


def lose(output: str, fence: lease.Fence, wait_for: WaitFor) -> None:
    with supervised(output, fence=fence) as stage:
        train(stage, 0, 15)
        stage.wait_until_published()
        later = lease.Owner.here(60).model_dump_json().encode()
        assert storage.create(f"{output}.lease/{fence.epoch + 1:08d}.json", later)
        notices = stage._notices
        assert notices is not None
        wait_for(lambda: notices.taken is not None)
        train(stage, 15, 30)
