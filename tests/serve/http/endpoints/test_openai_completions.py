"""Completions with the official `openai` client, unchanged, and as lm-evaluation-harness asks for them."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import openai
import pytest
import requests
import torch
from openai import OpenAI

from calumma.model import MixedModalModel

from .conftest import FREE


def test_completions_of_several_prompts(openai_client: OpenAI) -> None:
    prompts = ["Count from two", "Which digit", "Draw"]
    answer = openai_client.completions.create(model="tiny", prompt=prompts, max_tokens=6, seed=2, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = openai_client.completions.create(model="tiny", prompt=prompts[1], max_tokens=6, seed=2, n=2)
    assert [c.text for c in answer.choices[2:4]] == [c.text for c in alone.choices]


def test_token_ids_are_a_prompt(openai_client: OpenAI, model: MixedModalModel) -> None:
    ids = model.text_tokenizer.encode("Count from two")
    fields: Any = {"model": "tiny", "max_tokens": 6, "seed": 2}
    text = openai_client.completions.create(prompt="Count from two", **fields)
    for prompt in (ids, [ids], [model.vocabulary.bos, *ids]):
        assert openai_client.completions.create(prompt=prompt, **fields).choices[0].text == text.choices[0].text
    with pytest.raises(openai.BadRequestError, match="ids must lie in"):
        openai_client.completions.create(prompt=[10**6], **fields)


def test_echo_brings_the_prompt_first(openai_client: OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": "Count from two", "max_tokens": 6, "seed": 2}
    plain = openai_client.completions.create(**fields)
    echoed = openai_client.completions.create(echo=True, **fields)
    assert echoed.choices[0].text == "Count from two" + plain.choices[0].text
    streamed = openai_client.completions.create(echo=True, stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text
    nothing = openai_client.completions.create(echo=True, **(fields | {"max_tokens": 0}))
    assert nothing.choices[0].text == "Count from two"
    assert nothing.usage
    assert nothing.usage.completion_tokens == 0


def test_text_offsets_point_into_the_text(openai_client: OpenAI) -> None:
    answer = openai_client.completions.create(
        model="tiny", prompt="Count from two", max_tokens=8, seed=2, echo=True, logprobs=2, **FREE
    )
    choice = answer.choices[0]
    assert choice.logprobs
    assert choice.logprobs.tokens
    assert choice.logprobs.text_offset
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if not token.startswith(("bytes:", "token_id:")):
            assert choice.text[offset:].startswith(token)


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


def test_lm_evaluation_harness_gets_greedy_answers_to_token_ids(url: str, openai_client: OpenAI) -> None:
    """Its `generate_until`: token ids, several prompts, the end-of-sequence token's name among the stop strings."""
    texts = ["Which digit is this?", "Draw a", "Count from two to four,"]
    body = {"model": "tiny", "max_tokens": 12, "temperature": 0, "stop": ["\n\n", "</s>"], "seed": 1234}
    out = requests.post(
        f"{url}/v1/completions", json=body | {"prompt": [encode(url, text) for text in texts]}, timeout=300
    ).json()
    found = {choice["index"]: choice["text"] for choice in out["choices"]}
    alone = [openai_client.completions.create(model="tiny", prompt=t, max_tokens=12, temperature=0) for t in texts]
    assert [found[index] for index in range(3)] == [answer.choices[0].text for answer in alone]
