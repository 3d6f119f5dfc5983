"""The suites: the paper's tables with its shots, its safety test; and the paper's own figures beside ours.

Figures are of the paper's tables (arXiv 2405.09818, tables 6 and 7) as they were checked; what was not is left blank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.suite.specification import SuiteSpecification
from calumma.platform.specification import SpecificationError


class PaperFigure(NamedTuple):
    """Of the 7B and the 34B model, in the table's units; None where it is not given or was not checked."""

    small: float | None
    large: float | None


def _text(name: str, shots: int = 0, **fields: object) -> SuiteTask:
    return SuiteTask.model_validate({"name": name, "benchmark": name, "shots": shots, **fields})


PAPER = [
    *(
        _text(name)
        for name in (
            "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq",
        )
    ),
    _text("gsm8k", 8),
    _text("gsm8k_votes", 8, benchmark="gsm8k", data="gsm8k", votes=(8, 32)),
    _text("math", 4),
    _text("math_votes", 4, benchmark="math", data="math", votes=(4,)),
    _text("mmlu", 5),
    _text("coco", 2),
    _text("flickr30k", 2),
    _text("vqav2", 2),
    _text("okvqa", 2),
    _text("squad"),
    _text("mnist"),
    _text("mnist_drawn", data="mnist"),
    _text("drawing", data="coco"),
    _text("reconstruction", data="coco"),
    _text("following"),
    _text("interleaved"),
]  # fmt: skip
SAFETY = [_text("safety"), _text("look_alikes")]
SUITES = {"paper": PAPER, "safety": SAFETY, "none": []}

# Task and metric -> the paper's figures.
FIGURES: dict[tuple[str, str], PaperFigure] = {
    ("piqa", "acc_norm"): PaperFigure(79.6, 83.3),
    ("siqa", "acc"): PaperFigure(57.0, 63.3),
    ("hellaswag", "acc_norm"): PaperFigure(74.2, 82.7),
    ("winogrande", "acc"): PaperFigure(70.4, 78.5),
    ("arc_easy", "acc_norm"): PaperFigure(76.1, 84.1),
    ("arc_challenge", "acc_norm"): PaperFigure(46.5, 59.7),
    ("openbookqa", "acc_norm"): PaperFigure(51.0, 54.0),
    ("boolq", "acc"): PaperFigure(81.4, 86.0),
    ("gsm8k", "exact_match_maj@1"): PaperFigure(41.6, 61.4),
    ("gsm8k_votes", "exact_match_maj@32"): PaperFigure(None, 77.0),
    ("math", "exact_match_maj@1"): PaperFigure(11.5, 22.5),
    ("math_votes", "exact_match_maj@4"): PaperFigure(None, 24.7),
    ("mmlu", "acc"): PaperFigure(52.1, 65.8),
    ("coco", "cider"): PaperFigure(None, 120.2),
    ("vqav2", "accuracy"): PaperFigure(None, 66.0),
}


def chosen_tasks(spec: SuiteSpecification) -> list[SuiteTask]:
    """The suite's tasks, with those of the specification in place of those of their name. Raises SpecificationError."""
    tasks = {task.name: task for task in SUITES[spec.suite]}
    tasks |= {task.name: task for task in spec.tasks}
    if unknown := sorted(set(spec.only) - set(tasks)):
        raise SpecificationError(f"only: there is no task {', '.join(unknown)}; tasks are: {', '.join(tasks)}")
    chosen = [task for name, task in tasks.items() if not spec.only or name in spec.only]
    if not chosen:
        raise SpecificationError("the suite has no tasks: `suite: none` needs `tasks`")
    return [_limited(task, spec.limit) for task in chosen]


def _limited(task: SuiteTask, limit: int | None) -> SuiteTask:
    if limit is None or (task.limit is not None and task.limit <= limit):
        return task
    return task.model_copy(update={"limit": limit})


def metric_of(name: str, headline: str, metrics: Iterable[str]) -> str:
    """The metric that speaks for a task: the headline, or its variant that was measured (a vote)."""
    found = list(metrics)
    if headline in found:
        return headline
    variants = [metric for metric in found if metric.startswith(f"{headline}_")]
    figures = [metric for metric in variants if (name, metric) in FIGURES]
    return (figures or variants or found or [headline])[0]
