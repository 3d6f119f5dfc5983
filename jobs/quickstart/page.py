"""What the quickstart's page says, as plain values; `report.html.j2` beside this is how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from calumma.jobs.quickstart.course import Course
from calumma.jobs.quickstart.questions import Answer, AnswerPart
from calumma.jobs.quickstart.steps import DIGITS
from calumma.platform.cluster.progress import format_duration
from calumma.platform.reports.charts import LineChart, Series, line_chart
from calumma.platform.reports.templates import render

TEMPLATE = "jobs/quickstart/report.html.j2"
STAGES = ("stage1", "stage2", "finetune")
LOSSES = {"loss_text": ("text tokens", "var(--text)"), "loss_image": ("image tokens", "var(--image)")}


@dataclass(frozen=True)
class Curve:
    """Values of one metric of one run by optimizer step."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Story:
    """Everything the page shows. `curves`: step name -> metric -> curve. `sheets`: title -> PNG."""

    results: dict[str, Any]
    fast: bool
    answers: list[Answer]
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    sheets: dict[str, bytes] = field(default_factory=dict)
    commands: list[tuple[str, str]] = field(default_factory=list)
    course: Course = DIGITS


@dataclass(frozen=True)
class _Piece:
    """Of an answer: words, or a picture with the words right before it."""

    words: str
    picture: str | None = None


def page(story: Story) -> str:
    """The whole page."""
    seconds = story.results["seconds"]
    longest = max([*seconds.values(), 1e-9])
    course = story.course
    titles = course.titles
    return render(
        TEMPLATE,
        total=format_duration(sum(seconds.values())),
        fast=story.fast,
        lead=course.lead,
        tiles=[
            (_shown(story, name), f"{course.measured[name]} (target {course.goal(name)})", _missed(story, name))
            for name in course.targets
        ],
        answers=[(title, [a for a in story.answers if a.kind == kind]) for kind, title in course.kinds.items()],
        pieces_of=_pieces,
        losses=_losses(story.curves, titles),
        reconstruction=_reconstruction(story.curves),
        sheets=story.sheets,
        results=[(title, _shown(story, name), _target(story, name)) for name, title in course.measured.items()],
        model=f"{story.results['model_uri']} in {story.results['model_directory']}",
        seconds=[(titles[name], format_duration(value), 100 * value / longest) for name, value in seconds.items()],
        commands=story.commands,
    )


def _shown(story: Story, name: str) -> str:
    return story.course.shown(name, story.results[name])


def _missed(story: Story, name: str) -> bool:
    return story.course.missed(name, story.results[name])


def _target(story: Story, name: str) -> str:
    if name not in story.course.targets:
        return ""
    return f"{story.course.goal(name)}: {'missed' if _missed(story, name) else 'reached'}"


def _pieces(parts: Sequence[AnswerPart]) -> list[_Piece]:
    """An answer in the order in which it came."""
    pieces: list[_Piece] = []
    for part in parts:
        if part.kind == "text":
            pieces.append(_Piece(part.value))
        elif pieces and pieces[-1].picture is None:
            pieces[-1] = _Piece(pieces[-1].words, part.value)
        else:
            pieces.append(_Piece("", part.value))
    return pieces


def _losses(curves: dict[str, dict[str, Curve]], titles: dict[str, str]) -> LineChart | None:
    """Text and image loss over all stages, one after the other."""
    pieces: dict[str, list[list[tuple[float, float]]]] = {metric: [] for metric in LOSSES}
    bands: list[tuple[str, float]] = []
    begin = 0
    for stage in STAGES:
        end = begin
        for metric, lines in pieces.items():
            if curve := curves.get(stage, {}).get(metric):
                lines.append([(begin + s, value) for s, value in zip(curve.steps, curve.values, strict=True)])
                end = max([end, *(begin + s for s in curve.steps)])
        if end > begin:
            bands.append((titles[stage], begin))
        begin = end
    return line_chart([Series(*LOSSES[metric], lines) for metric, lines in pieces.items()], bands)


def _reconstruction(curves: dict[str, dict[str, Curve]]) -> LineChart | None:
    curve = curves.get("train_image_tokenizer", {}).get("reconstruction")
    if curve is None:
        return None
    line = list(zip(curve.steps, curve.values, strict=True))
    return line_chart([Series("squared error", LOSSES["loss_image"][1], [line])], logarithmic=True)
