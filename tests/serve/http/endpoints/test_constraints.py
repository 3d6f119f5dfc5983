"""What a request asks of its answer's tokens, kept by a real engine: grammars, biases, lengths, words, stop ids.

The model is random: whatever fits was not its idea.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel
from starlette.testclient import TestClient

from calumma.model import MixedModalModel

from ..conftest import CHAT, ask, error_of
from .conftest import FREE

ASK: Any = [{"role": "user", "content": "Which digit is this?"}]
SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}, "sure": {"type": "boolean"}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
}


def text(client: OpenAI, **body: Any) -> str:
    fields = {"max_tokens": 60, "seed": 3, **FREE}
    answer = client.chat.completions.create(model="tiny", messages=ASK, extra_body=fields | body)
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "asked",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "digit", "schema": SCHEMA, "strict": True},
            }
        },
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
def test_a_json_schema_is_kept(openai_client: OpenAI, asked: dict[str, Any], seed: int) -> None:
    found = json.loads(text(openai_client, seed=seed, **asked))
    assert set(found) == {"digit", "sure"}
    assert found["digit"] in range(10)
    assert isinstance(found["sure"], bool)


def test_openais_own_parser_of_a_schema(openai_client: OpenAI) -> None:
    class Digit(BaseModel):
        digit: int
        sure: bool

    parsed = openai_client.chat.completions.parse(model="tiny", messages=ASK, response_format=Digit, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Digit)
    with openai_client.chat.completions.stream(
        model="tiny", messages=ASK, response_format=Digit, temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
    response = openai_client.responses.parse(model="tiny", input="x", text_format=Digit, temperature=0)
    assert isinstance(response.output_parsed, Digit)


def test_other_grammars_are_kept(openai_client: OpenAI) -> None:
    assert re.fullmatch(r"[0-9]{3}-[a-c]+", text(openai_client, guided_regex="[0-9]{3}-[a-c]{1,8}"))
    assert text(openai_client, guided_choice=["seven", "three"]) in ("seven", "three")
    assert text(openai_client, guided_grammar='start: "x" ("y" | "z")') in ("xy", "xz")
    completion = openai_client.completions.create(
        model="tiny", prompt="The", max_tokens=20, extra_body={"guided_choice": ["seven", "three"]}
    )
    assert completion.choices[0].text in ("seven", "three")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "("},
        {"guided_grammar": "start: nothing_like_it ("},
        {"guided_json": {"type": "nonsense"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/missing"}}}},
        {"guided_choice": ["a" * 200_000]},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_none_is_a_400(client: TestClient, fields: dict[str, Any], stream: bool) -> None:
    response = client.post(CHAT, json=ask(max_tokens=5, stream=stream, **fields))
    assert response.status_code == 400
    assert error_of(response)["message"]


def test_biases_allowed_ids_and_words(openai_client: OpenAI, model: MixedModalModel) -> None:
    [token, *_] = model.text_tokenizer.encode("s")
    plain = {"modalities": ["text"], "max_tokens": 5}
    assert text(openai_client, logit_bias={str(token): 100}, **plain) == "sssss"
    assert text(openai_client, allowed_token_ids=[token], **plain) in ("sssss"[:n] for n in range(6))
    banned = text(openai_client, logit_bias={str(token): 100}, bad_words=["s"], **plain)
    assert "s" not in banned
    whole = text(openai_client, modalities=["text"], max_tokens=5, ignore_eos=True)
    assert len(whole) >= 5


def test_min_tokens_and_ignore_eos(openai_client: OpenAI, model: MixedModalModel) -> None:
    ends = {str(model.vocabulary.eos): 100, str(model.vocabulary.end_turn): 100}
    fields: Any = {"model": "tiny", "messages": ASK, "max_tokens": 9, "logit_bias": ends}
    for extra, tokens, reason in (({}, 0, "stop"), ({"min_tokens": 4}, 4, "stop"), ({"ignore_eos": True}, 9, "length")):
        answer = openai_client.chat.completions.create(**fields, extra_body={"modalities": ["text"], **extra})
        assert answer.usage
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (tokens, reason)


def test_penalties_make_a_text_repeat_itself_less(openai_client: OpenAI, model: MixedModalModel) -> None:
    [token, *_] = model.text_tokenizer.encode("s")
    fields: Any = {"logit_bias": {str(token): 5}, "modalities": ["text"], "max_tokens": 40, "ignore_eos": True}
    often = text(openai_client, **fields).count("s")
    assert text(openai_client, presence_penalty=2, frequency_penalty=2, **fields).count("s") < often


def test_the_stop_tokens_value_is_its_own(openai_client: OpenAI, model: MixedModalModel) -> None:
    [token, *_] = model.text_tokenizer.encode("s")
    for stop in (model.vocabulary.eos, model.vocabulary.end_turn, token):
        answer = openai_client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=5, logprobs=True, top_logprobs=2, logit_bias={str(stop): 100},
            extra_body={"modalities": ["text"], "stop_token_ids": [token]},
        )  # fmt: skip
        assert answer.choices[0].message.content == ""
        assert answer.choices[0].logprobs
        assert answer.choices[0].logprobs.content
        [last] = answer.choices[0].logprobs.content
        assert last.token == f"token_id:{stop}"
        assert last.logprob < -0.5, "among some 300 ids of a random model"
        assert len(last.top_logprobs) == 2


@pytest.mark.parametrize("expression", ["x{1000000}", "(a{1000}){1000}"])
def test_a_grammar_that_grows_too_large_is_the_requests_fault(client: TestClient, expression: str) -> None:
    error = error_of(answer := client.post(CHAT, json=ask(guided_regex=expression, **FREE)))
    assert (answer.status_code, error["code"]) == (400, "no_token")
    assert "too large" in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("guided_regex", r"[^\s\S]", "no text of this model's fits it"),
        ("guided_json", {"$ref": "#"}, "no text of this model's fits it"),
        ("stop_token_ids", [10**6], "token ids must lie in"),
        ("allowed_token_ids", [5, 10**6], "token ids must lie in"),
        ("logit_bias", {"1000000": 1}, "token ids must lie in"),
    ],
)
def test_what_only_the_engine_can_tell_names_the_field_too(
    client: TestClient, field: str, value: Any, says: str
) -> None:
    error = error_of(answer := client.post(CHAT, json=ask(**{field: value})))
    assert (answer.status_code, error["param"]) == (400, field)
    assert says in error["message"]
