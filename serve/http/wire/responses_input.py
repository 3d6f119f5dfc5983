"""What a request of OpenAI's Responses API may hold: messages, and the items of earlier answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from calumma.serve.http.wire.content import RequestModel


class InputText(RequestModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputRefusal(RequestModel):
    type: Literal["refusal"]
    refusal: str


class InputImage(RequestModel):
    """`image_url`: a data URL, or one that the server may fetch."""

    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None


InputPart = Annotated[InputText | InputImage | InputRefusal, Field(discriminator="type")]


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class InputMessage(RequestModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[InputPart] | None, BeforeValidator(_as_parts)] = None


class ImageCall(RequestModel):
    """An image of an earlier answer. `result`: the file as base64."""

    type: Literal["image_generation_call"]
    id: str | None = None
    status: str | None = None
    result: str | None = None


class FunctionCall(RequestModel):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = "{}"


class FunctionOutput(RequestModel):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[list[InputPart] | None, BeforeValidator(_as_parts)] = None


class Reasoning(RequestModel):
    """Of another model's answer: left out."""

    type: Literal["reasoning"]


def _with_type(value: Any) -> Any:
    """`type` may be left out of a message."""
    if isinstance(value, dict) and value.get("type") is None:
        return {**value, "type": "message"}
    return value


InputItem = Annotated[
    Annotated[
        InputMessage | ImageCall | FunctionCall | FunctionOutput | Reasoning,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_type),
]


def as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value
