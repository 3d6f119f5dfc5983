"""The Responses API with the official `openai` client, unchanged, under a real HTTP server."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import ResponseOutputMessage, ResponseOutputText
from openai.types.responses.response_output_item import ImageGenerationCall
from pydantic import BaseModel

from calumma.model.document import Text
from calumma.serve.http.app import create_app
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)
from calumma.serve.settings import ServeSettings

from ...conftest import Step, StubBackend, answered, listening, seen
from .conftest import FREE, picture


def test_a_text_is_what_chat_answers(openai_client: OpenAI) -> None:
    fields: Any = {"model": "tiny", "extra_body": {"modalities": ["text"], "seed": 3}, **FREE}
    chat = openai_client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], max_tokens=12, **fields)
    answer = openai_client.responses.create(input="Hi", max_output_tokens=12, **fields)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")
    assert answer.usage
    assert chat.usage
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens
    )  # fmt: skip
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (1.5, 1.0, 12)


def test_an_image_is_an_image_generation_call(openai_client: OpenAI) -> None:
    answer = openai_client.responses.create(model="tiny", input="Draw a three.", extra_body={"modalities": ["image"]})
    [call] = answer.output
    assert isinstance(call, ImageGenerationCall)
    assert call.status == "completed"
    assert picture(call.result or "").size == (8, 8)
    assert answer.output_text == ""


@pytest.fixture(scope="module")
def stub(settings: ServeSettings, png: bytes) -> Iterator[tuple[StubBackend, OpenAI]]:
    def script(request: GenerationRequest) -> list[Step]:
        if "short" in request.prompt.text:  # type: ignore[union-attr]
            return [Started(TokenCount(3)), TextDelta("se"), Finished("length", TokenCount(1))]
        if "bad" in request.prompt.text:  # type: ignore[union-attr]
            return [Started(TokenCount(3)), TextDelta("se"), ContentFiltered("No.", TokenCount(1))]
        if "lost" in request.prompt.text:  # type: ignore[union-attr]
            return [Started(TokenCount(3)), TextDelta("se"), RequestFailed(503, "the replica was lost")]
        progress = ImageProgress(1, 2, png if request.previews else None)
        return answered(TextDelta("thr"), TextDelta("ee"), progress, ImageOutput(png), TextDelta(" and four"))

    backend = StubBackend(script=script)
    with (
        listening(create_app(backend, settings)) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield backend, client


def test_text_and_images_keep_their_order(stub: tuple[StubBackend, OpenAI], png: bytes) -> None:
    answer = stub[1].responses.create(model="tiny", input="x", tools=[{"type": "image_generation"}])
    assert [item.type for item in answer.output] == ["message", "image_generation_call", "message"]
    assert answer.output_text == "three and four"
    assert base64.b64decode(answer.output[1].result) == png  # type: ignore[union-attr, arg-type]
    assert len({item.id for item in answer.output}) == 3


def test_a_stream_ends_with_the_answer_that_its_events_make(stub: tuple[StubBackend, OpenAI]) -> None:
    """`client.responses.stream` puts the events together, and raises where one has no place."""
    whole = stub[1].responses.create(model="tiny", input="x")
    with stub[1].responses.stream(
        model="tiny", input="x", tools=[{"type": "image_generation", "partial_images": 2}]
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.image_generation_call.partial_image") == 1
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    assert final.output_text == whole.output_text
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.usage == whole.usage
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == "three and four"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "reason", "text"), [("short", "max_output_tokens", "se"), ("bad", "content_filter", "se")]
)
def test_answers_that_are_not_whole_say_why(
    stub: tuple[StubBackend, OpenAI], asked: str, reason: str, text: str, stream: bool
) -> None:
    if stream:
        events = list(stub[1].responses.create(model="tiny", input=asked, stream=True))
        assert events[-1].type == "response.incomplete"
        answer = events[-1].response
    else:
        answer = stub[1].responses.create(model="tiny", input=asked)
    assert answer.status == "incomplete"
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == reason
    assert answer.output_text == text
    if asked == "bad":
        [refusal] = answer.output[-1].content  # type: ignore[union-attr]
        assert refusal.refusal == "No."  # type: ignore[union-attr]


def test_a_lost_replica_raises(stub: tuple[StubBackend, OpenAI]) -> None:
    with pytest.raises(openai.InternalServerError, match="was lost"):
        stub[1].responses.create(model="tiny", input="lost")
    with pytest.raises(openai.APIError, match="was lost"):
        list(stub[1].responses.create(model="tiny", input="lost", stream=True))


def test_an_answer_is_sent_back_as_it_came(stub: tuple[StubBackend, OpenAI], png: bytes) -> None:
    """The loop of OpenAI's guides: `input += response.output`."""
    backend, client = stub
    asked: Any = [{"role": "user", "content": "Draw a three."}]
    first = client.responses.create(model="tiny", input=asked, instructions="Be brief.")
    client.responses.create(
        model="tiny",
        instructions="Be brief.",
        input=[*asked, *first.output, {"role": "user", "content": [{"type": "input_text", "text": "And?"}]}],  # type: ignore[list-item]
    )
    prompt: Any = backend.requests[-1].prompt
    assert prompt.segments == (
        Text("Be brief.\nDraw a three.", "user"),
        Text("three", "assistant"),
        seen(png, "assistant"),
        Text("and four", "assistant"),
        Text("And?", "user"),
    )


def test_images_of_the_input(stub: tuple[StubBackend, OpenAI], data_url: str, png: bytes) -> None:
    backend, client = stub
    content: Any = [
        {"type": "input_text", "text": "Which?"},
        {"type": "input_image", "image_url": data_url, "detail": "auto"},
    ]
    client.responses.create(model="tiny", input=[{"role": "user", "content": content}])
    prompt: Any = backend.requests[-1].prompt
    assert prompt.segments == (Text("Which?", "user"), seen(png, "user"))


def test_a_schema_reaches_the_engine_and_its_answer_is_parsed(settings: ServeSettings) -> None:
    class Digit(BaseModel):
        digit: int

    backend = StubBackend(*answered(TextDelta('{"digit": 7}')))
    with listening(create_app(backend, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.responses.parse(model="tiny", input="x", text_format=Digit)
    assert answer.output_parsed == Digit(digit=7)
    constraint = backend.requests[0].params.constraint
    assert constraint
    assert constraint.kind == "json_schema"
    assert '"digit"' in constraint.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": "x", "tools": [{"type": "function", "name": "", "parameters": {}}]}, "tools[0].name"),
        ({"input": "x", "reasoning": {"effort": "high"}}, "reasoning"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": ""}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": ""}], "instructions": ""}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]},
            "input[0].content[0]",
        ),
        (
            {
                "instructions": "x",
                "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "cat.png"}]}],
            },
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": ""}]}, "input"),
        (
            {"input": [{"type": "image_generation_call", "result": "a"}, {"role": "user", "content": "x"}]},
            "input[0].result",
        ),
        ({"input": "x", "tool_choice": {"type": "image_generation"}, "modalities": ["text"]}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "schema": {"type": "odd"}}}}, "text.format"),
        ({"input": "x", "prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": "x", "max_tokens": 5}, "max_tokens"),
        ({"input": []}, "input"),
        ({}, "input"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(openai_client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        openai_client.post("/responses", body={"model": "tiny", **fields}, cast_to=object)
    assert (error.value.param or "").startswith(param)


def test_the_types_are_the_clients(stub: tuple[StubBackend, OpenAI]) -> None:
    message = stub[1].responses.create(model="tiny", input="x").output[0]
    assert isinstance(message, ResponseOutputMessage)
    assert isinstance(message.content[0], ResponseOutputText)
