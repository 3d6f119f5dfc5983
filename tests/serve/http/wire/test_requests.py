"""What a request may hold: OpenAI's fields that are taken, refused or ignored, and errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from calumma.serve.http.wire.errors import APIError, describe_errors
from calumma.serve.http.wire.requests import ChatRequest, ImageRequest


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": list(messages), **fields})


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    assert chat(user("x"), max_tokens=5, max_completion_tokens=7).limit == 7
    assert chat(user("x"), max_tokens=5).limit == 5
    assert chat(user("x")).limit is None


@pytest.mark.parametrize(
    "fields",
    [{"tools": [{}]}, {"logit_bias": {"5": 1}}, {"response_format": {"type": "json_object"}}],
)
def test_openai_fields_that_would_change_the_answer_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(APIError, match="leave it out") as error:
        chat(user("x"), **fields)
    assert error.value.body["error"]["param"] == next(iter(fields))


def test_openai_fields_without_effect_are_taken() -> None:
    chat(user("x"), n=1, stop=None, tools=[], logprobs=False, response_format={"type": "text"}, store=True)


def test_several_images_may_be_asked_for_at_once() -> None:
    assert ImageRequest.model_validate({"prompt": "a seven", "n": 4}).n == 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}])]}, "messages[0].content[0].image_url.url"),
        ({"messages": [user([{"type": "video"}])]}, "messages[0].content[0]"),
        ({"messages": [user("x")], "stream_options": {"include_usage": "often"}}, "stream_options.include_usage"),
    ],
)
def test_validation_errors_name_the_field_as_the_client_knows_it(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate(body)
    message, named = describe_errors(error.value.errors())
    assert named == param
    assert param in message
