"""What somebody who watches a stage sees, in a terminal and in a log."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from calumma.platform.specification import Tracking
from calumma.platform.tracking.job_run import job_run
from calumma.platform.training.group import console
from calumma.platform.training.group.console import Status, StatusLines
from calumma.platform.training.specification import PretrainSpecification

METRICS = {
    "step": 1200.0,
    "loss": 2.3456,
    "tokens_per_second": 81234.5,
    "seconds_left": 7325.0,
    "workers": 4.0,
    "checkpoint_step": 1000.0,
    "faults/skipped": 2.0,
    "faults/rolled_back": 1.0,
}


def test_a_status_says_everything_that_is_known() -> None:
    line = Status.from_metrics("pretrain", 5000, METRICS).line()
    assert line == (
        "pretrain: step 1,200 of 5,000  loss 2.346  tokens/s 81,234  time left 2 h 2 min  workers 4  "
        "last checkpoint step 1,000  bad steps 3"
    )
    assert Status.from_metrics("pretrain", 5000, {"step": 1.0}).line() == "pretrain: step 1 of 5,000"


def test_where_there_is_no_terminal_lines_come_now_and_then_and_at_the_end() -> None:
    now, out = [0.0], io.StringIO()
    show = StatusLines(interval=10, stream=out, clock=lambda: now[0])
    for second, step in ((0, 1), (5, 2), (11, 3), (12, 4), (13, 5)):
        now[0] = second
        show(Status("pretrain", step, 5))
    assert [line.split()[2] for line in out.getvalue().splitlines()] == ["1", "3", "5"]


def test_a_terminal_gets_a_panel_and_a_log_gets_lines() -> None:
    status = Status.from_metrics("stage 1", 5000, METRICS)
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    with console.status_screen(terminal) as show:
        show(status)
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]
    for word in ("stage 1", "1,200 of 5,000", "2.346", "81,234", "2 h 2 min", "step 1,000", "━", "╭"):
        assert word in drawn, word
    log = io.StringIO()
    with console.status_screen(stream=log) as show:
        show(status)
    assert log.getvalue() == status.line() + "\n"


class Away:
    """A run whose server answers now and then; each answer is one step further."""

    def __init__(self) -> None:
        self.asked, self.last = 0, threading.Event()

    def latest(self) -> dict[str, float]:
        self.asked += 1
        if self.asked > 4:
            self.last.set()
        if self.asked % 2:
            raise ConnectionError("away")
        return METRICS | {"step": float(self.asked)}


def test_following_goes_on_when_mlflow_is_away_and_tells_each_step_once() -> None:
    run, told, shown = Away(), list[tuple[float, float, str]](), list[Status]()
    with console.progress_from_metrics(
        run, "pretrain", 9, lambda d, t, note="": told.append((d, t, note)), shown.append, poll=0.01
    ):
        assert run.last.wait(60)
    assert told[0] == (0, 9, "starting the workers")
    steps = [done for done, _, _ in told[1:]]
    assert steps[:2] == [2, 4]
    assert steps == sorted(set(steps))
    assert told[1][2] == "loss 2.346  tokens/s 81,234  workers 4  last checkpoint step 1,000  bad steps 3"
    assert [status.step for status in shown] == steps


def test_what_goes_wrong_in_the_stage_goes_on_to_the_caller() -> None:
    with (
        pytest.raises(ValueError, match="diverged"),
        console.progress_from_metrics(Away(), "pretrain", 9, lambda d, t, note="": None, poll=0.01),
    ):
        raise ValueError("diverged")


def test_a_run_is_watched_from_anywhere_until_it_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = PretrainSpecification(
        storage="/data", mixture={"tokens": 1.0}, output="stage", steps=5000, micro_batches=1, initial="x",
        tracking=Tracking(uri=str(tmp_path)), run_name="stage 1",
    )  # fmt: skip
    with job_run(spec) as run:
        run.log_metrics(METRICS)
    assert console.watch(run.id, run.uri, poll=0.01) == 0
    assert capsys.readouterr().err == Status.from_metrics("stage 1", 5000, METRICS).line() + "\n"
    assert console.watch("no-such-run", run.uri) == 2
    assert f"there is no run no-such-run to watch at {run.uri}" in capsys.readouterr().err


def test_ctrl_c_ends_the_watching_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PretrainSpecification(
        storage="/data", mixture={"tokens": 1.0}, output="stage", steps=5000, micro_batches=1, initial="x",
        tracking=Tracking(uri=str(tmp_path)),
    )  # fmt: skip

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with job_run(spec) as run:
        monkeypatch.setattr(console, "time", SimpleNamespace(sleep=interrupted))
        assert console.watch(run.id, run.uri) == 0
        assert run.client.get_run(run.id).info.status == "RUNNING"
