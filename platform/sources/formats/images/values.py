"""An image as records hold it: bytes, Hugging Face's {bytes, path}, a path, or a data URL."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any, Literal

from calumma.model.document import Image, Role
from calumma.model.images import is_no_image
from calumma.platform.sources.files import DraftSegment, Malformed, Reference, json_type

OtherImages = Literal["bad", "leave_out"]
# How PNG, JPEG, GIF and WebP begin in base64, which some write without a data URL's head.
BASE64 = re.compile("iVBORw0KGgo|/9j/|R0lGOD|UklGR")
SHORTEST = 64  # characters of an image in base64
PATHS = ("path", "url", "image", "image_url", "file_name", "filename")


def is_missing(value: Any) -> bool:
    """Whether a value holds no image at all: null, empty, or {bytes: null, path: null}."""
    if isinstance(value, Mapping):
        return all(is_missing(value.get(key)) for key in ("bytes", *PATHS))
    return value is None or (isinstance(value, bytes | str) and not value)


def cannot_be_had(value: Any) -> bool:
    """Whether a value holds no image: nothing, or bytes that are none, such as a page that a download got instead."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return is_missing(value) or (isinstance(data, bytes) and is_no_image(data))


def image_segment(
    value: Any, what: str, caption: str | None = None, role: Role | None = None, optional: bool = False
) -> DraftSegment:
    """The segment of an image; `what`: its name in a message; `optional`: left out where it cannot be had.

    Raises Malformed for what is no image."""
    if is_missing(value):
        raise Malformed(f"{what} is empty")
    if isinstance(value, Mapping):
        found = value.get("bytes") or next((value[key] for key in PATHS if value.get(key)), None)
        if isinstance(found, Mapping):  # OpenAI's {"image_url": {"url": …}}
            found = found.get("url")
        value = found
    if isinstance(value, bytes):
        return Image(value, caption, role)
    if isinstance(value, str):
        if BASE64.match(value) and (data := _decoded(value)) is not None:
            return Image(data, caption, role)
        return Reference(value, caption, role, optional)
    raise Malformed(f"{what} is {json_type(value)}, neither bytes, nor a path or data URL")


def _decoded(value: str) -> bytes | None:
    """The bytes of an image in base64; None for what is a path."""
    if len(value) < SHORTEST:
        return None
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (ValueError, binascii.Error):
        return None
