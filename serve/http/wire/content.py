"""Parts of messages that requests and responses share."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class WireModel(BaseModel):
    model_config = ConfigDict(extra="ignore")


class ImageURL(WireModel):
    url: str


def _as_image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class TextPart(WireModel):
    type: Literal["text"] = "text"
    text: str


class ImagePart(WireModel):
    type: Literal["image_url"] = "image_url"
    image_url: Annotated[ImageURL, BeforeValidator(_as_image_url)]


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
CONTENT_PART_TYPES = ("text", "image_url")


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def image_part(png: bytes) -> ImagePart:
    """A PNG as a content part with a data URL."""
    return ImagePart(image_url=ImageURL(url=data_url(png)))
