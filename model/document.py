"""Documents: ordered text and image segments, the form of all data before tokens and after sampling.

A plain document is a page or an image-caption pair. A conversation is a document whose segments carry a role;
consecutive segments of one role are one turn. Of the assistant's, those that are not `trained` are only read: no loss
is taken on them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import groupby
from typing import Any, Literal

from PIL import Image as PILImage

from calumma.model.images import DecodedImage, decode, rgb
from calumma.model.images import UnreadableImage as UnreadableImage

Role = Literal["user", "assistant"]
ROLES: tuple[Role, ...] = ("user", "assistant")


@dataclass(frozen=True)
class Text:
    text: str
    role: Role | None = None
    trained: bool = True


@dataclass(frozen=True)
class Image:
    """An image segment: encoded bytes (PNG, JPEG, WebP, ...) or a PIL image, with the caption or label it came with."""

    data: bytes | PILImage.Image
    caption: str | None = None
    role: Role | None = None
    trained: bool = True

    def open(self) -> PILImage.Image:
        """Decode to an upright sRGB image (`images.rgb`). Raises UnreadableImage."""
        return self.decode().image

    def decode(self, strict: bool = False) -> DecodedImage:
        """As `open`, with what of its file was damaged: what browsers forgive is forgiven, unless `strict`."""
        if isinstance(self.data, bytes):
            return decode(self.data, strict)
        try:
            return DecodedImage(rgb(self.data))
        except Exception as error:
            raise UnreadableImage(f"not a readable image: {error}") from error

    def key(self, salt: bytes = b"") -> bytes:
        """Equal for images that have the same codes: of its file, or its pixels; and of its role, by which it is padded
        or cropped (DocumentEncoder.pixels)."""
        role = b"user" if self.role == "user" else b"other"
        if isinstance(self.data, bytes):
            head, content = b"file", self.data
        else:
            head, content = f"{self.data.mode} {self.data.size}".encode(), self.data.tobytes()
            if self.data.mode == "P":
                head += bytes(self.data.getpalette() or b"")
        whole = blake2b(digest_size=16)
        for part in (len(salt).to_bytes(4, "big"), salt, role, len(head).to_bytes(4, "big"), head, content):
            whole.update(part)
        return whole.digest()

    def png(self) -> bytes:
        """The image as PNG bytes. Raises UnreadableImage."""
        if isinstance(self.data, bytes) and self.data.startswith(b"\x89PNG\r\n\x1a\n"):
            return self.data
        buffer = io.BytesIO()
        self.open().save(buffer, format="PNG")
        return buffer.getvalue()


Segment = Text | Image


@dataclass(frozen=True)
class Turn:
    role: Role | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Document:
    segments: tuple[Segment, ...]
    source: str = ""
    license: str = ""
    url: str = ""
    metadata: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def images(self) -> list[Image]:
        return [s for s in self.segments if isinstance(s, Image)]

    @property
    def text(self) -> str:
        """All text segments, joined without separator."""
        return "".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def is_conversation(self) -> bool:
        return any(s.role is not None for s in self.segments)

    def turns(self) -> Iterator[Turn]:
        """Runs of consecutive segments of one role, in order."""
        for role, segments in groupby(self.segments, key=lambda s: s.role):
            yield Turn(role, tuple(segments))

    def to_row(self) -> dict[str, Any]:
        """As a table row (see `from_row`): PIL images become PNG bytes."""
        segments: list[dict[str, Any]] = []
        for s in self.segments:
            if isinstance(s, Text):
                segments.append({"kind": "text", "text": s.text, "image": None, "caption": None, "role": s.role})
            else:
                data = s.data if isinstance(s.data, bytes) else s.png()
                segments.append({"kind": "image", "text": None, "image": data, "caption": s.caption, "role": s.role})
            if not s.trained:
                segments[-1]["trained"] = False  # absent otherwise: hardly any data has such turns
        return {"segments": segments, "source": self.source, "license": self.license, "url": self.url}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Document:
        """The inverse of `to_row`. Raises ValueError on an unknown segment kind or role."""
        segments: list[Segment] = []
        for s in row["segments"]:
            role = s.get("role")
            if role is not None and role not in ROLES:
                raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
            if s["kind"] == "text":
                segments.append(Text(s["text"], role, s.get("trained") is not False))
            elif s["kind"] == "image":
                segments.append(Image(bytes(s["image"]), s.get("caption"), role, s.get("trained") is not False))
            else:
                raise ValueError(f"segment kind {s['kind']!r} is neither text nor image")
        return cls(
            tuple(segments),
            source=row.get("source") or "",
            license=row.get("license") or "",
            url=row.get("url") or "",
        )

    def with_role(self, role: Role) -> Document:
        return replace(self, segments=tuple(replace(s, role=role) for s in self.segments))


def without_layout(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments without the white space between a text and an image of the same role, and without the texts that leaves
    empty. Training and serving both do this: else "three" and "three " before an image were two things to learn."""
    kept: list[Segment] = []
    for index, segment in enumerate(segments):
        if isinstance(segment, Text):
            text = segment.text
            before = segments[index - 1] if index else None
            after = segments[index + 1] if index + 1 < len(segments) else None
            if isinstance(before, Image) and before.role == segment.role:
                text = text.lstrip()
            if isinstance(after, Image) and after.role == segment.role:
                text = text.rstrip()
            if not text:
                continue
            segment = replace(segment, text=text)
        kept.append(segment)
    return tuple(kept)
