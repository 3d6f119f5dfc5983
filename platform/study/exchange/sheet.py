"""The questions of a study as other tools ask them: each of an item's answers by its letter, every question by a name.

Answers stand in the order of the item's first seat, whoever judges; nothing names their systems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import FULFILMENTS, LABELS, PREFERENCES, Judgement, Rating

LETTERS = "ab"


@dataclass(frozen=True)
class Question:
    """`values`: that can be said; none for free text. `several`: more than one of them, or none, may be."""

    name: str
    title: str
    values: tuple[str, ...] | None
    several: bool = False
    about: str = "a"  # the answer's letter


def questions(study: Study) -> list[Question]:
    spec = study.specification
    if spec.kind == "safety":
        asked = [Question("label_a", "The answer is", LABELS)]
    else:
        asked = [Question("preference", "Which answer is better? left is A, right is B", PREFERENCES)]
        for letter in LETTERS:
            asked.append(
                Question(f"fulfils_{letter}", f"Answer {letter.upper()} does what was asked", FULFILMENTS, about=letter)
            )
            if spec.issues:
                title = f"What is wrong with answer {letter.upper()}"
                asked.append(Question(f"issues_{letter}", title, spec.issues, several=True, about=letter))
    return [*asked, Question("note", "Anything to add?", None)]


def said(rating: Rating, shown: tuple[str, ...]) -> dict[str, Any]:
    """What a judgement says to each question, were the answers shown in this order; what says nothing is left out."""
    judgement = rating.judgement
    turned = rating.systems != shown
    answers = judgement.answers[::-1] if turned else judgement.answers
    found: dict[str, Any] = {}
    if judgement.preference is not None:
        other = {"left": "right", "right": "left", "same": "same"}
        found["preference"] = other[judgement.preference] if turned else judgement.preference
    for letter, answer in zip(LETTERS, answers, strict=False):
        found |= {f"fulfils_{letter}": answer.fulfils, f"label_{letter}": answer.label}
        found[f"issues_{letter}"] = list(answer.issues)
    found["note"] = judgement.note
    return {name: value for name, value in found.items() if value}


def judgement_of(study: Study, answers: Mapping[str, Any]) -> Judgement:
    """The inverse of `said`. Raises ValueError where something that must be said is not."""
    spec = study.specification
    letters = LETTERS if spec.kind == "preference" else LETTERS[:1]
    judged = [
        {
            "fulfils": answers.get(f"fulfils_{letter}"),
            "label": answers.get(f"label_{letter}"),
            "issues": answers.get(f"issues_{letter}") or (),
        }
        for letter in letters
    ]
    given = {"preference": answers.get("preference"), "answers": judged, "note": answers.get("note") or ""}
    judgement = Judgement.model_validate(given)
    judgement.require(spec.kind, spec.issues)
    return judgement
