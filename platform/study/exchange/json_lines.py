"""A study as JSON lines: an item a line, with its prompt, its systems' answers and all judgements, as they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import Judgement, Rating
from calumma.platform.study.prompts import as_messages, as_parts


def records(study: Study, by_item: Mapping[str, Sequence[Rating]]) -> list[dict[str, Any]]:
    found = []
    for item in study.items.values():
        judged = [
            {**asdict(rating), "judgement": rating.judgement.model_dump(mode="json")} for rating in by_item[item.id]
        ]
        found.append(
            {
                "item": item.id,
                "prompt_id": item.prompt,
                "category": item.category,
                "prompt": as_messages(study.prompts[item.prompt].conversation),
                "answers": {name: as_parts(study.answer(name, item.prompt).segments) for name in item.systems},
                "ratings": judged,
            }
        )
    return found


def ratings(study: Study, lines: Sequence[Mapping[str, Any]]) -> list[Rating]:
    """Of lines like those of `records`, of which `item` and `ratings` are read. Raises KeyError, ValueError."""
    found = []
    for line in lines:
        for given in line["ratings"]:
            judgement = Judgement.model_validate(given["judgement"])
            judgement.require(study.specification.kind, study.specification.issues)
            found.append(
                Rating(
                    line["item"], given["annotator"], tuple(given["systems"]), judgement,
                    float(given.get("given_at") or 0.0), given.get("seconds"),
                )
            )  # fmt: skip
    return found
