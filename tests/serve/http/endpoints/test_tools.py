"""Tools through the official `openai` client. The model is random: that a call fits its schema was not its idea."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from .conftest import FREE

DIGIT = {
    "name": "digit",
    "description": "Draws a digit.",
    "parameters": {
        "type": "object",
        "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 9}, "style": {"enum": ["bold", "<thin>"]}},
        "required": ["value", "style"],
        "additionalProperties": False,
    },
    "strict": True,
}
NOW = {"name": "now"}
TOOLS: Any = [{"type": "function", "function": DIGIT}, {"type": "function", "function": NOW}]
FLAT: Any = [{"type": "function", **DIGIT}, {"type": "function", **NOW}]
ASK: Any = [{"role": "user", "content": "Draw a seven."}]


@pytest.fixture(scope="module")
def tools_client(roomy_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{roomy_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: OpenAI, **fields: Any) -> Any:
    asked = {"messages": ASK, "tools": TOOLS, "max_tokens": 300, **FREE}
    return client.chat.completions.create(model="tiny", **(asked | fields))


def require_call(name: str, arguments: str) -> None:
    found = json.loads(arguments)
    if name == "digit":
        assert set(found) == {"value", "style"}
        assert found["value"] in range(10)
        assert found["style"] in ("bold", "<thin>")
    else:
        assert (name, found) == ("now", {})


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_is_required_comes_whole_and_streamed(tools_client: OpenAI, seed: int) -> None:
    fields: Any = {"tool_choice": "required", "seed": seed}
    [choice] = ask(tools_client, **fields).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.type == "function"
        require_call(call.function.name, call.function.arguments)
    assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)
    with tools_client.chat.completions.stream(
        model="tiny", messages=ASK, tools=TOOLS, max_tokens=300, **fields, **FREE
    ) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [call.function.arguments for call in streamed.message.tool_calls or ()] == [
        call.function.arguments for call in choice.message.tool_calls
    ]
    [single] = ask(tools_client, **fields, parallel_tool_calls=False).choices
    assert len(single.message.tool_calls) == 1


def test_chunks_of_calls_are_those_that_clients_put_together(tools_client: OpenAI) -> None:
    chunks = [chunk.choices[0] for chunk in ask(tools_client, tool_choice="required", seed=1, stream=True)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    begun = [delta for delta in deltas if delta.id]
    assert [delta.index for delta in begun] == list(range(len(begun)))
    assert all(delta.type == "function" and delta.function.name for delta in begun)
    assert all(delta.function.name is None and delta.type is None for delta in deltas if not delta.id)
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("seed", range(2))
def test_a_named_tool_is_called_once(tools_client: OpenAI, seed: int) -> None:
    named = {"type": "function", "function": {"name": "digit"}}
    [choice] = ask(tools_client, tool_choice=named, seed=seed).choices
    [call] = choice.message.tool_calls
    assert call.function.name == "digit"
    require_call("digit", call.function.arguments)


def test_what_a_call_returned_is_answered(tools_client: OpenAI) -> None:
    """The loop that every client has: the message goes back as it came, with a result for each call."""
    message = ask(tools_client, tool_choice="required", seed=3).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "<seven>"} for call in message.tool_calls]
    answer = ask(tools_client, messages=[*ASK, message, *results], tool_choice="none", max_tokens=5)
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.completion_tokens > 0
    also = ask(tools_client, messages=[*ASK, message, *results], tools=[], max_tokens=5)
    assert also.usage.prompt_tokens == answer.usage.prompt_tokens, "tools that it may not call are not told"


def test_where_nothing_is_called_the_answer_is_text_and_images(tools_client: OpenAI) -> None:
    for seed in range(3):
        [choice] = ask(tools_client, tool_choice="auto", seed=seed, max_tokens=30).choices
        assert choice.finish_reason in ("stop", "length")
        assert choice.message.tool_calls is None
        assert choice.message.content or choice.message.images
    drawn = ask(tools_client, tool_choice="auto", max_tokens=40, extra_body={"begin_with": "image"})
    assert drawn.choices[0].message.images


def test_a_call_that_is_cut_says_so(tools_client: OpenAI) -> None:
    [choice] = ask(tools_client, tool_choice="required", seed=0, max_tokens=40, parallel_tool_calls=False).choices
    assert choice.finish_reason in ("length", "tool_calls")
    [choice] = ask(tools_client, tool_choice="required", seed=0, max_tokens=5).choices
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "line\n"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS + TOOLS}, "tools[2].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages[1].tool_call_id"),
        ({"extra_body": {"modalities": ["image"]}}, "modalities"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(tools_client: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(tools_client, **fields)
    assert refused.value.param == param


def test_a_strict_schema_that_cannot_be_kept_is_refused(tools_client: OpenAI) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for strict in True, False:
        tools = [{"type": "function", "function": {"name": "f", "parameters": odd, "strict": strict}}]
        if strict:
            with pytest.raises(openai.BadRequestError, match="uniqueItems"):
                ask(tools_client, tools=tools)
        else:
            ask(tools_client, tools=tools, max_tokens=2)


@pytest.mark.parametrize("seed", range(2))
def test_responses_have_calls_as_items(tools_client: OpenAI, seed: int) -> None:
    fields: Any = {"model": "tiny", "tools": FLAT, "tool_choice": "required", "max_output_tokens": 300}
    body = {"seed": seed, **FREE}
    response = tools_client.responses.create(input="Draw a seven.", **fields, extra_body=body)
    assert response.status == "completed"
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls == response.output
    for call in calls:
        require_call(call.name, call.arguments)
    with tools_client.responses.stream(input="Draw a seven.", **fields, extra_body=body) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert [item.arguments for item in streamed.output if item.type == "function_call"] == [
        call.arguments for call in calls
    ]
    kinds = {event.type for event in events}
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    results: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "7"} for call in calls]
    history: Any = [{"role": "user", "content": "Draw a seven."}, *response.output, *results]
    told = tools_client.responses.create(model="tiny", input=history, max_output_tokens=5)
    assert told.status in ("completed", "incomplete")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "image_generation"}, {"type": "function", "name": "a b"}]}, "tools[1].name"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id"),
    ],
)
def test_responses_refuse_by_their_own_names(tools_client: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tools_client.responses.create(**({"model": "tiny", "input": "x"} | fields))
    assert refused.value.param == param
