"""OpenAI's own helper that puts a stream together, `client.chat.completions.stream`, against answers with images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel

from calumma.serve.http.app import create_app
from calumma.serve.protocol import ContentFiltered, ImageOutput, ImageProgress, TextDelta, TokenCount
from calumma.serve.settings import ServeSettings

from ...conftest import StubBackend, answered, listening

ASK: Any = [{"role": "user", "content": "Draw a three."}]


@pytest.fixture(scope="module")
def stub(settings: ServeSettings, png: bytes) -> Iterator[tuple[StubBackend, OpenAI]]:
    interleaved = answered(
        TextDelta("three"), ImageProgress(1, 2), ImageOutput(png), TextDelta(" and four"), ImageOutput(png[:-1])
    )
    backend = StubBackend(*interleaved)
    with listening(create_app(backend, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield backend, client


def test_the_helper_puts_an_interleaved_answer_together(stub: tuple[StubBackend, OpenAI]) -> None:
    with stub[1].chat.completions.stream(model="tiny", messages=ASK, n=2) as stream:
        kinds = {event.type for event in stream}
        completion = stream.get_final_completion()
    assert "content.delta" in kinds
    for choice in completion.choices:
        assert choice.message.content == "three and four"
        images = choice.message.model_extra["images"]  # type: ignore[index]
        assert [image["index"] for image in images] == [0, 1]
        assert images[0]["image_url"]["url"] != images[1]["image_url"]["url"]
        assert all(image["image_url"]["url"].startswith("data:image/png;base64,") for image in images)
        assert all(image["type"] == "image_url" for image in images)


def test_the_loop_of_a_chat_that_sends_the_message_back(stub: tuple[StubBackend, OpenAI]) -> None:
    """As OpenAI's guides write it: the answer's message is appended as it came."""
    backend, client = stub
    message = client.chat.completions.create(model="tiny", messages=ASK).choices[0].message
    client.chat.completions.create(model="tiny", messages=[*ASK, message, {"role": "user", "content": "And?"}])
    *_, answer, _ = backend.requests[-1].prompt.turns()  # type: ignore[union-attr]
    assert len(answer.segments) == 4
    dumped: Any = message.model_dump()
    client.chat.completions.create(model="tiny", messages=[*ASK, dumped, {"role": "user", "content": "And?"}])
    assert list(backend.requests[-1].prompt.turns())[1] == answer  # type: ignore[union-attr]


def test_the_helper_parses_what_a_schema_asks_for(settings: ServeSettings) -> None:
    class Digit(BaseModel):
        digit: int

    backend = StubBackend(*answered(TextDelta('{"digit":'), TextDelta(" 7}")))
    with listening(create_app(backend, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        with client.chat.completions.stream(model="tiny", messages=ASK, response_format=Digit) as stream:
            parsed = stream.get_final_completion().choices[0].message.parsed
        whole = client.chat.completions.parse(model="tiny", messages=ASK, response_format=Digit)
    assert parsed == whole.choices[0].message.parsed == Digit(digit=7)
    for request in backend.requests:
        assert request.params.constraint is not None
        assert request.params.constraint.kind == "json_schema"
        assert '"digit"' in request.params.constraint.value


def test_the_helper_reads_a_refusal(settings: ServeSettings) -> None:
    backend = StubBackend(*answered()[:1], ContentFiltered("No.", TokenCount()))
    with (
        listening(create_app(backend, settings)) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none") as client,
        client.chat.completions.stream(model="tiny", messages=ASK) as stream,
    ):
        kinds = [event.type for event in stream]
        snapshot = stream.current_completion_snapshot.choices[0]
    assert "refusal.delta" in kinds
    assert snapshot.message.refusal == "No."
