"""How a job reports its progress: a function of (done, total, note), and three listeners: nobody, a log, a terminal.

A job calls it as often as it likes; listeners decide what to show. Nothing here starts a thread before it is used.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class Progress(Protocol):
    """Called by a job: `done` out of `total` units of work (any unit, floats welcome), and a short note."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


def no_progress(done: float, total: float, note: str = "") -> None:
    """Progress that nobody listens to."""


class LogLines:
    """Progress as plain lines, for a log nobody watches live: one every `interval` seconds at most, and the last."""

    def __init__(
        self,
        name: str,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._interval = interval
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = clock()
        self._last: float | None = None

    def __call__(self, done: float, total: float, note: str = "") -> None:
        now = self._clock()
        due = self._last is None or now - self._last >= self._interval or done >= total
        if not due:
            return
        self._last = now
        share = f"{done / total:4.0%}" if total > 0 else "   …"
        left = remaining(now - self._start, done, total)
        parts = [f"{self._name}: {share}", note, f"about {format_duration(left)} left" if left else ""]
        print("  ".join(part for part in parts if part), file=self._stream, flush=True)


class Display:
    """Live progress in a terminal (Rich): a line a step, with its name, bar, time spent, time left, and last note.

    with Display() as display:
        with display.step("tokenize") as progress:
            progress(3, 10, "photographs")
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = console or Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            speed_estimate_period=120.0,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        """A line for one step; it stays, full, when the step ends well, and says so when it does not."""
        task = self._bars.add_task(name, total=None, note="")
        try:
            yield self._listener(task)
        except BaseException:
            self._bars.stop_task(task)
            self._bars.update(task, description=f"[red]{name}", note="[red]stopped")
            raise
        shown = next(t for t in self._bars.tasks if t.id == task)
        self._bars.update(task, total=shown.total or 1, completed=shown.total or 1, description=f"[green]{name}")

    def skipped(self, name: str, why: str = "already done") -> None:
        """A line for a step that had nothing to do."""
        task = self._bars.add_task(f"[green]{name}", total=1, note=why)
        self._bars.update(task, completed=1)  # which stops its clock, as `add_task` does not

    def _listener(self, task: TaskID) -> Progress:
        def listener(done: float, total: float, note: str = "") -> None:
            from rich.markup import escape

            self._bars.update(task, completed=done, total=total if total > 0 else None, note=escape(note))

        return listener


def remaining(elapsed: float, done: float, total: float) -> float | None:
    """Seconds left at the speed so far; None while there is nothing to judge by, or nothing left."""
    if elapsed <= 0 or done <= 0 or total <= done:
        return None
    return elapsed * (total - done) / done


def format_duration(seconds: float) -> str:
    """A duration as people say it: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
