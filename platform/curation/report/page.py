"""What the page of a curation says, as plain values; `report.html.j2` beside this is how it looks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calumma.platform.curation.report.findings import (
    DROPPED,
    KEPT,
    SCRUBBED,
    Findings,
    Sample,
    bin_middle,
)
from calumma.platform.curation.steps.chain import STEPS
from calumma.platform.curation.steps.scrub import MARKS
from calumma.platform.reports.charts import Histogram, histogram
from calumma.platform.reports.templates import render
from calumma.platform.sources.notes import sentences

TEMPLATE = "platform/curation/report/report.html.j2"
TITLES = {
    "form": "Form",
    "licenses": "Licenses",
    "domains": "Domains",
    "images": "Images",
    "captions": "Captions",
    "texts": "Texts",
    "decontaminate": "Decontamination",
    "duplicates": "Duplicates",
    "scorers": "Scores",
}
MEASURES = {
    "characters": "Length of texts and captions, characters",
    "image side": "Shorter side of images, pixels",
    "image aspect": "Aspect of images, longer side by shorter",
}
BAD_SHOWN = 50
LANGUAGES_SHOWN = 12
# Of the steps, in their order; readable on light and dark.
COLOURS = ("#b45309", "#a16207", "#4d7c0f", "#0f766e", "#0369a1", "#4f46e5", "#9333ea", "#be185d", "#dc2626")
OUTCOMES = {KEPT: "var(--kept)", DROPPED: "var(--dropped)"}
UNREADABLE = "var(--bad)"
_MARKS = re.compile(f"({'|'.join(map(re.escape, MARKS))})")

Share = tuple[str, float, str]  # of a bar: name, percent, colour


@dataclass(frozen=True)
class Part:
    """What is told about a source: its part of the manifest's report, and its findings."""

    name: str
    report: dict[str, Any]
    findings: Findings


@dataclass(frozen=True)
class _Row:
    """A line of a table: counts by source, and of all."""

    title: str
    counts: list[int]
    is_reason: bool = False  # of the step above it


@dataclass(frozen=True)
class _Bar:
    name: str
    shares: list[Share]
    note: str


@dataclass(frozen=True)
class _Drawings:
    """Distributions of what was measured, and how often each language was found."""

    histograms: list[tuple[str, Histogram]]
    languages: list[_Bar]


@dataclass(frozen=True)
class _Card:
    """A sample. `pieces`: a text as (words, whether they are a mark), or pictures that stand side by side."""

    pieces: list[dict[str, Any]]
    note: str
    name: str
    like: _Card | str | None


@dataclass(frozen=True)
class _Source:
    """Samples of one source. `dropped`: (reason, how many, samples)."""

    name: str
    kept: int
    gone: int
    bad: int
    samples: list[_Card]
    dropped: list[tuple[str, int, list[_Card]]]
    unreadable: list[dict[str, str]]
    warnings: list[dict[str, str]]
    unread: list[str]


def page(parts: Sequence[Part]) -> str:
    """The whole page."""
    together = Findings()
    for part in parts:
        together.add(part.findings.model_copy(update={"samples": {}}))
    used = [step for step in TITLES if any(part.findings.steps.get(step) for part in parts)]
    by_source = [(p.name, _drawings(p.findings)) for p in parts if len(parts) > 1 and p.findings.measures]
    return render(
        TEMPLATE,
        names=[part.name for part in parts],
        tiles=_tiles(parts),
        flow=[_flow(part, used) for part in parts],
        flow_legend=[
            ("kept", OUTCOMES[KEPT]),
            *((f"dropped: {TITLES[step]}", colour) for step, colour in _colours(used)),
            ("unreadable", UNREADABLE),
        ],
        steps=_steps(parts),
        seconds=_seconds(together.seconds),
        drawings=_drawings(together),
        drawings_legend=list(OUTCOMES.items()),
        drawings_by_source=by_source,
        marks=_marks(parts),
        scrubbed=_cards(sample for part in parts for sample in part.findings.samples.get(SCRUBBED, [])),
        sources=[_source(part) for part in parts],
    )


# -- numbers -----------------------------------------------------------------------------------------------------------


def _total(parts: Iterable[Part], number: str) -> int:
    return sum(int(part.report.get(number, 0)) for part in parts)


def _tiles(parts: Sequence[Part]) -> list[tuple[int, str]]:
    read, kept, copies = (_total(parts, number) for number in ("read", "kept", "copies"))
    dropped = read - kept
    removed = sum(part.findings.images_removed for part in parts)
    tiles = [
        (read, "documents read"),
        (kept, f"kept, {_share(kept, read)}"),
        (dropped, f"dropped, {_share(dropped, read)}"),
        (_total(parts, "bad"), "inputs unreadable"),
        (_total(parts, "images"), "images kept" + (f", {removed:,} taken out of pages" if removed else "")),
        (_total(parts, "characters"), "characters kept"),
    ]
    return [*tiles, (copies, "copies added by score")] if copies else tiles


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _colours(steps: Iterable[str]) -> list[tuple[str, str]]:
    colours = dict(zip(TITLES, COLOURS, strict=True))
    return [(step, colours[step]) for step in steps]


def _flow(part: Part, used: Sequence[str]) -> _Bar:
    """Which share of a source's documents was kept, and which went at each step."""
    read, bad, kept = (int(part.report[number]) for number in ("read", "bad", "kept"))
    counts = [("kept", kept, OUTCOMES[KEPT])]
    counts += [(TITLES[step], sum(part.findings.steps.get(step, {}).values()), c) for step, c in _colours(used)]
    counts.append(("unreadable", bad, UNREADABLE))
    shares = [(f"{what}: {count:,}", 100 * count / (read + bad), colour) for what, count, colour in counts if count]
    return _Bar(part.name, shares, f"{kept:,} of {read:,}")


def _steps(parts: Sequence[Part]) -> list[_Row]:
    rows = [_row("read", [part.report["read"] for part in parts])]
    for step in STEPS:
        found = [part.findings.steps.get(step, {}) for part in parts]
        if not any(found):
            continue
        rows.append(_row(TITLES[step], [sum(reasons.values()) for reasons in found]))
        names = {name: sum(reasons.get(name, 0) for reasons in found) for reasons in found for name in reasons}
        rows += [
            _row(name, [reasons.get(name, 0) for reasons in found], is_reason=True)
            for name in sorted(names, key=lambda name: (-names[name], name))
        ]
    rows.append(_row("kept", [part.report["kept"] for part in parts]))
    if any(part.report.get("copies") for part in parts):
        rows.append(_row("copies", [part.report.get("copies", 0) for part in parts]))
    return rows


def _row(title: str, counts: Sequence[int], is_reason: bool = False) -> _Row:
    return _Row(title, [*counts, sum(counts)], is_reason)


def _seconds(took: Mapping[str, float]) -> list[str]:
    """What each step cost, the dearest first."""
    steps = sorted(took, key=lambda step: (-took[step], step))
    return [f"{TITLES.get(step, step.capitalize())} {took[step]:,.1f} s" for step in steps]


def _drawings(findings: Findings) -> _Drawings:
    known = [what for what in MEASURES if what in findings.measures]
    others = sorted(set(findings.measures) - set(known))
    histograms = []
    for what in [*known, *others]:
        counts = {o: {bin_middle(n): c for n, c in findings.measures[what].get(o, {}).items()} for o in OUTCOMES}
        if drawn := histogram(counts, OUTCOMES):
            histograms.append((MEASURES.get(what, what.capitalize()), drawn))
    return _Drawings(histograms, _languages(findings.languages))


def _languages(languages: Mapping[str, Mapping[str, int]]) -> list[_Bar]:
    kept, dropped = languages.get(KEPT, {}), languages.get(DROPPED, {})
    total = {name: kept.get(name, 0) + dropped.get(name, 0) for name in {*kept, *dropped}}
    most = max(total.values(), default=0)

    def shares(name: str) -> list[Share]:
        found = {outcome: languages.get(outcome, {}).get(name, 0) for outcome in OUTCOMES}
        return [(f"{o}: {count:,}", 100 * count / most, OUTCOMES[o]) for o, count in found.items() if count]

    names = sorted(total, key=lambda name: (-total[name], name))[:LANGUAGES_SHOWN]
    return [_Bar(name, shares(name), f"{total[name]:,}") for name in names]


def _marks(parts: Sequence[Part]) -> list[_Row]:
    counts: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        for mark, count in part.findings.marks.items():
            if count:
                counts.setdefault(mark, [0] * len(parts))[number] = count
    return [_row(mark, found) for mark, found in sorted(counts.items(), key=lambda pair: -sum(pair[1]))]


# -- samples -----------------------------------------------------------------------------------------------------------


def _source(part: Part) -> _Source:
    samples = part.findings.samples
    dropped = []
    for step in STEPS:
        for reason, count in sorted(part.findings.steps.get(step, {}).items(), key=lambda pair: (-pair[1], pair[0])):
            if shown := samples.get(f"{step}: {reason}"):
                dropped.append((f"{TITLES[step]}: {reason}", count, _cards(shown)))
    return _Source(
        name=part.name,
        kept=part.report["kept"],
        gone=part.report["read"] - part.report["kept"],
        bad=part.report["bad"],
        samples=_cards(samples.get(KEPT, [])),
        dropped=dropped,
        unreadable=part.report["bad_inputs"][:BAD_SHOWN],
        warnings=part.report.get("warnings", [])[:BAD_SHOWN],
        unread=sentences(part.report),
    )


def _cards(samples: Iterable[Sample]) -> list[_Card]:
    return [_card(sample) for sample in samples]


def _card(sample: Sample) -> _Card:
    like: _Card | str | None = None
    if sample.other is not None:
        like = _card(sample.other)
    elif sample.like is not None:
        like = "an earlier document"
    return _Card(_pieces(sample), sample.note, sample.name, like)


def _pieces(sample: Sample) -> list[dict[str, Any]]:
    """In order; pictures that follow each other stand side by side, and marks stand out."""
    pieces: list[dict[str, Any]] = []
    for kind, value in sample.parts:
        if kind != "image":
            words = _MARKS.split(value)  # every second one is a mark
            pieces.append({"words": [(word, number % 2 == 1) for number, word in enumerate(words) if word]})
        elif pieces and "pictures" in pieces[-1]:
            pieces[-1]["pictures"].append(value)
        else:
            pieces.append({"pictures": [value]})
    return pieces
