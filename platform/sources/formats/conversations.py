"""Conversations as LLaVA, ShareGPT and OpenAI write them: JSON arrays or lines, with `<image>` marks.

https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from calumma.model.document import Role, Text
from calumma.platform.sources.files import (
    DraftSegment,
    File,
    Malformed,
    Reference,
    field_names,
    json_type,
    text_or_none,
)
from calumma.platform.sources.formats.rows import drafts, json_rows
from calumma.platform.sources.formats.text import SUFFIXES
from calumma.platform.sources.registry import ReaderItem, reader

IMAGE_MARK = "<image>"
SPEAKERS: dict[str, Role] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
}
SYSTEM = "system"  # its words open the user's next turn


@reader("conversations", SUFFIXES)
def conversations(file: File) -> Iterator[ReaderItem]:
    """{"conversations": [{"from": "human"|"gpt", "value": …}], "image": path} or {"messages": [{"role", "content"}],
    "images": [path or data URL, …], "captions": […]} a record.

    The k-th `<image>` mark of a conversation is its k-th image. A `content` may also be a list of OpenAI's parts.
    """
    yield from drafts(json_rows(file), _conversation)


def _conversation(row: dict[str, Any]) -> list[DraftSegment]:
    turns = next((row[key] for key in ("conversations", "messages") if key in row), None)
    if not isinstance(turns, list) or not turns:
        raise Malformed(f"has no list `conversations` or `messages`; it has {field_names(row)}")
    images = _Images(row)
    segments: list[DraftSegment] = []
    for turn in turns:
        speaker, words = _turn(turn)
        role = "user" if speaker == SYSTEM else SPEAKERS.get(speaker)
        if role is None:
            raise Malformed(f"a turn is from {speaker!r}; allowed: {', '.join([*SPEAKERS, SYSTEM])}")
        parts = _split_at_marks(words, role, images) if isinstance(words, str) else _content_parts(words, role, images)
        if speaker == SYSTEM and parts:
            parts.append(Text("\n\n", role))
        segments += parts
    if images.used != len(images.targets):
        raise Malformed(f"has {images.used} {IMAGE_MARK} marks and {len(images.targets)} images; they must agree")
    return segments


class _Images:
    """A record's images, handed out in order."""

    def __init__(self, row: dict[str, Any]) -> None:
        value = row.get("images") or row.get("image") or []
        if not isinstance(value, list | str | dict):
            raise Malformed(f"`images` is {json_type(value)}, not a list")
        self.targets = [
            _target(value, index) for index, value in enumerate(value if isinstance(value, list) else [value])
        ]
        self.captions = row.get("captions") or [None] * len(self.targets)
        if not isinstance(self.captions, list) or len(self.captions) != len(self.targets):
            raise Malformed("`captions` must be a list as long as `images`")
        self.used = 0

    def next(self, role: Role) -> list[DraftSegment]:
        """The next image; none where there are more marks than images, which `used` tells."""
        index, self.used = self.used, self.used + 1
        if index >= len(self.targets):
            return []
        return [Reference(self.targets[index], text_or_none(self.captions[index]), role)]


def _target(value: Any, index: int) -> str:
    """A path or data URL, or an object that has one."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("path", "url", "image") if isinstance(value.get(key), str)), value)
    if not isinstance(value, str):
        raise Malformed(f"image {index} is {json_type(value)}, not a path or data URL")
    return value


def _turn(turn: Any) -> tuple[str, str | list[Any]]:
    if isinstance(turn, dict):
        speaker = turn.get("from", turn.get("role"))
        words = turn.get("value", turn.get("content"))
        if isinstance(speaker, str) and isinstance(words, str | list):
            return speaker, words
    raise Malformed('a turn must be {"from": …, "value": text} or {"role": …, "content": text or parts}')


def _split_at_marks(words: str, role: Role, images: _Images) -> list[DraftSegment]:
    parts: list[DraftSegment] = []
    for index, text in enumerate(words.split(IMAGE_MARK)):
        if index:
            parts += images.next(role)
        if text:
            parts.append(Text(text, role))
    return parts


def _content_parts(content: list[Any], role: Role, images: _Images) -> list[DraftSegment]:
    """OpenAI's content parts; an image part without a target takes the next of the record's images."""
    parts: list[DraftSegment] = []
    for part in content:
        form = part.get("type") if isinstance(part, dict) else None
        if form == "text" and isinstance(part.get("text"), str):
            parts.append(Text(part["text"], role))
        elif form in ("image", "image_url"):
            value = part.get(form) or part.get("url") or part.get("path")
            parts += images.next(role) if value is None else [Reference(_target(value, len(parts)), None, role)]
        else:
            raise Malformed('a part of a turn must be {"type": "text", "text": …}, "image" or "image_url"')
    return parts
