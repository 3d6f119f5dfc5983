"""Training as it is watched: stage, step, loss, tokens/s, time left, workers, last checkpoint, bad steps.

A live panel (Rich) in a terminal, plain lines elsewhere. What it shows are the newest metrics of the run in MLflow, so
`calumma job watch RUN` works from any machine, also beside a job that somebody else has started.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from calumma.platform.cluster.progress import Progress, format_duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

logger = logging.getLogger(__name__)
POLL = 2.0  # seconds between two looks at the run's newest metrics


@dataclass(frozen=True)
class Status:
    """How far a stage is; None: not known yet."""

    stage: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    workers: int | None = None
    checkpoint: int | None = None
    bad_steps: int = 0

    @classmethod
    def from_metrics(cls, stage: str, steps: int, metrics: Mapping[str, float]) -> Status:
        """From the newest metrics that the training loop has logged."""

        def whole(name: str) -> int | None:
            return int(metrics[name]) if name in metrics else None

        return cls(
            stage=stage,
            step=whole("step") or 0,
            steps=steps,
            loss=metrics.get("loss"),
            tokens_per_second=metrics.get("tokens_per_second"),
            seconds_left=metrics.get("seconds_left"),
            workers=whole("workers"),
            checkpoint=whole("checkpoint_step"),
            bad_steps=(whole("faults/skipped") or 0) + (whole("faults/rolled_back") or 0),
        )

    def fields(self) -> list[tuple[str, str]]:
        """Name and value of everything that is known, in words."""
        known: list[tuple[str, str | None]] = [
            ("step", f"{self.step:,} of {self.steps:,}"),
            ("loss", None if self.loss is None else f"{self.loss:.3f}"),
            ("tokens/s", None if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}"),
            ("time left", None if self.seconds_left is None else format_duration(self.seconds_left)),
            ("workers", None if self.workers is None else str(self.workers)),
            ("last checkpoint", None if self.checkpoint is None else f"step {self.checkpoint:,}"),
            ("bad steps", str(self.bad_steps) if self.bad_steps else None),
        ]
        return [(name, value) for name, value in known if value is not None]

    def line(self) -> str:
        return f"{self.stage}: " + "  ".join(f"{name} {value}" for name, value in self.fields())

    def note(self) -> str:
        """What a progress bar does not show by itself."""
        return "  ".join(f"{name} {value}" for name, value in self.fields() if name not in ("step", "time left"))


class MetricsSource(Protocol):
    """What has newest metrics: run.Run."""

    def latest(self) -> Mapping[str, float]: ...


class StatusLines:
    """Plain lines for a log: one every `interval` seconds at most, and the last."""

    def __init__(
        self, interval: float = 10.0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval, self._stream, self._clock = interval, stream or sys.stderr, clock
        self._last: float | None = None

    def __call__(self, status: Status) -> None:
        now = self._clock()
        if self._last is None or now - self._last >= self._interval or status.step >= status.steps:
            self._last = now
            print(status.line(), file=self._stream, flush=True)


class StatusPanel:
    """A panel that stays in its place and is drawn anew: a bar, and a row for each thing known."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> StatusPanel:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, status: Status) -> None:
        self._live.update(self.render(status), refresh=True)

    @staticmethod
    def render(status: Status) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel as Frame
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, value in status.fields():
            table.add_row(f"[dim]{name}", value, style="red" if name == "bad steps" else None)
        bar = ProgressBar(total=max(status.steps, 1), completed=status.step, width=48)
        return Frame(Group(bar, table), title=status.stage, title_align="left", expand=False)


@contextmanager
def status_screen(console: Console | None = None, stream: TextIO | None = None) -> Iterator[Callable[[Status], None]]:
    """What shows a status: a panel where there is a terminal, else lines."""
    from rich.console import Console as RichConsole

    console = console or RichConsole(file=stream, stderr=stream is None)
    if not console.is_terminal:
        yield StatusLines(stream=stream)
        return
    with StatusPanel(console) as panel:
        yield panel


@contextmanager
def progress_from_metrics(
    job_run: MetricsSource,
    stage: str,
    steps: int,
    progress: Progress,
    show: Callable[[Status], None] | None = None,
    poll: float = POLL,
) -> Iterator[None]:
    """Tell `progress`, and `show` if given, of the run's newest step from a thread for as long as it lasts."""
    stop = threading.Event()
    progress(0, steps, "starting the workers")

    def newest_status() -> Status | None:
        try:
            status = Status.from_metrics(stage, steps, job_run.latest())
        except Exception as error:  # MLflow is away: training goes on, and so does watching
            logger.debug("no news from MLflow: %s", error)
            return None
        return status

    def follow() -> None:
        shown: Status | None = None
        while True:
            last = stop.wait(poll)
            status = newest_status()
            if status is not None and status.step and status != shown:
                shown = status
                progress(status.step, steps, status.note())
                if show is not None:
                    show(status)
            if last:
                return

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def watch(identifier: str, tracking_uri: str | None = None, poll: float = POLL) -> int:
    """Show a run of MLflow until it ends: 0 when it ended well, 1 when it did not, 2 when there is no such run."""
    from calumma.platform.specification import Tracking
    from calumma.platform.tracking.run import Run
    from calumma.platform.tracking.server import resolve_uri

    run = Run(resolve_uri(Tracking(uri=tracking_uri)), identifier)
    try:
        recorded = run.client.get_run(run.id)
        stage, steps = str(recorded.info.run_name), int(recorded.data.params["steps"])
    except KeyError:
        print(f"the run {run.id} at {run.uri} is no training stage: it has no parameter `steps`", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"there is no run {run.id} to watch at {run.uri}: {error}", file=sys.stderr)
        return 2
    with suppress(KeyboardInterrupt), status_screen() as show:
        while True:
            try:
                recorded = run.client.get_run(run.id)
            except Exception as error:  # away for a while
                logger.debug("no news from MLflow: %s", error)
            else:
                show(Status.from_metrics(stage, steps, recorded.data.metrics))
                if recorded.info.status not in ("RUNNING", "SCHEDULED"):
                    return 0 if recorded.info.status == "FINISHED" else 1
            time.sleep(poll)
    return 0
