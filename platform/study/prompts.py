"""The prompts of a study, from its specification or a JSONL file, with their images in them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from calumma.model.document import Document, Image, Role, Segment, Text, UnreadableImage
from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.study.specification import StudySpecification

FIELDS = ("id", "category", "prompt", "messages")


@dataclass(frozen=True)
class Prompt:
    """`conversation`: ends with the user's turn; its images are PNG."""

    id: str
    category: str
    conversation: Document

    @property
    def mixed_modal(self) -> bool:
        return bool(self.conversation.images)


class _Wrong(ValueError):
    """What is wrong with one prompt."""


def read_prompts(spec: StudySpecification) -> list[Prompt]:
    """All prompts. Raises SpecificationError, which names every one that cannot be used, and StorageError."""
    folder = spec.prompts.rpartition("/")[0] if isinstance(spec.prompts, str) else None
    prompts: list[Prompt] = []
    wrong: list[str] = []
    seen: set[str] = set()
    for place, record in _records(spec.prompts, wrong):
        try:
            prompt = _prompt(record, spec.categories, folder, len(prompts) + len(wrong) + 1)
            if prompt.id in seen:
                raise _Wrong(f"another prompt is called {prompt.id!r} too")
        except (_Wrong, storage.StorageError) as error:
            wrong.append(f"{place}: {error}")
            continue
        seen.add(prompt.id)
        prompts.append(prompt)
    if wrong:
        shown = [*wrong[:20], *([f"and {len(wrong) - 20} more"] if len(wrong) > 20 else [])]
        raise SpecificationError("\n".join(["prompts that cannot be used:", *(f"  {line}" for line in shown)]))
    if not prompts:
        raise SpecificationError("prompts: there are none")
    return prompts


def _records(given: str | tuple[dict[str, Any], ...], wrong: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(given, str):
        yield from ((f"prompts[{number}]", record) for number, record in enumerate(given))
        return
    try:
        lines = storage.read_bytes(given).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SpecificationError(f"{given} is not UTF-8 text: {error.reason}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            wrong.append(f"{given}: line {number}: not JSON: {error}")
            continue
        if isinstance(record, dict):
            yield f"{given}: line {number}", record
        else:
            wrong.append(f"{given}: line {number}: no JSON object")


def _prompt(record: dict[str, Any], categories: tuple[str, ...], folder: str | None, number: int) -> Prompt:
    if unknown := [name for name in record if name not in FIELDS]:
        raise _Wrong(f"unknown field {unknown[0]!r}; a prompt has {', '.join(FIELDS)}")
    identity = record.get("id", f"{number:05d}")
    category = record.get("category", "other")
    if not isinstance(identity, str | int) or not str(identity).strip():
        raise _Wrong("`id` must be a text or a number")
    if category not in categories:
        raise _Wrong(f"category {category!r} is not one of {', '.join(categories)}")
    if ("prompt" in record) == ("messages" in record):
        raise _Wrong("give either `prompt` or `messages`")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    if not isinstance(messages, list) or not messages:
        raise _Wrong("`messages` must be a list of {role, content}")
    segments = [segment for message in messages for segment in _message(message, folder)]
    if not segments or segments[-1].role != "user":
        raise _Wrong("the last turn must be the user's")
    return Prompt(storable(str(identity)), category, Document(tuple(segments)))


def _message(message: Any, folder: str | None) -> list[Segment]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant"):
        raise _Wrong(f"a message's role must be user or assistant, not {role!r}")
    return segments_of(message.get("content"), role, folder)


def segments_of(content: Any, role: Role, folder: str | None = None) -> list[Segment]:
    """A text, or OpenAI's content parts, as segments; `folder`: that images' paths are relative to, none: data URLs
    alone. Raises ValueError, StorageError."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise _Wrong("a prompt is a text, or a list of parts")
    segments: list[Segment] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if part["text"]:
                segments.append(Text(storable(part["text"]), role))
        elif kind in ("image_url", "image"):
            value = part.get(kind)
            value = value.get("url") if isinstance(value, dict) else value
            if not isinstance(value, str):
                raise _Wrong(f"the part {kind} has no URL or path")
            segments.append(Image(_png(_bytes(value, folder)), None, role))
        else:
            raise _Wrong('a part must be {"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}')
    if not any(isinstance(s, Image) or s.text.strip() for s in segments):
        raise _Wrong("the prompt is empty")
    return segments


def _bytes(value: str, folder: str | None) -> bytes:
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        try:
            return base64.b64decode(data, validate=True) if head.endswith(";base64") else unquote_to_bytes(data)
        except (ValueError, binascii.Error) as error:
            raise _Wrong(f"an image's data URL is damaged: {error}") from error
    if folder is None:
        raise _Wrong("an image must be a data URL here")
    if value.startswith(("http://", "https://")):
        raise _Wrong(f"{value} would have to be fetched; give images as files beside the prompts, or as data URLs")
    if "://" in value or value.startswith("/"):
        return storage.read_bytes(value)
    return storage.read_bytes(storage.join(folder, value) if folder else value)


def _png(data: bytes) -> bytes:
    """Decoded and encoded anew, so that what is shown is an image and nothing else."""
    try:
        return Image(Image(data).open()).png()
    except UnreadableImage as error:
        raise _Wrong(str(error)) from error


def storable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may carry and no file can."""
    return text.encode(errors="replace").decode()


def as_parts(segments: Any) -> list[dict[str, Any]]:
    """Segments as OpenAI's content parts, images as data URLs of PNG. Raises UnreadableImage."""
    return [
        {"type": "text", "text": s.text}
        if isinstance(s, Text)
        else {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(s.png()).decode()}"},
        }
        for s in segments
    ]


def as_messages(document: Document) -> list[dict[str, Any]]:
    """A conversation as OpenAI's messages."""
    return [{"role": turn.role or "user", "content": as_parts(turn.segments)} for turn in document.turns()]
