"""What a request may hold: OpenAI's fields that are taken, refused or ignored, and errors that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from calumma.model.generation.constraint import Constraint
from calumma.serve.http.wire.constraints import NamedSchema, ResponseFormat, StructuredOutputs
from calumma.serve.http.wire.content import RequestModel, TextPart
from calumma.serve.http.wire.errors import APIError, describe_errors
from calumma.serve.http.wire.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ImageRequest,
    Message,
    StreamOptions,
    TokenizeRequest,
)
from calumma.serve.http.wire.support import UNSUPPORTED_FIELDS


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": list(messages), **fields})


def test_max_completion_tokens_goes_before_max_tokens() -> None:
    assert chat(user("x"), max_tokens=5, max_completion_tokens=7).limit == 7
    assert chat(user("x"), max_tokens=5).limit == 5
    assert chat(user("x")).limit is None


# Every optional field of every endpoint, by the types themselves: what is added is tested too.
REQUESTS: dict[type[RequestModel], dict[str, Any]] = {
    ChatRequest: {"messages": [user("x")]},
    CompletionRequest: {"prompt": "x"},
    ImageRequest: {"prompt": "x"},
    TokenizeRequest: {"prompt": "x"},
    DetokenizeRequest: {"tokens": [1]},
    Message: {"role": "user"},
    StreamOptions: {},
    ResponseFormat: {"type": "text"},
    NamedSchema: {},
    StructuredOutputs: {},
}


@pytest.mark.parametrize("model", REQUESTS)
def test_null_in_an_optional_field_is_its_absence(model: type[RequestModel]) -> None:
    plain = model.model_validate(REQUESTS[model])
    optional = {field.alias or name for name, field in model.model_fields.items() if not field.is_required()}
    assert model.model_validate(REQUESTS[model] | dict.fromkeys(optional)) == plain
    for name in optional:
        assert model.model_validate(REQUESTS[model] | {name: None}) == plain, name


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, ImageRequest])
def test_null_in_a_field_that_is_not_supported_is_its_absence(model: type[RequestModel]) -> None:
    others = set(UNSUPPORTED_FIELDS) - set(model.model_fields)
    asked = model.model_validate(
        REQUESTS[model] | dict.fromkeys([*others, "unknown"]) | {"reasoning": {"effort": None}}
    )
    assert asked.headers == {}


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, ImageRequest])
def test_fields_that_would_change_the_answer_are_refused_by_name(model: type[RequestModel]) -> None:
    others = set(UNSUPPORTED_FIELDS) - set(model.model_fields)
    assert len(others) > 30
    for name in others:
        for value in ("something", 7.25, ["x"], {"x": 1}):
            with pytest.raises(APIError, match=f"has no `{name}`; leave it out") as error:
                model.model_validate(REQUESTS[model] | {name: value})
            assert error.value.body["error"]["param"] == name
            assert error.value.status == 400
        for harmless in UNSUPPORTED_FIELDS[name]:
            model.model_validate(REQUESTS[model] | {name: harmless})


@pytest.mark.parametrize(("name", "value"), [("use_beam_search", 0), ("length_penalty", True), ("background", 0)])
def test_true_is_not_one(name: str, value: Any) -> None:
    with pytest.raises(APIError, match=name):
        ImageRequest.model_validate({"prompt": "x", name: value})


def test_fields_without_effect_are_taken_without_a_word() -> None:
    asked = chat(
        user("x"), n=1, stop=None, tools=[], logprobs=False, response_format={"type": "text"}, store=True, user="me",
        metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True, length_penalty=1.0,
        reasoning={"effort": "none"},
    )  # fmt: skip
    assert asked.headers == {}


def test_fields_that_nobody_knows_are_named_in_a_warning() -> None:
    asked = chat(user("x"), temprature=0, **{"x\r\nSet-Cookie: a": 1, "Größe": 2, "x" * 200: 3})
    [(name, text)] = asked.headers.items()
    assert name == "Warning"
    assert "temprature" in text
    assert "\n" not in text
    assert len(text) < 250
    text.encode("ascii")
    many = chat(user("x"), **{f"field{number:02}": 1 for number in range(30)}).headers["Warning"]
    assert "field09 and 20 more" in many


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_is_as_many_as_n(n: int) -> None:
    assert CompletionRequest.model_validate({"prompt": "x", "n": n, "best_of": n}).n == n
    with pytest.raises(APIError, match=f"best_of must be {n}") as error:
        CompletionRequest.model_validate({"prompt": "x", "n": n, "best_of": n + 1})
    assert error.value.body["error"]["param"] == "best_of"


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_is_any_integer_of_64_bits(seed: int) -> None:
    assert chat(user("x"), seed=seed).seed == seed


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 10**30, 1.5])
def test_other_seeds_are_refused_by_name(seed: float) -> None:
    with pytest.raises(ValidationError) as error:
        chat(user("x"), seed=seed)
    assert describe_errors(error.value.errors(), {"seed": seed})[1] == "seed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": "often"}, "frequency_penalty"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as error:
        chat(user("x"), **fields)
    assert (describe_errors(error.value.errors(), fields)[1] or "").startswith(param)


def test_min_tokens_fit_under_max_tokens() -> None:
    chat(user("x"), min_tokens=5, max_tokens=5)
    with pytest.raises(APIError, match="min_tokens 6"):
        chat(user("x"), min_tokens=6, max_tokens=5)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, Constraint("json")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
                }
            },
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Constraint("json_schema", json.dumps(SCHEMA))),
        ({"guided_json": SCHEMA}, Constraint("json_schema", json.dumps(SCHEMA))),
        ({"guided_json": json.dumps(SCHEMA)}, Constraint("json_schema", json.dumps(SCHEMA))),
        ({"guided_regex": "a+"}, Constraint("regex", "a+")),
        ({"guided_choice": ["yes", "no"]}, Constraint("choice", '["yes", "no"]')),
        ({"guided_grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes"]}}, Constraint("choice", '["yes"]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Constraint("grammar", 'start: "a"')),
        ({"structured_outputs": {"json_object": True}}, Constraint("json")),
        ({"response_format": {"type": "text"}, "structured_outputs": {}}, None),
    ],
)
def test_every_spelling_of_a_grammar(fields: dict[str, Any], constraint: Constraint | None) -> None:
    assert chat(user("x"), **fields).constraint == constraint
    assert CompletionRequest.model_validate({"prompt": "x", **fields}).constraint == constraint


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "modalities": ["image"]}, "modalities"),
    ],
)
def test_grammars_that_are_none_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(APIError) as error:
        chat(user("x"), **fields)
    assert error.value.body["error"]["param"] == param


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
        ({"messages": [user("x")], "tool_choice": "any"}, "tool_choice"),
        ({"messages": [user("x")], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"messages": [user("x")], "guided_json": 5}, "guided_json"),
        ({"messages": [user("x")], "logit_bias": {"abc": 1}}, "logit_bias.abc"),
        ({"messages": [user("x")], "response_format": {"type": "text", "regex": "a"}}, "response_format.regex"),
        ({"messages": [user("x")], "structured_outputs": {"ebnf": "a"}}, "structured_outputs.ebnf"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
    ],
)
def test_validation_errors_name_the_field_as_the_client_knows_it(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate(body)
    message, named = describe_errors(error.value.errors(), body)
    assert named == param
    assert param in message


@pytest.mark.parametrize("prompt", [5, [], [[]], [1, "a"], ["a", None], {"a": 1}])
def test_an_error_of_a_union_names_the_field_and_none_of_its_members(prompt: Any) -> None:
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"prompt": prompt})
    message, named = describe_errors(error.value.errors(), {"prompt": prompt})
    assert named == "prompt"
    parts = message.split("; ")
    assert all(part.startswith("prompt") and "list[" not in part.partition(":")[0] for part in parts)
    assert len(parts) == len(set(parts))


def test_a_refusal_that_stands_for_the_content_is_its_text() -> None:
    message = Message.model_validate({"role": "assistant", "content": None, "refusal": "I will not."})
    assert [part.text for part in message.body if isinstance(part, TextPart)] == ["I will not."]
