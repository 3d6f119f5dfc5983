"""Parts of messages that requests and responses share."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class WireModel(BaseModel):
    model_config = ConfigDict(extra="ignore")


class RequestModel(WireModel):
    """null is the same as leaving a field out, but for required ones: clients send every field that they know."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        required = {
            key for name, field in cls.model_fields.items() if field.is_required() for key in (name, field.alias)
        }
        return {name: value for name, value in values.items() if value is not None or name in required}


class ImageURL(RequestModel):
    url: str


def _as_image_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class TextPart(RequestModel):
    type: Literal["text"] = "text"
    text: str


class ImagePart(RequestModel):
    type: Literal["image_url"] = "image_url"
    image_url: Annotated[ImageURL, BeforeValidator(_as_image_url)]


class RefusalPart(RequestModel):
    """What an earlier answer was declined with."""

    type: Literal["refusal"] = "refusal"
    refusal: str


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
MessagePart = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]


def data_url(png: bytes) -> str:
    return data_url_of("png", base64.b64encode(png).decode())


def data_url_of(form: str, encoded: str) -> str:
    """Of base64."""
    return f"data:image/{form};base64,{encoded}"


def image_part(png: bytes) -> ImagePart:
    """A PNG as a content part with a data URL."""
    return ImagePart(image_url=ImageURL(url=data_url(png)))
