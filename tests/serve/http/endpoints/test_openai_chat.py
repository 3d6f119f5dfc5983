"""Chat with the official `openai` client, unchanged, under a real HTTP server."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from ...conftest import CONTEXT, IMAGE_SIZE
from .conftest import FREE, picture

ASK: Any = [{"role": "user", "content": "Draw a three."}]


def text_of(openai_client: OpenAI, **fields: Any) -> str:
    answer = openai_client.chat.completions.create(
        model="tiny", messages=ASK, extra_body={"modalities": ["text"]}, max_tokens=40, **fields
    )
    return answer.choices[0].message.content or ""


def test_chat(openai_client: OpenAI) -> None:
    answer = openai_client.chat.completions.create(model="tiny", messages=ASK, seed=1, max_tokens=5)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_images_come_back_through_the_client(openai_client: OpenAI) -> None:
    answer = openai_client.chat.completions.create(model="tiny", messages=ASK, extra_body={"modalities": ["image"]})
    [image] = answer.choices[0].message.model_extra["images"]  # type: ignore[index]
    assert picture(image["image_url"]["url"].partition(",")[2]).size == (IMAGE_SIZE, IMAGE_SIZE)


def test_a_stream_is_the_whole_answer_piece_by_piece(openai_client: OpenAI) -> None:
    whole = text_of(openai_client, seed=3, **FREE)
    stream = openai_client.chat.completions.create(
        model="tiny",
        messages=ASK,
        stream=True,
        seed=3,
        max_tokens=40,
        stream_options={"include_usage": True},
        extra_body={"modalities": ["text"]},
        **FREE,
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.usage
    assert (last.usage.completion_tokens > 0) == (whole != "")


def test_the_asynchronous_client_gets_the_same_answers_at_once(openai_client: OpenAI, url: str) -> None:
    alone = [text_of(openai_client, seed=seed, **FREE) for seed in range(4)]

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as asynchronous:

            async def one(seed: int) -> str:
                stream = await asynchronous.chat.completions.create(
                    model="tiny",
                    messages=ASK,
                    stream=True,
                    seed=seed,
                    max_tokens=40,
                    extra_body={"modalities": ["text"]},
                    **FREE,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(4)))

    assert asyncio.run(all_at_once()) == alone


def test_several_answers_take_the_seeds_that_follow(openai_client: OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny", messages=ASK, n=3, seed=5, max_tokens=10, extra_body={"modalities": ["text"]}, **FREE
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = openai_client.chat.completions.create(
        model="tiny", messages=ASK, seed=6, max_tokens=10, extra_body={"modalities": ["text"]}, **FREE
    )
    assert answer.choices[1].message.content == alone.choices[0].message.content
    assert answer.usage
    assert alone.usage
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens, "the prompt counts once"


def test_a_stream_of_several_answers_tells_them_apart(openai_client: OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": ASK, "n": 3, "seed": 5, "max_tokens": 10, **FREE}
    whole = openai_client.chat.completions.create(extra_body={"modalities": ["text"]}, **fields)
    texts = ["", "", ""]
    for chunk in openai_client.chat.completions.create(stream=True, extra_body={"modalities": ["text"]}, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_the_text_ends_before_a_stop_string(openai_client: OpenAI) -> None:
    whole = next(text for seed in range(20) if len(text := text_of(openai_client, seed=seed, **FREE)) > 8)
    seed = next(seed for seed in range(20) if text_of(openai_client, seed=seed, **FREE) == whole)
    stop = whole[3:6]
    answer = openai_client.chat.completions.create(
        model="tiny", messages=ASK, seed=seed, max_tokens=40, stop=[stop], extra_body={"modalities": ["text"]}, **FREE
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = openai_client.chat.completions.create(
        model="tiny",
        messages=ASK,
        seed=seed,
        max_tokens=40,
        stop=stop,
        stream=True,
        extra_body={"modalities": ["text"]},
        **FREE,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole[: whole.index(stop)]


def test_logprobs_of_a_chat_belong_to_its_text(openai_client: OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny",
        messages=ASK,
        seed=3,
        max_tokens=12,
        logprobs=True,
        top_logprobs=3,
        extra_body={"modalities": ["text"]},
        **FREE,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    data = b"".join(bytes(token.bytes or b"") for token in logprobs.content)
    assert data.decode(errors="replace") == answer.choices[0].message.content
    for token in logprobs.content:
        assert token.logprob <= 0
        if token.bytes:  # the closing id has no alternatives
            assert len(token.top_logprobs) == 3
            values = [one.logprob for one in token.top_logprobs]
            assert values == sorted(values, reverse=True)


def test_extensions_go_through_extra_body(openai_client: OpenAI) -> None:
    extensions = {"modalities": ["text"], "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    answers = {
        openai_client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=8, temperature=2, seed=seed, extra_body=extensions
        )
        .choices[0]
        .message.content
        for seed in range(4)
    }
    assert len(answers) == 1, "of one token alone to choose from, every seed takes it"


def test_an_answer_may_have_to_begin_with_an_image(openai_client: OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny", messages=ASK, seed=2, max_tokens=30, extra_body={"begin_with": "image"}
    )
    parts = answer.choices[0].message.model_extra["parts"]  # type: ignore[index]
    assert parts[0]["type"] == "image_url"
    with pytest.raises(openai.BadRequestError, match="among the modalities"):
        openai_client.chat.completions.create(
            model="tiny", messages=ASK, extra_body={"begin_with": "image", "modalities": ["text"]}
        )


def test_models(openai_client: OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    assert openai_client.models.retrieve("tiny").owned_by == "calumma"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("other")


def test_errors_are_the_clients_own(openai_client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        openai_client.chat.completions.create(model="gpt", messages=ASK)
    with pytest.raises(openai.BadRequestError) as error:
        openai_client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 4 * CONTEXT}])
    assert error.value.code == "context_length_exceeded"
