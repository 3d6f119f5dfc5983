"""The official `openai` client, unchanged, against the application under a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import openai
import pytest
import requests
import torch
from openai import AsyncOpenAI, OpenAI
from PIL import Image as PILImage

from calumma.model import MixedModalModel

from .conftest import CONTEXT, IMAGE_SIZE

ASK: Any = [{"role": "user", "content": "Draw a three."}]
FREE = {"temperature": 1.5, "top_p": 1.0}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def picture(data: str) -> PILImage.Image:
    return PILImage.open(io.BytesIO(base64.b64decode(data)))


# ---- chat


def text_of(client: OpenAI, **fields: Any) -> str:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, extra_body={"modalities": ["text"]}, max_tokens=40, **fields
    )
    return answer.choices[0].message.content or ""


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASK, seed=1, max_tokens=5)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_images_come_back_through_the_client(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ASK, extra_body={"modalities": ["image"]})
    [image] = answer.choices[0].message.model_extra["images"]  # type: ignore[index]
    assert picture(image["image_url"]["url"].partition(",")[2]).size == (IMAGE_SIZE, IMAGE_SIZE)


def test_a_stream_is_the_whole_answer_piece_by_piece(client: OpenAI) -> None:
    whole = text_of(client, seed=3, **FREE)
    stream = client.chat.completions.create(
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


def test_the_asynchronous_client_gets_the_same_answers_at_once(client: OpenAI, url: str) -> None:
    alone = [text_of(client, seed=seed, **FREE) for seed in range(4)]

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


def test_several_answers_take_the_seeds_that_follow(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, n=3, seed=5, max_tokens=10, extra_body={"modalities": ["text"]}, **FREE
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = client.chat.completions.create(
        model="tiny", messages=ASK, seed=6, max_tokens=10, extra_body={"modalities": ["text"]}, **FREE
    )
    assert answer.choices[1].message.content == alone.choices[0].message.content
    assert answer.usage
    assert alone.usage
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens, "the prompt counts once"


def test_a_stream_of_several_answers_tells_them_apart(client: OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": ASK, "n": 3, "seed": 5, "max_tokens": 10, **FREE}
    whole = client.chat.completions.create(extra_body={"modalities": ["text"]}, **fields)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, extra_body={"modalities": ["text"]}, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_the_text_ends_before_a_stop_string(client: OpenAI) -> None:
    whole = next(text for seed in range(20) if len(text := text_of(client, seed=seed, **FREE)) > 8)
    seed = next(seed for seed in range(20) if text_of(client, seed=seed, **FREE) == whole)
    stop = whole[3:6]
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, seed=seed, max_tokens=40, stop=[stop], extra_body={"modalities": ["text"]}, **FREE
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
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


def test_logprobs_of_a_chat_belong_to_its_text(client: OpenAI) -> None:
    answer = client.chat.completions.create(
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


# ---- completions


def test_completions_of_several_prompts(client: OpenAI) -> None:
    prompts = ["Count from two", "Which digit", "Draw"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, seed=2, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = client.completions.create(model="tiny", prompt=prompts[1], max_tokens=6, seed=2, n=2)
    assert [c.text for c in answer.choices[2:4]] == [c.text for c in alone.choices]


def test_token_ids_are_a_prompt(client: OpenAI, model: MixedModalModel) -> None:
    ids = model.text_tokenizer.encode("Count from two")
    fields: Any = {"model": "tiny", "max_tokens": 6, "seed": 2}
    text = client.completions.create(prompt="Count from two", **fields)
    for prompt in (ids, [ids], [model.vocabulary.bos, *ids]):
        assert client.completions.create(prompt=prompt, **fields).choices[0].text == text.choices[0].text
    with pytest.raises(openai.BadRequestError, match="ids must lie in"):
        client.completions.create(prompt=[10**6], **fields)


def test_echo_brings_the_prompt_first(client: OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": "Count from two", "max_tokens": 6, "seed": 2}
    plain = client.completions.create(**fields)
    echoed = client.completions.create(echo=True, **fields)
    assert echoed.choices[0].text == "Count from two" + plain.choices[0].text
    streamed = client.completions.create(echo=True, stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text
    nothing = client.completions.create(echo=True, **(fields | {"max_tokens": 0}))
    assert nothing.choices[0].text == "Count from two"
    assert nothing.usage
    assert nothing.usage.completion_tokens == 0


def likelihood(model: MixedModalModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether greedy decoding gives it: by one plain pass."""
    ids = torch.tensor([[model.vocabulary.bos, *context, *continuation]])
    with torch.inference_mode():
        logprobs_TV = model.transformer(ids).log_softmax(-1)[0, len(context) : -1]
    own = logprobs_TV.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    return float(own.sum()), bool((logprobs_TV.argmax(-1) == torch.tensor(continuation)).all())


def encode(url: str, text: str) -> list[int]:
    """Token ids, of the remote tokenizer."""
    reply = requests.post(f"{url}/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=60)
    ids: list[int] = reply.json()["tokens"]
    return ids


def test_lm_evaluation_harness_gets_the_likelihoods_of_the_model(url: str, model: MixedModalModel) -> None:
    """The requests and the arithmetic of its `local-completions`: tokens from the remote tokenizer, several prompts
    in one request, the context's tokens cut off, the one generated token dropped."""
    assert "eos_token" in requests.get(f"{url}/tokenizer_info", timeout=60).json()

    pairs = [("Which digit is this?", " seven"), ("Draw a", " three."), ("Count from two to four,", " with pictures é")]
    greedy_context = encode(url, "Draw a three.")
    with torch.inference_mode():
        greedy = [int(model.transformer(torch.tensor([[model.vocabulary.bos, *greedy_context]]))[0, -1].argmax())]
    encoded = [(encode(url, a), encode(url, b)) for a, b in pairs] + [(greedy_context, greedy)]
    body = {
        "model": "tiny",
        "prompt": [context + continuation for context, continuation in encoded],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    out = requests.post(f"{url}/v1/completions", json=body, timeout=300).json()
    for choice, (context, continuation) in zip(sorted(out["choices"], key=itemgetter("index")), encoded, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        is_greedy = all(token == max(top.values()) for token, top in zip(logprobs, tops, strict=True))
        expected, expected_greedy = likelihood(model, context, continuation)
        assert sum(logprobs) == pytest.approx(expected, abs=1e-3)
        assert is_greedy == expected_greedy
        lengths = {
            len(choice["logprobs"][name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert lengths == {len(context) + len(continuation) + 1}
    looked_at = requests.post(f"{url}/v1/completions", json=body | {"max_tokens": 0}, timeout=300).json()
    for before, choice in zip(out["choices"], looked_at["choices"], strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(
            before["logprobs"]["token_logprobs"][:-1], abs=1e-5
        )
        assert (choice["text"], choice["finish_reason"]) == (before["text"][: len(choice["text"])], "length")
    assert looked_at["usage"]["completion_tokens"] == 0


def test_lm_evaluation_harness_gets_greedy_answers_to_token_ids(url: str, client: OpenAI) -> None:
    """Its `generate_until`: token ids, several prompts, the end-of-sequence token's name among the stop strings."""
    texts = ["Which digit is this?", "Draw a", "Count from two to four,"]
    body = {"model": "tiny", "max_tokens": 12, "temperature": 0, "stop": ["\n\n", "</s>"], "seed": 1234}
    out = requests.post(
        f"{url}/v1/completions", json=body | {"prompt": [encode(url, text) for text in texts]}, timeout=300
    ).json()
    found = {choice["index"]: choice["text"] for choice in out["choices"]}
    alone = [client.completions.create(model="tiny", prompt=t, max_tokens=12, temperature=0) for t in texts]
    assert [found[index] for index in range(3)] == [answer.choices[0].text for answer in alone]


def test_text_offsets_point_into_the_text(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="Count from two", max_tokens=8, seed=2, echo=True, logprobs=2, **FREE
    )
    choice = answer.choices[0]
    assert choice.logprobs
    assert choice.logprobs.tokens
    assert choice.logprobs.text_offset
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if not token.startswith(("bytes:", "token_id:")):
            assert choice.text[offset:].startswith(token)


# ---- images, models, errors


def test_images(client: OpenAI) -> None:
    answer = client.images.generate(model="tiny", prompt="Draw a three.", n=2, response_format="b64_json")
    assert answer.data
    assert [picture(item.b64_json or "").size for item in answer.data] == [(IMAGE_SIZE, IMAGE_SIZE)] * 2


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_images_have_the_format_that_is_asked_for(client: OpenAI, form: Any) -> None:
    answer = client.images.generate(model="tiny", prompt="a three", output_format=form, output_compression=80)
    assert answer.data
    assert answer.output_format == form
    assert picture(answer.data[0].b64_json or "").format == form.upper()


def test_images_as_urls_are_data_urls(client: OpenAI) -> None:
    answer = client.images.generate(model="tiny", prompt="a three", response_format="url", size="8x8")  # type: ignore[call-overload]
    assert answer.data[0].url.startswith("data:image/png;base64,")
    with pytest.raises(openai.BadRequestError, match="this model draws 8x8"):
        client.images.generate(model="tiny", prompt="a three", size="1024x1024")


def test_an_image_streams_with_partial_ones(client: OpenAI) -> None:
    events = list(client.images.generate(model="tiny", prompt="a three", stream=True, partial_images=3))  # type: ignore[call-overload]
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert last.type == "image_generation.completed"
    assert last.usage.output_tokens == 18
    whole = [picture(event.b64_json).tobytes() for event in events]
    assert len(set(whole)) == 4, "each shows more than the one before"


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "calumma"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt", messages=ASK)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 4 * CONTEXT}])
    assert error.value.code == "context_length_exceeded"


def test_extensions_go_through_extra_body(client: OpenAI) -> None:
    extensions = {"modalities": ["text"], "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    answers = {
        client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=8, temperature=2, seed=seed, extra_body=extensions
        )
        .choices[0]
        .message.content
        for seed in range(4)
    }
    assert len(answers) == 1, "of one token alone to choose from, every seed takes it"


def test_an_answer_may_have_to_begin_with_an_image(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, seed=2, max_tokens=30, extra_body={"begin_with": "image"}
    )
    parts = answer.choices[0].message.model_extra["parts"]  # type: ignore[index]
    assert parts[0]["type"] == "image_url"
    with pytest.raises(openai.BadRequestError, match="among the modalities"):
        client.chat.completions.create(
            model="tiny", messages=ASK, extra_body={"begin_with": "image", "modalities": ["text"]}
        )
