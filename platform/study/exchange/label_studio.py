"""Label Studio's JSON of tasks with annotations, and the labelling interface that they belong to.

https://labelstud.io/guide/task_format, https://labelstud.io/tags. Prompt and answers are HTML with their pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any
from xml.sax.saxutils import quoteattr

from calumma.model.document import Document, Text
from calumma.platform.study.exchange.sheet import LETTERS, Question, judgement_of, questions, said
from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import Rating
from calumma.platform.study.prompts import as_parts


def config(study: Study) -> str:
    """The labelling interface, as Label Studio's XML."""
    letters = LETTERS if study.specification.kind == "preference" else LETTERS[:1]
    lines = ["<View>", f"  <Header value={quoteattr(study.specification.told)}/>"]
    lines.append('  <HyperText name="prompt" value="$prompt"/>')
    for letter in letters:
        lines.append(f'  <Header value="Answer {letter.upper()}"/>')
        lines.append(f'  <HyperText name="answer_{letter}" value="$answer_{letter}"/>')
    for question in questions(study):
        lines.append(f"  <Header value={quoteattr(question.title)}/>")
        lines += [f"  {line}" for line in _control(question)]
    return "\n".join([*lines, "</View>", ""])


def _control(question: Question) -> list[str]:
    about = f'name="{question.name}" toName="{_about(question)}"'
    if question.values is None:
        return [f'<TextArea {about} rows="2" maxSubmissions="1" required="false"/>']
    required = "false" if question.several else "true"
    choice = "multiple" if question.several else "single-radio"
    choices = [f"  <Choice value={quoteattr(value)}/>" for value in question.values]
    return [f'<Choices {about} choice="{choice}" required="{required}">', *choices, "</Choices>"]


def _about(question: Question) -> str:
    return "prompt" if question.name in ("preference", "note") else f"answer_{question.about}"


def tasks(study: Study, by_item: Mapping[str, Sequence[Rating]]) -> list[dict[str, Any]]:
    asked = {question.name: question for question in questions(study)}
    found = []
    for number, item in enumerate(study.items.values(), start=1):
        shown = item.shown(0)
        data = {
            "item": item.id,
            "category": item.category,
            "prompt": _html(study.prompts[item.prompt].conversation),
            **{
                f"answer_{letter}": _html(study.answer(name, item.prompt))
                for letter, name in zip(LETTERS, shown, strict=False)
            },
        }
        annotations = [
            {
                "id": 1000 * number + place,
                "completed_by": {"email": rating.annotator},
                "result": [_region(item.id, asked[name], value) for name, value in said(rating, shown).items()],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": datetime.fromtimestamp(rating.given_at, UTC).isoformat().replace("+00:00", "Z"),
                "lead_time": rating.seconds,
            }
            for place, rating in enumerate(by_item[item.id], start=1)
        ]
        found.append({"id": number, "data": data, "annotations": annotations, "predictions": []})
    return found


def _region(item: str, question: Question, value: Any) -> dict[str, Any]:
    kind = "textarea" if question.values is None else "choices"
    inner = {"text": [value]} if question.values is None else {"choices": value if question.several else [value]}
    identity = hashlib.blake2b(f"{item} {question.name}".encode(), digest_size=5).hexdigest()
    return {
        "id": identity, "from_name": question.name, "to_name": _about(question), "type": kind, "value": inner,
    }  # fmt: skip


def ratings(study: Study, given: Sequence[Mapping[str, Any]]) -> list[Rating]:
    """Of an export by Label Studio: annotations that were not cancelled. Raises KeyError, ValueError."""
    asked = {question.name: question for question in questions(study)}
    found = []
    for task in given:
        item = task["data"]["item"]
        for annotation in task.get("annotations", task.get("completions", [])):
            if annotation.get("was_cancelled"):
                continue
            answers: dict[str, Any] = {}
            for region in annotation["result"]:
                question = asked.get(region.get("from_name", ""))
                if question is None:
                    continue
                if question.values is None:
                    answers[question.name] = "\n".join(region["value"]["text"])
                else:
                    chosen = region["value"]["choices"]
                    answers[question.name] = chosen if question.several else chosen[0]
            try:
                judgement = judgement_of(study, answers)
            except ValueError as error:
                raise ValueError(f"item {item}, annotation {annotation.get('id')}: {error}") from error
            found.append(
                Rating(
                    item, _name(annotation.get("completed_by")), study.items[item].shown(0), judgement,
                    _seconds(annotation.get("created_at")), annotation.get("lead_time"),
                )
            )  # fmt: skip
    return found


def _name(person: Any) -> str:
    """Whoever completed it: an id, or an object with an e-mail address, as the kind of export has it."""
    if isinstance(person, Mapping):
        person = person.get("email") or person.get("id")
    return f"label-studio {person}" if isinstance(person, int) or person is None else str(person)


def _seconds(moment: Any) -> float:
    return datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else 0.0


def _html(document: Document) -> str:
    """Every word escaped; Label Studio shows HTML as it is."""
    pieces = []
    for turn in document.turns():
        for segment, part in zip(turn.segments, as_parts(turn.segments), strict=True):
            if isinstance(segment, Text):
                pieces.append(f'<p style="white-space:pre-wrap">{escape(segment.text)}</p>')
            else:
                pieces.append(f'<p><img alt="image" style="max-width:100%" src="{part["image_url"]["url"]}"></p>')
    return "".join(pieces) or "<p>(no answer)</p>"
