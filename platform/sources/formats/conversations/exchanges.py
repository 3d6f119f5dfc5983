"""Turns out of a record, however it holds them: lists of turns, the Cauldron's pairs, Alpaca's fields, questions with
answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calumma.platform.sources.files import Malformed, field_names, json_type

LISTS = ("conversations", "messages", "conversation")
# Field of the question, of what it is about, of the answer. https://github.com/tatsu-lab/stanford_alpaca,
# ms-swift's query and response, TRL's prompt and completion.
PAIRS = (
    ("instruction", "input", ("output", "response")),
    ("query", None, ("response",)),
    ("prompt", None, ("completion", "response")),
    ("question", None, ("answer", "multiple_choice_answer", "answers", "response")),
)
FIELDS = (*LISTS, "texts", "system", "history", *(name for a, b, more in PAIRS for name in (a, b, *more) if name))


@dataclass(frozen=True)
class Exchange:
    """The turns of a record, each as its kind of data writes it. `marked`: its texts mark where images stand; those of
    the other kinds stand first."""

    turns: list[Any]
    fields: tuple[str, ...]  # of the record that they are of
    marked: bool = True


def exchange(row: Mapping[str, Any]) -> Exchange:
    """Raises Malformed where there are none."""
    lists = [field for field in LISTS if row.get(field) is not None]
    for field in [field for field in lists if row[field]] or lists:
        return Exchange(_turns(row[field], field), (field,))
    texts = row.get("texts")
    if isinstance(texts, list) and texts and all(isinstance(t, Mapping) and "assistant" in t for t in texts):
        return Exchange(
            [_said(role, pair.get(role)) for pair in texts for role in ("user", "assistant")], ("texts",), False
        )
    for question, about, answers in PAIRS:
        answer = next((name for name in answers if row.get(name) is not None), None)
        if row.get(question) is not None and answer is not None:
            if _is_turns(row[question]) and _is_turns(row[answer]):  # TRL's: a loss is taken on the completion
                return Exchange([{**turn, "weight": 0} for turn in row[question]] + row[answer], (question, answer))
            context = row.get(about) if about else None
            words = [_text(row[question], question), _text(context, about or "") if context else ""]
            turns = [_said("user", "\n\n".join(filter(None, words))), _said("assistant", _answer(row[answer], answer))]
            fields = ("history", "system", question, *([about] if about else []), answer)
            return Exchange([*_earlier(row), *turns], fields, marked=question != "question")
    raise Malformed(
        f"has no list `conversations` or `messages`, no `instruction` with `output`, no `question` with `answer`; it "
        f"has {field_names(row)}"
    )


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _turns(value: Any, field: str) -> list[Any]:
    if isinstance(value, str):  # tables keep lists as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"`{field}` is a text that is no JSON") from error
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        # Older `datasets` keep a list of objects as an object of lists.
        if len({len(column) for column in value.values()}) > 1:
            raise Malformed(f"the lists of `{field}` are not equally long")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise Malformed(f"`{field}` is {json_type(value)}{'' if value else ' without turns'}, not a list of turns")
    return value


def _earlier(row: Mapping[str, Any]) -> list[Any]:
    """The system's words, and `history`: a list of [question, answer]."""
    turns = [_said("system", row["system"])] if row.get("system") else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Malformed("`history` is no list of [question, answer]")
    return turns + [
        _said(role, words) for pair in history for role, words in zip(("user", "assistant"), pair, strict=True)
    ]


def _said(role: str, words: Any) -> dict[str, Any]:
    return {"role": role, "content": words}


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"`{field}` is {json_type(value)}, not a text")
    return value


def _answer(value: Any, field: str) -> str:
    """Of several answers that which most gave, the first of equals."""
    if isinstance(value, list):
        given = [a.get("answer") if isinstance(a, Mapping) else a for a in value]
        texts = [answer for answer in given if isinstance(answer, str)]
        if texts and len(texts) == len(given):
            return Counter(texts).most_common(1)[0][0]
    return _text(value, field)
