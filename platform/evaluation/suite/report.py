"""A run's page: the paper's tables with its figures and this run's side by side, intervals, samples with pictures."""

from __future__ import annotations

from dataclasses import dataclass

from calumma.platform import storage
from calumma.platform.evaluation.benchmarks.items import NUMBERS
from calumma.platform.evaluation.benchmarks.registry import BENCHMARKS
from calumma.platform.evaluation.suite.presets import FIGURES, PaperFigure
from calumma.platform.evaluation.suite.results import SuiteResults, TaskResult
from calumma.platform.reports.templates import render

PAGE, RESULTS = "report.html", "results.json"
TEMPLATE = "platform/evaluation/suite/report.html.j2"
SHEETS = {
    "sheet": "answers: green right, red wrong",
    "confusion": "what was asked for (rows) and what came (columns), answers",
}
MOST_FIGURES = 24  # further figures of a task


@dataclass(frozen=True)
class Line:
    """A row of a table, its figures as text."""

    title: str
    name: str
    metric: str
    shots: int
    small: str
    large: str
    value: str
    interval: str
    items: str
    contaminated: str
    time: str
    tokens: str


def write_page(output: str, results: SuiteResults) -> str:
    """The page, and results.json beside it. Raises StorageError."""
    text = page(results)
    storage.write_bytes(storage.join(output, PAGE), text.encode())
    storage.write_bytes(storage.join(output, RESULTS), results.model_dump_json(indent=1).encode() + b"\n")
    return text


def page(results: SuiteResults) -> str:
    groups: dict[str, list[TaskResult]] = {}
    for task in results.tasks:
        groups.setdefault(BENCHMARKS[task.benchmark].group, []).append(task)  # type: ignore[index]
    return render(
        TEMPLATE,
        results=results,
        groups={group: [(task, _lines(task), _others(task)) for task in tasks] for group, tasks in groups.items()},
        titles={task.name: title(task) for task in results.tasks},
        sheets=SHEETS,
        checked=any(task.contaminated is not None for task in results.tasks),
    )


def title(task: TaskResult) -> str:
    own = BENCHMARKS[task.benchmark].title  # type: ignore[index]
    return own if task.name == task.benchmark else f"{own} ({task.name})"


def percent(task: TaskResult, metric: str) -> bool:
    """Whether a metric is a share, shown times 100. CIDEr is given so, too, though it may be above 1."""
    if metric in NUMBERS or metric.startswith("kappa"):
        return False
    return BENCHMARKS[task.benchmark].percent or metric in ("drawn", "distinct")  # type: ignore[index]


def figure(task: TaskResult, metric: str, value: float) -> str:
    return f"{100 * value:.1f}" if percent(task, metric) else f"{value:.3f}"


def interval(task: TaskResult, metric: str) -> str:
    if metric not in task.intervals:
        return ""
    low, high = task.intervals[metric]
    return f"{figure(task, metric, low)}–{figure(task, metric, high)}"


def headlines(task: TaskResult) -> list[str]:
    """The metric that speaks for the task first, then others that the paper gives."""
    others = [metric for metric in task.metrics if (task.name, metric) in FIGURES and metric != task.headline]
    return [task.headline, *others] if task.headline in task.metrics else others


def _lines(task: TaskResult) -> list[Line]:
    lines = []
    for metric in headlines(task):
        paper = FIGURES.get((task.name, metric), PaperFigure(None, None))
        minutes, seconds = divmod(round(task.seconds), 60)
        small, large = ("" if value is None else f"{value:.1f}" for value in paper)
        lines.append(
            Line(
                title=title(task),
                name=task.name,
                metric=metric.replace("_", " "),
                shots=task.shots,
                small=small,
                large=large,
                value=figure(task, metric, task.metrics[metric]),
                interval=interval(task, metric),
                items=f"{len(task.ids):,}",
                contaminated="" if task.contaminated is None else f"{task.contaminated:,}",
                time=f"{minutes}:{seconds:02d}",
                tokens=f"{sum(task.tokens.values()):,}" if task.tokens else "",
            )
        )
    return lines


def _others(task: TaskResult) -> list[tuple[str, str, str]]:
    """Further figures: name, value, interval."""
    rest = [metric for metric in task.metrics if metric not in headlines(task)][:MOST_FIGURES]
    return [(m.replace("_", " "), figure(task, m, task.metrics[m]), interval(task, m)) for m in rest]
