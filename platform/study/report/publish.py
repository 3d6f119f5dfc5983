"""The report's files, and its lines for a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from calumma.platform import storage
from calumma.platform.reports.templates import render
from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import FULFILMENTS, LABELS
from calumma.platform.study.report.findings import NONE, Findings, find
from calumma.platform.study.statistics.votes import Share
from calumma.platform.study.store.dialogues import Dialogues
from calumma.platform.study.store.tables import Database

TEMPLATE = "platform/study/report/report.html.j2"
COLOURS = {"fully": "var(--kept)", "partly": "var(--dropped)", "not": "var(--bad)", NONE: "var(--line)"}
LABEL_COLOURS = {"safe": "var(--kept)", "unsafe": "var(--dropped)", "unsure": "var(--bad)"}


class Unknown(ValueError):
    """Somebody who has judged nothing of the study."""


def publish(
    study: Study, database: Database, output: str | None = None, without: Sequence[str] = ()
) -> tuple[Findings, str]:
    """Write `report.html` and `report.json`; what they say, and the folder they are in. `without`: annotators whose
    judgements are left out. Raises StorageError, and Unknown for a name that has none."""
    spec = study.specification
    ratings, dialogues = study.ratings(database).all(), Dialogues(database, spec.name, spec.names).all()
    names = {one.annotator for one in ratings} | {one.annotator for one in dialogues}
    if unknown := sorted(set(without) - names):
        raise Unknown(f"{', '.join(unknown)} has judged nothing; there are {', '.join(sorted(names)) or 'none'}")
    ratings = [one for one in ratings if one.annotator not in without]
    dialogues = [one for one in dialogues if one.annotator not in without]
    found = find(
        spec.name, spec.kind, spec.names, spec.annotators, study.items,
        {prompt.id: prompt.mixed_modal for prompt in study.prompts.values()}, ratings, dialogues, spec.issues,
    )  # fmt: skip
    found = replace(found, left_out=tuple(without))
    place = (output or storage.join(study.folder, "report")).rstrip("/")
    data = json.dumps(as_json(found), indent=1, ensure_ascii=False).encode()
    storage.write_bytes(storage.join(place, "report.json"), data)
    storage.write_bytes(storage.join(place, "report.html"), page(found).encode())
    return found, place


def as_json(found: Findings) -> dict[str, Any]:
    """All of it as plain values; shares with their value beside count and total."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"count", "total", "low", "high"}:
                return {**value, "value": value["count"] / value["total"] if value["total"] else None}
            return {str(key) if key != "" else "all": plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    shown: dict[str, Any] = plain(asdict(found))
    return shown


def page(found: Findings) -> str:
    return render(
        TEMPLATE, found=found, percent=percent, between=between, fulfilments=(*FULFILMENTS, NONE), labels=LABELS,
        colours=COLOURS, label_colours=LABEL_COLOURS, made=time.strftime("%Y-%m-%d %H:%M"), strip=_strip(found),
        flagged=[one for one in found.reliability if one.flags], describe=describe_alpha,
    )  # fmt: skip


def summary(found: Findings) -> Iterator[str]:
    yield (
        f"{found.name}: {found.judgements:,} judgements by {found.annotators} people, {found.complete} of "
        f"{found.items} items have {found.wanted}"
    )
    for duel in found.duels.get("", []):
        yield (
            f"  {duel.first} against {duel.second}: {percent(duel.rate)} ({between(duel.rate)}): {duel.wins} wins, "
            f"{duel.ties} ties, {duel.losses} losses"
        )
    for system, shares in found.fulfilment.get("", {}).items():
        yield f"  {system}: " + ", ".join(f"{what} {percent(shares[what])}" for what in (*FULFILMENTS, NONE))
    for line in found.safety:
        said = ", ".join(f"{label} {percent(of)} ({of.count:,.0f})" for label, of in line.shares.items())
        yield f"  {line.what}, {line.system}: {said}"
    for what, agreement in found.agreements.items():
        if agreement.alpha_nominal is not None:
            yield f"  agreement on {what}: Krippendorff's alpha {agreement.alpha_nominal:.3f}"
    for one in found.reliability:
        for flag in one.flags:
            yield f"  {one.annotator} {flag}"


def percent(share: Share) -> str:
    return f"{100 * share.value:.1f} %" if share.total else "–"


def between(share: Share) -> str:
    return f"{100 * share.low:.1f} to {100 * share.high:.1f}" if share.total else "nothing judged"


def describe_alpha(value: float | None) -> str:
    """In the words of Krippendorff's Content Analysis."""
    if value is None:
        return "not defined"
    return "reliable" if value >= 0.8 else "for tentative conclusions" if value >= 0.667 else "low"


def _strip(found: Findings) -> list[tuple[str, float, float, float, str]]:
    """Strengths with their intervals, as places in percent: (system, low, value, high, words)."""
    if not found.strengths:
        return []
    least, most = min(s.low for s in found.strengths), max(s.high for s in found.strengths)
    width = max(most - least, 1e-9)
    return [
        (
            s.system, 100 * (s.low - least) / width, 100 * (s.value - least) / width, 100 * (s.high - least) / width,
            f"{s.value:+.2f} ({s.low:+.2f} to {s.high:+.2f})",
        )
        for s in found.strengths
    ]  # fmt: skip
