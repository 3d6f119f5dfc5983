"""The quickstart's live display: every step from the start, each with its bar, time spent and time left.

The last line is the whole: what the steps usually take, corrected by what the finished ones did take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO, cast

from calumma.platform.cluster.progress import LogLines, Progress, format_duration, remaining

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@dataclass
class Row:
    """One step. `usual`: seconds on two ordinary cores, a first guess until steps have been measured."""

    name: str
    title: str
    usual: float
    started: float | None = None
    seconds: float | None = None
    done: float = 0.0
    total: float = 0.0
    skipped: bool = False

    def spent(self, now: float) -> float | None:
        if self.seconds is not None:
            return self.seconds
        return None if self.started is None else now - self.started


def left(rows: Sequence[Row], now: float) -> float | None:
    """Seconds until the last row ends; None when nothing is left."""
    measured = [row for row in rows if row.seconds is not None and not row.skipped]
    scale = (
        sum(row.seconds or 0.0 for row in measured) / (sum(row.usual for row in measured) or 1.0) if measured else 1.0
    )
    total = 0.0
    for row in rows:
        if row.seconds is not None or row.skipped:
            continue
        if row.started is None:
            total += row.usual * scale
        else:
            total += left_of(row, now) or max(0.0, row.usual * scale - (now - row.started))
    return total or None


def left_of(row: Row, now: float) -> float | None:
    """Seconds until a running row ends, at its own speed; None while it has none."""
    if row.started is None or row.seconds is not None:
        return None
    return remaining(now - row.started, row.done, row.total)


class Board:
    """with Board(rows, console) as board: with board.step("curate") as progress: …; board.skip("tokenize", 12.0)"""

    def __init__(self, rows: Sequence[Row], console: Console) -> None:
        self.rows = {row.name: row for row in rows}
        self.console = console
        self.live = console.is_terminal
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self.live:
            self._bars = _bars(self)
            for row in self.rows.values():
                self._tasks[row.name] = self._bars.add_task(row.title, total=None, start=False, note="", row=row.name)
            self._tasks[""] = self._bars.add_task(
                "[bold]Everything", total=sum(r.usual for r in self.rows.values()), note="", row=""
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        """A step for the length of the block, which gets the listener for its progress."""
        row = self.rows[name]
        row.started = time.monotonic()
        if self._bars is None:
            self.console.print(f"{row.title} …", highlight=False)
        else:
            self._bars.start_task(self._tasks[name])
            self._bars.update(self._tasks[name], description=f"[bold]{row.title}")
        try:
            yield _Listener(self, row)
        except BaseException:
            if self._bars is not None:
                self._bars.update(self._tasks[name], description=f"[red]{row.title}", note="[red]stopped")
            raise
        row.seconds = time.monotonic() - row.started
        if self._bars is None:
            self.console.print(f"{row.title}: {format_duration(row.seconds)}", highlight=False)
        self._fill(row)

    def seconds(self, name: str) -> float:
        """What a finished step took."""
        return self.rows[name].seconds or 0.0

    def skip(self, name: str, seconds: float | None, why: str = "already done") -> None:
        """A step with nothing to do; `seconds` it took when it ran, if known."""
        row = self.rows[name]
        row.skipped, row.seconds = True, seconds or 0.0
        if self._bars is None:
            self.console.print(f"{row.title}: {why}", highlight=False)
        self._fill(row, note=why)

    def update(self, row: Row, note: str) -> None:
        from rich.markup import escape

        if self._bars is not None:
            total = row.total if row.total > 0 else None
            self._bars.update(self._tasks[row.name], completed=row.done, total=total, note=escape(note))
            self._whole()

    def _fill(self, row: Row, note: str | None = None) -> None:
        if self._bars is not None:
            task = self._tasks[row.name]
            self._bars.start_task(task)  # a skipped one has not been
            self._bars.update(task, total=1, completed=1, description=f"[green]{row.title}")
            if note is not None:
                self._bars.update(task, note=note)
            self._whole()

    def _whole(self) -> None:
        assert self._bars is not None
        self._bars.update(self._tasks[""], completed=sum(_share(row) * row.usual for row in self.rows.values()))


def _share(row: Row) -> float:
    if row.seconds is not None:
        return 1.0
    return min(1.0, row.done / row.total) if row.total > 0 else 0.0


class _Listener:
    """One row's progress: to the live display, or as lines where there is none."""

    def __init__(self, board: Board, row: Row) -> None:
        self._board, self._row = board, row
        self._log = None if board.live else LogLines(row.title, stream=cast(TextIO, board.console.file))

    def __call__(self, done: float, total: float, note: str = "") -> None:
        self._row.done, self._row.total = done, total
        self._board.update(self._row, note)
        if self._log is not None:
            self._log(done, total, note)


def _bars(board: Board) -> Bars:
    from rich.console import RenderableType
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Mark(SpinnerColumn):
        """Nothing, turning, or done."""

        def render(self, task: Task) -> RenderableType:
            return super().render(task) if task.started else Text(" ")

    class Times(ProgressColumn):
        """Time spent and time left, from the board's own rows."""

        def render(self, task: Task) -> Text:
            now = time.monotonic()
            name = task.fields["row"]
            rows = list(board.rows.values())
            if name:
                spent, rest = board.rows[name].spent(now), left_of(board.rows[name], now)
                if board.rows[name].skipped and not spent:
                    spent = None
            else:
                spent, rest = sum(r.spent(now) or 0.0 for r in rows if not r.skipped), left(rows, now)
            text = Text(f"{format_duration(spent):>12}" if spent is not None else " " * 12)
            text.append(f"  about {format_duration(rest)} left" if rest else "", style="cyan")
            return text

    return Bars(
        Mark(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        Times(),
        TextColumn("[dim]{task.fields[note]}"),
        console=board.console,
    )
