"""Two runs side by side: of the items that both were asked the difference, its interval, and a paired test."""

from __future__ import annotations

from dataclasses import dataclass, replace

from calumma.platform.evaluation.benchmarks.items import BEYOND_ONE
from calumma.platform.evaluation.metrics.intervals import compare
from calumma.platform.evaluation.suite.presets import metric_of
from calumma.platform.evaluation.suite.report import figure, percent, title
from calumma.platform.evaluation.suite.results import SuiteResults, TaskResult
from calumma.platform.reports.templates import render
from calumma.platform.specification import SpecificationError

TEMPLATE = "platform/evaluation/suite/comparison.html.j2"


@dataclass(frozen=True)
class Row:
    """One task in both runs. `note`: why they do not pair."""

    title: str
    metric: str
    first: str
    second: str
    difference: str = ""
    interval: str = ""
    p: str = ""
    test: str = ""
    items: str = ""
    note: str = ""


def compared(first: SuiteResults, second: SuiteResults) -> list[Row]:
    """Raises SpecificationError where the runs have no task in common."""
    others = {task.name: task for task in second.tasks}
    rows = [_row(task, others[task.name]) for task in first.tasks if task.name in others]
    if not rows:
        raise SpecificationError(
            f"the runs have no task in common: {', '.join(t.name for t in first.tasks)} in the one, "
            f"{', '.join(others)} in the other"
        )
    return rows


def page(first: SuiteResults, second: SuiteResults) -> str:
    return render(TEMPLATE, first=first.system, second=second.system, rows=compared(first, second))


def _row(one: TaskResult, other: TaskResult) -> Row:
    metric = metric_of(one.name, one.headline, [name for name in one.metrics if name in other.metrics])
    first, second = (
        figure(task, metric, task.metrics[metric]) if metric in task.metrics else "" for task in (one, other)
    )
    row = Row(title(one), metric.replace("_", " "), first, second)
    if metric not in one.values or metric not in other.values:
        return replace(row, note="measured of all items together: no paired test")
    if (one.shots, one.benchmark) != (other.shots, other.benchmark):
        return replace(row, note=f"{one.shots} shots and {other.shots}: not the same task")
    values = [dict(zip(task.ids, task.values[metric], strict=False)) for task in (one, other)]
    common = [key for key in values[0] if key in values[1]]
    if not common:
        return replace(row, note="they were asked different items")
    pairs = [[own[key] for key in common] for own in values]
    found = compare(pairs[0], pairs[1], metric not in BEYOND_ONE)
    scale, digits = (100, 1) if percent(one, metric) else (1, 3)
    return replace(
        row,
        difference=f"{scale * found.difference:+.{digits}f}",
        interval=f"{scale * found.interval.low:+.{digits}f} to {scale * found.interval.high:+.{digits}f}",
        p=f"{found.p:.3g}",
        test=found.test,
        items=f"{len(common):,}",
        note="" if len(common) == len(one.ids) == len(other.ids) else "only the items that both were asked",
    )
