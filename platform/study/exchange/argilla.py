"""Argilla's JSON of records, as `Dataset.records.from_json` reads and `to_json` writes it, and the dataset's settings.

https://docs.argilla.io/latest/how_to_guides/import_export. Its users are UUIDs: of a name always the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid5

from calumma.model.document import Document, Text
from calumma.platform.study.exchange.sheet import LETTERS, Question, judgement_of, questions, said
from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import Rating
from calumma.platform.study.prompts import as_parts

NAMESPACE = UUID("f7a9cf0e-6c52-5f0c-9a34-0d1c9fb34a51")  # of annotators' names
PEOPLE = "annotators"  # metadata of a record: names by UUID


def settings(study: Study) -> dict[str, Any]:
    """As `rg.Settings.from_json` reads it."""
    spec = study.specification
    letters = LETTERS if spec.kind == "preference" else LETTERS[:1]
    fields = [("prompt", "Prompt"), *((f"answer_{letter}", f"Answer {letter.upper()}") for letter in letters)]
    return {
        "guidelines": spec.told,
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": spec.annotators},
        "fields": [
            {
                "name": name, "title": title, "required": True,
                "settings": {"type": "text", "use_markdown": True},
            }
            for name, title in fields
        ],
        "questions": [_question(question) for question in questions(study)],
        "vectors": [],
        "metadata": [],
    }  # fmt: skip


def _question(question: Question) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "text", "use_markdown": False}
    if question.values is not None:
        kind = "multi_label_selection" if question.several else "label_selection"
        options = [{"value": value, "text": value, "description": None} for value in question.values]
        told = {"type": kind, "options": options, "visible_options": max(3, len(options))}
    required = question.values is not None and not question.several
    return {"name": question.name, "title": question.title, "description": None, "required": required, "settings": told}


def records(study: Study, by_item: Mapping[str, Sequence[Rating]]) -> list[dict[str, Any]]:
    found = []
    for item in study.items.values():
        shown = item.shown(0)
        responses: dict[str, list[dict[str, Any]]] = {}
        for rating in by_item[item.id]:
            for name, value in said(rating, shown).items():
                responses.setdefault(name, []).append(
                    {"value": value, "user_id": str(_user(rating.annotator)), "status": "submitted"}
                )
        people = {str(_user(rating.annotator)): rating.annotator for rating in by_item[item.id]}
        found.append(
            {
                "id": item.id,
                "fields": {
                    "prompt": _markdown(study.prompts[item.prompt].conversation),
                    **{
                        f"answer_{letter}": _markdown(study.answer(name, item.prompt))
                        for letter, name in zip(LETTERS, shown, strict=False)
                    },
                },
                "metadata": {"category": item.category, PEOPLE: [f"{user} {name}" for user, name in people.items()]},
                "suggestions": {},
                "responses": responses,
                "vectors": {},
                "status": "completed" if len(people) >= study.specification.annotators else "pending",
                "_server_id": None,
            }
        )
    return found


def ratings(study: Study, given: Sequence[Mapping[str, Any]]) -> list[Rating]:
    """Of an export by Argilla. People have the names that the record's metadata gives their UUIDs, or else those.

    Raises KeyError, ValueError."""
    found = []
    for record in given:
        item = str(record["id"])
        shown = study.items[item].shown(0)
        named = (record.get("metadata") or {}).get(PEOPLE) or []
        names = dict(entry.split(" ", 1) for entry in named)
        answers: dict[str, dict[str, Any]] = {}
        for question, responses in (record.get("responses") or {}).items():
            for response in responses:
                if response.get("status") in ("draft", "discarded"):
                    continue
                answers.setdefault(str(response["user_id"]), {})[question] = response["value"]
        for user, says in answers.items():
            try:
                judgement = judgement_of(study, says)
            except ValueError as error:
                raise ValueError(f"item {item}, user {user}: {error}") from error
            found.append(Rating(item, names.get(user, user), shown, judgement))
    return found


def _user(name: str) -> UUID:
    return uuid5(NAMESPACE, name)


def _markdown(document: Document) -> str:
    pieces = []
    for turn in document.turns():
        for segment, part in zip(turn.segments, as_parts(turn.segments), strict=True):
            pieces.append(segment.text if isinstance(segment, Text) else f"![image]({part['image_url']['url']})")
    return "\n\n".join(pieces) or "(no answer)"
