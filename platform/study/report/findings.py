"""What the judgements of a study amount to (the paper's section on human evaluation, and its safety table)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from calumma.platform.study.items import Item
from calumma.platform.study.judgement import FULFILMENTS, LABELS, Kind, Rating
from calumma.platform.study.statistics.agreement import Agreement, agreement
from calumma.platform.study.statistics.guessing import Reliability, reliability
from calumma.platform.study.statistics.strength import Strength, strengths
from calumma.platform.study.statistics.votes import Duel, Share, duel, majority, share
from calumma.platform.study.store.dialogues import Dialogue

FIRST, SAME, SECOND = "first", "same", "second"
NONE = "no majority"
MIXED, TEXT = "mixed-modal prompts", "text-only prompts"


@dataclass(frozen=True)
class Labelled:
    """One line of the safety table: what was asked, of whom, and how often the majority said what."""

    what: str
    system: str
    shares: dict[str, Share]  # safe, unsafe, unsure; what has no majority is unsure


@dataclass(frozen=True)
class Findings:
    """`duels`, `fulfilment`: of all prompts under "", by category, and of mixed-modal and of text-only prompts."""

    name: str
    kind: Kind
    systems: tuple[str, ...]
    items: int
    complete: int
    judgements: int
    annotators: int
    wanted: int  # judgements of an item
    duels: dict[str, list[Duel]] = field(default_factory=dict)
    fulfilment: dict[str, dict[str, dict[str, Share]]] = field(default_factory=dict)  # group, system, what
    issues: dict[str, dict[str, Share]] = field(default_factory=dict)  # system, issue: share of judgements of answers
    left: Share | None = None  # judgements for the answer on the left, of those that prefer one
    strengths: list[Strength] = field(default_factory=list)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    reliability: list[Reliability] = field(default_factory=list)
    safety: list[Labelled] = field(default_factory=list)
    harms: dict[str, dict[str, int]] = field(default_factory=dict)  # of dialogues: harm, label
    left_out: tuple[str, ...] = ()  # annotators
    notes: list[tuple[str, str, str]] = field(default_factory=list)  # annotator, item, note


def find(
    name: str,
    kind: Kind,
    systems: Sequence[str],
    wanted: int,
    items: Mapping[str, Item],
    mixed_modal: Mapping[str, bool],
    ratings: Sequence[Rating],
    dialogues: Sequence[Dialogue] = (),
    issues: Sequence[str] = (),
) -> Findings:
    """mixed_modal: by prompt. Ratings of items that the study does not have are left out."""
    ratings = [rating for rating in ratings if rating.item in items]
    by_item: dict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        by_item[rating.item].append(rating)
    labelled = [dialogue for dialogue in dialogues if dialogue.label is not None]
    found = Findings(
        name=name,
        kind=kind,
        systems=tuple(systems),
        items=len(items),
        complete=sum(len(given) >= wanted for given in by_item.values()),
        judgements=len(ratings),
        annotators=len({rating.annotator for rating in ratings} | {d.annotator for d in labelled}),
        wanted=wanted,
        notes=[(r.annotator, r.item, r.judgement.note) for r in ratings if r.judgement.note.strip()],
        safety=_safety(by_item, items, labelled),
        harms=_harms(labelled),
    )
    if kind == "safety":
        votes = {item: [_label(rating) for rating in given] for item, given in by_item.items()}
        found.agreements["label"] = agreement(list(votes.values()), LABELS)
        found.reliability.extend(_reliability(ratings, lambda rating: {rating.item: _label(rating)}, LABELS))
        return found
    groups = _groups(items, mixed_modal)
    for group, members in groups.items():
        found.duels[group] = _duels(members, by_item, items)
        found.fulfilment[group] = _fulfilment(members, by_item, items, systems)
    found.issues.update(_issues(ratings, systems, issues))
    sided = [r.judgement.preference for r in ratings if r.judgement.preference in ("left", "right")]
    results = [
        (a, b, {a: 1.0, b: 0.0}.get(majority([r.preferred or "" for r in by_item[item.id]]) or "", 0.5))
        for item in items.values()
        if by_item.get(item.id)
        for a, b in [item.systems]
    ]
    preferences = {item: [_order(rating, items[item]) for rating in given] for item, given in by_item.items()}
    found.agreements["preference"] = agreement(list(preferences.values()), (FIRST, SAME, SECOND))
    found.agreements["fulfilment"] = agreement(
        [votes for _, votes in sorted(_fulfilment_votes(by_item, items).items())], FULFILMENTS
    )
    found.reliability.extend(
        _reliability(ratings, lambda rating: {rating.item: _order(rating, items[rating.item])}, (FIRST, SAME, SECOND))
    )
    return replace(found, left=share(sided.count("left"), len(sided)), strengths=strengths(systems, results))


def _groups(items: Mapping[str, Item], mixed_modal: Mapping[str, bool]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {"": list(items.values())}
    for item in items.values():
        groups.setdefault(MIXED if mixed_modal.get(item.prompt) else TEXT, []).append(item)
    if len(groups) == 2:  # all prompts are of one kind
        del groups[next(name for name in groups if name)]
    for item in sorted(items.values(), key=lambda item: item.category):
        groups.setdefault(f"category: {item.category}", []).append(item)
    return groups


def _order(rating: Rating, item: Item) -> str:
    """What a judge of two answers prefers, in the order of the item's systems."""
    if rating.preferred is None:
        return SAME
    return FIRST if rating.preferred == item.systems[0] else SECOND


def _label(rating: Rating) -> str:
    return rating.judgement.answers[0].label or "unsure"


def _duels(members: Iterable[Item], by_item: Mapping[str, list[Rating]], items: Mapping[str, Item]) -> list[Duel]:
    votes: dict[tuple[str, str], list[list[str | None]]] = defaultdict(list)
    for item in members:
        if given := by_item.get(item.id):
            first, second = item.systems
            votes[first, second].append([rating.preferred for rating in given])
    return [duel(first, second, of) for (first, second), of in sorted(votes.items())]


def _fulfilment_votes(
    by_item: Mapping[str, list[Rating]], items: Mapping[str, Item], members: Iterable[Item] | None = None
) -> dict[tuple[str, str], list[str]]:
    """Of each answer, (system, prompt), what was said of it in whatever comparison."""
    votes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in items.values() if members is None else members:
        for rating in by_item.get(item.id, ()):
            for system, answer in zip(rating.systems, rating.judgement.answers, strict=True):
                if answer.fulfils is not None:
                    votes[system, item.prompt].append(answer.fulfils)
    return votes


def _fulfilment(
    members: Iterable[Item], by_item: Mapping[str, list[Rating]], items: Mapping[str, Item], systems: Sequence[str]
) -> dict[str, dict[str, Share]]:
    votes = _fulfilment_votes(by_item, items, members)
    found = {}
    for system in systems:
        decided = [majority(said) or NONE for (of, _), said in votes.items() if of == system]
        if decided:
            found[system] = {what: share(decided.count(what), len(decided)) for what in (*FULFILMENTS, NONE)}
    return found


def _issues(ratings: Sequence[Rating], systems: Sequence[str], issues: Sequence[str]) -> dict[str, dict[str, Share]]:
    ticked: dict[str, list[tuple[str, ...]]] = {system: [] for system in systems}
    for rating in ratings:
        for system, answer in zip(rating.systems, rating.judgement.answers, strict=True):
            ticked[system].append(answer.issues)
    return {
        system: {issue: share(sum(issue in ticks for ticks in of), len(of)) for issue in issues}
        for system, of in ticked.items()
        if of
    }


def _reliability(ratings: Sequence[Rating], said: object, values: Sequence[str]) -> list[Reliability]:
    votes: dict[str, dict[str, str]] = defaultdict(dict)
    seconds: dict[str, list[float]] = defaultdict(list)
    assert callable(said)
    for rating in ratings:
        votes[rating.annotator].update(said(rating))
        if rating.seconds is not None:
            seconds[rating.annotator].append(rating.seconds)
    return reliability(votes, values, seconds)


def _safety(
    by_item: Mapping[str, list[Rating]], items: Mapping[str, Item], dialogues: Sequence[Dialogue]
) -> list[Labelled]:
    """As the paper's table: crowdsourced prompts and red-team dialogues, each label's share and number."""
    decided: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item, given in by_item.items():
        if len(items[item].systems) == 1:
            voted = majority([_label(rating) for rating in given]) or "unsure"
            decided["prompts", items[item].systems[0]].append(voted)
    for dialogue in dialogues:
        decided["red-team dialogues", dialogue.system].append(dialogue.label or "unsure")
    return [
        Labelled(what, system, {label: share(labels.count(label), len(labels)) for label in LABELS})
        for (what, system), labels in sorted(decided.items())
    ]


def _harms(dialogues: Sequence[Dialogue]) -> dict[str, dict[str, int]]:
    counted: dict[str, dict[str, int]] = {}
    for dialogue in dialogues:
        of = counted.setdefault(dialogue.harm or "none named", dict.fromkeys(LABELS, 0))
        of[dialogue.label or "unsure"] += 1
    return dict(sorted(counted.items()))
