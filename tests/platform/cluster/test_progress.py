"""Progress: what a log and a terminal show of a job's reports."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from calumma.platform.cluster.progress import Display, LogLines, format_duration, remaining


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(reports: list[tuple[float, float, float, str]]) -> list[str]:
    """What a log shows of reports (time, done, total, note)."""
    clock, stream = Clock(), io.StringIO()
    log = LogLines("tokenize", interval=10, stream=stream, clock=clock)
    for now, done, total, note in reports:
        clock.now = now
        log(done, total, note)
    return stream.getvalue().splitlines()


def test_a_log_gets_one_line_an_interval_and_the_last() -> None:
    shown = lines_of([(0, 0, 10, "a"), (1, 1, 10, "b"), (9, 2, 10, "c"), (10, 5, 10, "d"), (11, 10, 10, "e")])
    assert [line.split()[-1] for line in shown if "left" not in line] == ["a", "e"]
    assert shown[1] == "tokenize:  50%  d  about 10 s left"
    assert len(shown) == 3


def test_a_log_copes_with_an_unknown_total() -> None:
    assert lines_of([(0, 3, 0, "reading")])[0].endswith("reading")


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6), st.floats(0.1, 1e6))
def test_time_left_continues_the_speed_so_far(elapsed: float, done: float, more: float) -> None:
    left = remaining(elapsed, done, done + more)
    assert left is None or left / elapsed == pytest.approx(more / done, rel=1e-3)


def test_no_time_left_is_told_without_something_to_judge_by() -> None:
    assert remaining(5, 0, 10) is None
    assert remaining(5, 10, 10) is None


@pytest.mark.parametrize(("seconds", "words"), [(42.2, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")])
def test_durations_are_spoken(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_the_display_names_steps_notes_and_how_they_ended() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)
    with Display(console) as display:
        display.skipped("curate")
        assert display._bars.tasks[0].finished  # its clock stands
        with display.step("tokenize") as progress:
            progress(1, 2, "photographs [1]")  # brackets are no markup
        with pytest.raises(ValueError, match="disk full"), display.step("pretrain"):
            raise ValueError("disk full")
    shown = console.export_text()
    assert "already done" in shown
    assert "photographs [1]" in shown
    last = shown.rstrip().splitlines()[-3:]
    assert "tokenize" in last[1]
    assert "100%" in last[1]
    assert "pretrain" in last[2]
    assert "stopped" in last[2]
