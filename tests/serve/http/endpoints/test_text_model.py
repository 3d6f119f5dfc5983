"""A text model that was extended, asked over HTTP: its chat template, streams of its tokens, grammars, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from calumma.model import load
from calumma.model.convert import extend_hugging_face
from calumma.serve.http.app import create_app
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import ServeSettings
from tests.model.convert.text_models import make_text_model, save_image_tokenizer

from ...conftest import listening
from .conftest import FREE, picture

transformers = pytest.importorskip("transformers")

ASK: Any = [{"role": "user", "content": "Which digit is this? <|im_end|>"}]


@pytest.fixture(scope="module", params=["qwen3", "llama2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, OpenAI]]:
    folder = tmp_path_factory.mktemp("served")
    make_text_model(folder / "text", request.param)
    extend_hugging_face(folder / "text", folder / "model", save_image_tokenizer(folder / "image_tokenizer"))
    replica = EngineReplica(load(folder / "model"), max_sequences=4)
    settings = ServeSettings(model=str(folder / "model"), name="tiny")
    try:
        with listening(create_app(replica, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            yield folder / "text", client
    finally:
        replica.close()


def test_the_prompt_is_what_the_chat_template_writes(served: tuple[Path, OpenAI]) -> None:
    folder, client = served
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=3)
    theirs = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, sanitize_control_tokens=True)
    theirs = theirs if isinstance(theirs, list) else theirs["input_ids"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(theirs)


def test_a_stream_says_what_an_answer_at_once_says(served: tuple[Path, OpenAI]) -> None:
    _, client = served
    body: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 40, "seed": 5, "extra_body": {**FREE}}
    whole = client.chat.completions.create(**body)
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**body, stream=True)
        if chunk.choices
    ]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(parts) > 3


def test_grammars_hold_in_its_tokens(served: tuple[Path, OpenAI]) -> None:
    _, client = served
    for value, pattern in (("Grüße 三", "Grüße 三"), ("7", "[7]")):
        fields = FREE | {"guided_regex": pattern}
        answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=40, seed=1, extra_body=fields)
        assert answer.choices[0].message.content == value
    schema = {
        "type": "object",
        "properties": {"digit": {"enum": [7, 8]}},
        "required": ["digit"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=40, seed=1, extra_body=FREE | {"guided_json": schema}
    )
    assert json.loads(answer.choices[0].message.content or "")["digit"] in (7, 8)


def test_it_draws(served: tuple[Path, OpenAI]) -> None:
    """Noise, until it is trained."""
    answer = served[1].images.generate(model="tiny", prompt="a seven", response_format="b64_json")
    assert answer.data is not None
    assert picture(answer.data[0].b64_json or "").size == (16, 16)
