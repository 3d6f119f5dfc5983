"""Preferences: a question with the answer that is wanted and one that is not, as TRL and LLaMA-Factory have them.

https://huggingface.co/docs/trl/dataset_formats#preference: {"prompt", "chosen", "rejected"} as texts or lists of turns,
or the two answers as whole conversations, whose common beginning is the prompt.
https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html: {"conversations", "chosen":
{"from", "value"}, "rejected": {…}}, or {"instruction", "input", "chosen", "rejected"}. And ms-swift's {"messages",
"rejected_response"}.

Answers may have images, too: `images` are those of the marks of the prompt, then of the chosen answer, then of the
rejected one; a part of a turn may bring its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calumma.model.document import Document, without_layout
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, Draft, File, Malformed, field_names, json_type
from calumma.platform.sources.formats.conversations.exchanges import LISTS
from calumma.platform.sources.formats.conversations.marks import Form, Mark, Marks
from calumma.platform.sources.formats.conversations.reader import conversation_segments
from calumma.platform.sources.formats.conversations.turns import IMAGE_FIELDS, SPEAKERS
from calumma.platform.sources.formats.records.containers import list_in, records
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import list_source
from calumma.platform.sources.references import resolve_references

CHOSEN, REJECTED = "chosen", "rejected"
PROMPTS = ("prompt", "question", "instruction", "query")
ABOUT = ("system", "system_prompt", "history", "tools", "captions", "license", "url")
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in their last answer alone, on which the losses are taken."""

    chosen: Document
    rejected: Document
    name: str


def read_pairs(
    location: str, images: str | None = None, mark: Form = "<image>", notes: Notes | None = None
) -> Iterator[Pair | BadInput]:
    """The pairs of all files at a location. images: the folder that their paths are below, by default each file's own.
    Raises StorageError, SpecificationError."""
    notes = Notes() if notes is None else notes
    files, _ = list_source("conversations", location)
    for uri in files:
        with storage.open_read(uri) as raw:
            base = images or (uri.rpartition("/")[0] if "/" in uri else ".")
            file = File(uri, raw, base, notes)
            items = resolve_references(_drafts(file, Marks(mark)), "preferences", base, notes)
            for chosen, rejected in zip(items, items, strict=True):
                bad = next((item for item in (chosen, rejected) if isinstance(item, BadInput)), None)
                if isinstance(chosen, Document) and isinstance(rejected, Document):
                    name = chosen.metadata.get("name", uri)
                    yield _checked(Pair(_without_layout(chosen), _without_layout(rejected), name))
                elif bad is not None:
                    yield bad


def is_preference(row: Mapping[str, Any]) -> bool:
    """Whether a record is one of preferences."""
    return (CHOSEN in row and REJECTED in row) or "rejected_response" in row


def _without_layout(document: Document) -> Document:
    """As curation leaves documents, and serving prompts."""
    return replace(document, segments=without_layout(document.segments))


def _checked(pair: Pair) -> Pair | BadInput:
    if pair.chosen.to_row()["segments"] == pair.rejected.to_row()["segments"]:
        return BadInput(pair.name, "the chosen and the rejected answer are equal")
    return pair


def _drafts(file: File, marks: Marks) -> Iterator[Draft | BadInput]:
    """Two for every record: the chosen one, then the rejected one; of a bad record, twice why."""
    for row in records(file):
        if isinstance(row, BadInput):
            yield from (row, row)
            continue
        name, record = row
        try:
            both = [
                Draft.from_record(conversation_segments(made, marks, False, file.notes), name, record)
                for made in conversations_of(record, marks)
            ]
        except Malformed as error:
            yield from (BadInput(name, str(error)), BadInput(name, str(error)))
        else:
            yield from both


def conversations_of(row: Mapping[str, Any], marks: Marks) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record as two records of conversations, with no loss on what stands before the answers. Raises Malformed."""
    prompt, chosen, rejected = _parts(row)
    if not prompt or _role(prompt[-1]) != "user":
        raise Malformed("the prompt does not end with a question of the user")
    for what, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
        if not answer or any(_role(turn) != "assistant" for turn in answer[-1:]):
            raise Malformed(f"`{what}` is no answer of the assistant")
    counts = [sum(_marked(turn, marks) for turn in part) for part in (prompt, chosen, rejected)]
    given = _images(row)
    if given and len(given) != sum(counts):
        raise Malformed(
            f"has {len(given)} images, and {counts[0]} {marks.form} marks in the prompt, {counts[1]} in the chosen "
            f"answer and {counts[2]} in the rejected one; they must agree"
        )
    before, after = given[: counts[0] + counts[1]], given[: counts[0]] + given[counts[0] + counts[1] :]
    about = {name: row[name] for name in ABOUT if row.get(name)}
    earlier = [{**turn, "weight": 0} if _role(turn) == "assistant" else turn for turn in prompt]

    def record(answer: Turns, images: list[Any]) -> dict[str, Any]:
        return {**about, "messages": [*earlier, *answer], **({"images": images} if images else {})}

    return record(chosen, before), record(rejected, after)


def _parts(row: Mapping[str, Any]) -> tuple[Turns, Turns, Turns]:
    """Prompt, chosen answer and rejected one, as turns."""
    if "rejected_response" in row:
        turns = _turns(row.get("messages"), "messages")
        return turns[:-1], turns[-1:], [{"role": "assistant", "content": row["rejected_response"]}]
    if not is_preference(row):
        raise Malformed(f"has no `{CHOSEN}` and `{REJECTED}`; it has {field_names(row)}")
    chosen, rejected = (_answer(row[name], name) for name in (CHOSEN, REJECTED))
    listed = next((name for name in LISTS if row.get(name)), None)
    if listed is not None:
        return _turns(row[listed], listed), chosen, rejected
    asked = next((name for name in PROMPTS if row.get(name)), None)
    if asked is None:  # whole conversations: what they share is the prompt
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if not shared:
            raise Malformed(f"has no prompt: `{CHOSEN}` and `{REJECTED}` begin with different turns")
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(row[asked], list):
        return _turns(row[asked], asked), chosen, rejected
    words = [row[asked], row.get("input") if asked == "instruction" else None]
    if not all(isinstance(each, str) for each in words if each):
        raise Malformed(f"`{asked}` is {json_type(row[asked])}, not a text or a list of turns")
    return [{"role": "user", "content": "\n\n".join(each for each in words if each)}], chosen, rejected


def _answer(value: Any, name: str) -> Turns:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return [dict(value)] if isinstance(value, Mapping) else _turns(value, name)


def _turns(value: Any, name: str) -> Turns:
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise Malformed(f"`{name}` is {json_type(value)}, not a list of turns")
    return [dict(turn) for turn in value]


def _role(turn: Mapping[str, Any]) -> str | None:
    speaker = turn.get("from", turn.get("role"))
    return SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None


def _images(row: Mapping[str, Any]) -> list[Any]:
    given: Any = next((list_in(row[field]) for field in IMAGE_FIELDS if row.get(field)), [])
    return given if isinstance(given, list) else [given]


def _marked(turn: Mapping[str, Any], marks: Marks) -> int:
    """Marks of a turn that take one of the record's images."""
    if any(turn.get(field) for field in IMAGE_FIELDS):
        return 0  # it brings its own
    words: Any = next((turn[field] for field in ("value", "content", "text") if turn.get(field) is not None), "")
    if isinstance(words, str):
        return sum(isinstance(part, Mark) for part in marks.split(words))
    return sum(_marked_part(part, marks) for part in words) if isinstance(words, Iterable) else 0


def _marked_part(part: Any, marks: Marks) -> int:
    if not isinstance(part, Mapping):
        return 0
    if isinstance(part.get("text"), str):
        return _marked({"content": part["text"]}, marks)
    targets: Sequence[str] = ("image", "image_url", "url", "path", "source")
    return int(part.get("type") in ("image", "image_url", "input_image") and not any(part.get(key) for key in targets))
