"""Conversations as LLaVA, ShareGPT, OpenAI, Alpaca and Hugging Face's datasets write them, with marks for images.

https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from calumma.model.document import Image, Role, Text
from calumma.platform.sources.files import (
    ABOUT_FIELDS,
    DraftSegment,
    File,
    Malformed,
    Reference,
    json_type,
    text_or_none,
)
from calumma.platform.sources.formats.conversations.exchanges import FIELDS, exchange
from calumma.platform.sources.formats.conversations.marks import Form, Mark, MarkedPath, Marks, OtherMarks, has_none
from calumma.platform.sources.formats.conversations.turns import (
    IMAGE_FIELDS,
    OTHER_MEDIA,
    SYSTEM_FIELDS,
    WEIGHTS,
    Said,
    join_turns,
    plain_segments,
    read_turns,
)
from calumma.platform.sources.formats.images.values import image_segment, is_missing
from calumma.platform.sources.formats.records.containers import SUFFIXES, list_in, records
from calumma.platform.sources.formats.records.rows import drafts
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.registry import ReaderItem, reader

NOT_READ, OF_OTHER_KINDS = frozenset(OTHER_MEDIA), frozenset(FIELDS) - frozenset(SYSTEM_FIELDS)
HAVE_IMAGES = frozenset({*IMAGE_FIELDS, "captions"})
KNOWN = frozenset({*FIELDS, *SYSTEM_FIELDS, *IMAGE_FIELDS, *OTHER_MEDIA, *WEIGHTS, *ABOUT_FIELDS, "tools", "captions"})


@reader("conversations", SUFFIXES)
def conversations(
    file: File, *, mark: Form = "<image>", other_marks: OtherMarks = "bad", unmarked: Literal["bad", "first"] = "bad"
) -> Iterator[ReaderItem]:
    """{"conversations": [{"from": "human"|"gpt", "value": …}], "image": path} or {"messages": [{"role", "content"}],
    "images": [path, data URL or bytes, …], "captions": […]} a record; or Alpaca's {"instruction", "input", "output"},
    or {"question", "answer", "image"}.

    The k-th `<image>` of a conversation is its k-th image; `mark` says what stands for images instead: Lumina's
    `<|image|>`, Qwen's `<img>` (with the path in it), or numbered ones. A mark of another form makes the record bad
    (`other_marks: text` keeps it as text), and so do images without marks (`unmarked: first`: they stand first). A
    `content` may also be a list of OpenAI's parts. A turn may have images of its own.

    Words of the system, and tools, open the user's next turn; calls and results of tools stand as they do where models
    are served. Turns of one role stand a blank line apart; an exchange with an empty answer is left out. No loss is
    taken on turns, or records, of `weight: 0`, `train: false` or `loss: false`; CSV may have them too.
    """
    marks = Marks(mark, other_marks)
    yield from drafts(
        records(file, _columns),
        lambda row: conversation_segments(row, marks, unmarked == "first", file.notes),
        file,
        KNOWN,
    )


def _columns(present: list[str]) -> Sequence[str]:
    return [n for n in present if n in KNOWN]


def conversation_segments(row: dict[str, Any], marks: Marks, unmarked_first: bool, notes: Notes) -> list[DraftSegment]:
    """The segments of a record. Raises Malformed."""
    if (plain := plain_segments(row)) is not None:
        return plain
    found = exchange(row)
    if not NOT_READ.isdisjoint(row) and (media := [field for field in OTHER_MEDIA if row.get(field)]):
        raise Malformed(f"has `{media[0]}`, which is not read")
    if row.get("kto_tag") is False or (row.get("label") is False and "completion" in found.fields):
        raise Malformed("its `label` or `kto_tag` is false: the answer is one that is not wanted")
    if not OF_OTHER_KINDS.isdisjoint(row.keys() - found.fields):
        for field in FIELDS:
            if row.get(field) and field not in (*found.fields, *SYSTEM_FIELDS):
                notes.skip("fields", field)
    images = _Images(row)
    turns = [(said, _turn_segments(said, images, marks)) for said in read_turns(found.turns, row, notes)]
    if images.marks == 0 and images.segments and (unmarked_first or not found.marked):
        first = next((number for number, (said, _) in enumerate(turns) if not said.system), 0)
        turns[first] = (turns[first][0], [*images.rest(turns[first][0].role), *turns[first][1]])
    if images.marks != len(images.segments):
        advice = "; the source's options may say {unmarked: first}" if not images.marks else ""
        raise Malformed(
            f"has {images.marks} {marks.form} marks and {len(images.segments)} images; they must agree{advice}"
        )
    return join_turns(turns, notes)


def _turn_segments(said: Said, images: _Images, marks: Marks) -> list[DraftSegment]:
    """The segments of a turn. Its own images stand where its marks are, or first."""
    words = said.words
    if said.images is None:
        if isinstance(words, str) and words and has_none(words):
            return [Text(words, said.role)]
        return _split_at_marks(words, said.role, images, marks)
    own = _Images(said.images)
    segments = _split_at_marks(words, said.role, own, marks)
    if own.marks == 0:
        return [*own.rest(said.role), *segments]
    if own.marks != len(own.segments):
        raise Malformed(f"has a turn of {own.marks} {marks.form} marks and {len(own.segments)} images")
    return segments


class _Images:
    """A record's images, handed out in order, or by their number. `marks` counts what asked for one."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._given: set[int] = set()
        self.marks = 0
        self.segments: list[DraftSegment] = []
        if HAVE_IMAGES.isdisjoint(row):
            return
        given = {field: list_in(row[field]) for field in IMAGE_FIELDS if row.get(field)}
        value, *others = given.values() if given else [[]]
        if any(other not in (value, [value]) and [other] != value for other in others):
            raise Malformed(f"has different images in {', '.join(f'`{field}`' for field in given)}")
        if not isinstance(value, list | str | dict | bytes):
            raise Malformed(f"`{next(iter(given))}` is {json_type(value)}, not a list")
        values = value if isinstance(value, list) else [] if is_missing(value) else [value]
        captions = list_in(row.get("captions")) or [None] * len(values)
        if not isinstance(captions, list) or len(captions) != len(values):
            raise Malformed("`captions` must be a list as long as `images`")
        self.segments = [
            image_segment(value, f"image {index}", text_or_none(caption))
            for index, (value, caption) in enumerate(zip(values, captions, strict=True))
        ]

    def take(self, mark: Mark, role: Role) -> list[DraftSegment]:
        """The image of a mark; none where there are more marks than images, which `marks` tells."""
        index = self.marks if mark < 0 else int(mark)
        self.marks += 1
        if index in self._given:
            raise Malformed(f"image {index + 1} is marked more than once")
        self._given.add(index)
        if index >= len(self.segments):
            if mark >= 0:
                raise Malformed(f"marks image {index + 1} of {len(self.segments)}")
            return []
        return [_with_role(self.segments[index], role)]

    def rest(self, role: Role) -> list[DraftSegment]:
        """All of them."""
        self.marks = len(self.segments)
        return [_with_role(segment, role) for segment in self.segments]


def _with_role(segment: DraftSegment, role: Role) -> DraftSegment:
    assert isinstance(segment, Image | Reference)
    return replace(segment, role=role)


def _split_at_marks(words: str | list[Any], role: Role, images: _Images, marks: Marks) -> list[DraftSegment]:
    """The segments of a turn's text, or of OpenAI's content parts; an image part without a target takes the next of the
    record's images."""
    if isinstance(words, str):
        return [segment for part in marks.split(words) for segment in _marked(part, role, images)]
    segments: list[DraftSegment] = []
    for part in words:
        form = part.get("type") if isinstance(part, dict) else None
        if form in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            segments += _split_at_marks(part["text"], role, images, marks)
        elif form in ("image", "image_url", "input_image"):
            value = next(
                (part[key] for key in (form, "image", "image_url", "url", "path", "source") if part.get(key)), None
            )
            if isinstance(value, dict) and value.get("type") == "base64":  # Anthropic's
                value = f"data:{value.get('media_type')};base64,{value.get('data')}"
            if value is None:
                segments += images.take(_numbered(part), role)
            else:
                segments.append(image_segment(value, "an image part", None, role))
        else:
            raise Malformed('a part of a turn must be {"type": "text", "text": …}, "image" or "image_url"')
    return segments


def _numbered(part: Mapping[str, Any]) -> Mark:
    """Of a part {"type": "image", "index": 1} the record's second image; else its next."""
    index = part.get("index")
    return Mark(index if isinstance(index, int) and not isinstance(index, bool) and index >= 0 else -1)


def _marked(part: str | Mark | MarkedPath, role: Role, images: _Images) -> list[DraftSegment]:
    if isinstance(part, Mark):
        return images.take(part, role)
    return [Reference(part, None, role) if isinstance(part, MarkedPath) else Text(part, role)]
