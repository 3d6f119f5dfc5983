"""Preferences as pairs for training by DPO: JSON lines of `prompt`, `chosen` and `rejected`, each a list of messages,
as TRL's conversational preference data has them, with pictures as content parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import Rating
from calumma.platform.study.prompts import as_messages, as_parts
from calumma.platform.study.statistics.votes import majority


def pairs(study: Study, by_item: Mapping[str, Sequence[Rating]]) -> tuple[list[dict[str, Any]], int]:
    """A pair of each item whose judges prefer one answer by majority; and how many judged items have no winner."""
    found, ties = [], 0
    for item in study.items.values():
        votes = [rating.preferred or "" for rating in by_item[item.id]]
        if not votes or len(item.systems) != 2:
            continue
        winner = majority(votes)
        if not winner:
            ties += 1
            continue
        loser = next(name for name in item.systems if name != winner)
        found.append(
            {
                "prompt": as_messages(study.prompts[item.prompt].conversation),
                "chosen": [_answer(study, winner, item.prompt)],
                "rejected": [_answer(study, loser, item.prompt)],
                "category": item.category,
                "votes": {"chosen": votes.count(winner), "rejected": votes.count(loser), "same": votes.count("")},
            }
        )
    return found, ties


def _answer(study: Study, system: str, prompt: str) -> dict[str, Any]:
    return {"role": "assistant", "content": as_parts(study.answer(system, prompt).segments)}
