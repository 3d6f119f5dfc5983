"""Requests on the wire become documents and sampling parameters; what cannot be answered is refused by name."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from calumma.model.document import Document, Image, Text
from calumma.model.generation.constraint import Constraint
from calumma.serve.http import prompts
from calumma.serve.http.image_loader import ImageLoader
from calumma.serve.http.prompts import expand_choices, image_prompt, image_sources, plain_prompt, sampling_params
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.requests import ChatRequest
from calumma.serve.protocol import GenerationRequest
from calumma.serve.settings import Limits, RemoteImages, SamplingDefaults

LOADER = ImageLoader(Limits(), RemoteImages())


def chat_prompt(request: ChatRequest) -> Document:
    return prompts.chat_prompt(request, asyncio.run(LOADER.load(image_sources(request), None)))


def request(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": list(messages), **fields})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_text_and_images_keep_their_order_without_the_space_between(data_url: str, png: bytes) -> None:
    prompt = chat_prompt(request(user([{"type": "text", "text": "Which digit? "}, image(data_url), image(data_url)])))
    assert prompt.segments == (Text("Which digit?", "user"), Image(png, role="user"), Image(png, role="user"))


def test_an_image_url_may_be_a_plain_string(data_url: str, png: bytes) -> None:
    prompt = chat_prompt(request(user([{"type": "image_url", "image_url": data_url}])))
    assert prompt.segments == (Image(png, role="user"),)


def test_system_text_heads_the_first_user_turn() -> None:
    prompt = chat_prompt(request({"role": "system", "content": "Be brief."}, user("Hello")))
    assert prompt.segments == (Text("Be brief.\nHello", "user"),)


def test_text_split_over_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "Draw "}, {"type": "text", "text": ""}, {"type": "text", "text": "a seven."}]
    assert chat_prompt(request(user(parts))) == chat_prompt(request(user("Draw a seven.")))


def test_messages_of_one_role_are_one_turn() -> None:
    turns = list(
        chat_prompt(request(user("one"), user("two"), {"role": "assistant", "content": "3"}, user("4"))).turns()
    )
    assert [(t.role, t.segments[0]) for t in turns] == [
        ("user", Text("one\ntwo", "user")),
        ("assistant", Text("3", "assistant")),
        ("user", Text("4", "user")),
    ]


def test_an_answer_of_ours_can_be_sent_back_as_it_is(data_url: str, png: bytes) -> None:
    answer = {
        "role": "assistant",
        "content": "two",
        "images": [image(data_url)],
        "parts": [{"type": "text", "text": "two"}, image(data_url)],
    }
    prompt = chat_prompt(request(user("Draw a two."), answer, user("And a three.")))
    assert prompt.segments[1:3] == (Text("two", "assistant"), Image(png, role="assistant"))


def turns(*messages: dict[str, Any]) -> list[tuple[str | None, str]]:
    return [(turn.role, "".join(s.text for s in turn.segments if isinstance(s, Text)))
            for turn in chat_prompt(request(*messages)).turns()]  # fmt: skip


EMPTY_ANSWERS: list[dict[str, Any]] = [
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": None},
    {"role": "assistant"},
    {"role": "assistant", "content": []},
    {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    {"role": "assistant", "content": "", "parts": [], "images": [], "refusal": None, "tool_calls": None, "audio": None},
]


@pytest.mark.parametrize("empty", EMPTY_ANSWERS)
def test_an_empty_answer_keeps_its_turn(empty: dict[str, Any]) -> None:
    assert turns(user("Draw a seven."), empty, user("Which digit?")) == [
        ("user", "Draw a seven."), ("assistant", ""), ("user", "Which digit?")
    ]  # fmt: skip
    assert turns(user("Draw a seven."), empty) == [("user", "Draw a seven.")], "it is where the answer begins"


@pytest.mark.parametrize("empty", ["", None, [], [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_an_empty_system_message_is_none(role: str, empty: Any) -> None:
    assert turns({"role": role, "content": empty}, user("Hi")) == [("user", "Hi")]


def test_an_answer_may_stand_first() -> None:
    hello = {"role": "assistant", "content": "Hello"}
    assert turns(hello, user("Hi")) == [("user", ""), ("assistant", "Hello"), ("user", "Hi")]
    assert turns({"role": "system", "content": "Be brief."}, hello, user("Hi")) == [
        ("user", "Be brief."), ("assistant", "Hello"), ("user", "Hi")
    ]  # fmt: skip


def test_an_empty_question_between_answers_keeps_its_turn() -> None:
    answer = {"role": "assistant", "content": "y"}
    assert turns(user("x"), answer, user(""), answer, user("z"))[2] == ("user", "")


def test_images_without_their_places_follow_the_text(data_url: str, png: bytes) -> None:
    """As clients send an answer back that know OpenRouter's `images` and not our `parts`."""
    for content in ("two", [{"type": "text", "text": "two"}]):
        answer = {"role": "assistant", "content": content, "images": [image(data_url) | {"index": 0}]}
        prompt = chat_prompt(request(user("Draw a two."), answer, user("And a three.")))
        assert prompt.segments[1:3] == (Text("two", "assistant"), Image(png, role="assistant"))


def test_a_refusal_is_sent_back_as_its_text() -> None:
    declined = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert turns(user("x"), declined, user("y"))[1] == ("assistant", "No.")


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        ([user("")], "messages[0].content", "empty"),
        ([user([])], "messages[0].content", "empty"),
        ([{"role": "user"}], "messages[0].content", "empty"),
        ([{"role": "system", "content": ""}], "messages[0].content", "empty"),
        ([user("x"), {"role": "assistant", "content": "y"}, user("")], "messages[2].content", "empty"),
        ([user("x"), {"role": "assistant", "content": "y"}], "messages", "last message must be a user's"),
        ([user("x"), user("\ud800")], "messages[1].content[0].text", "Unicode"),
    ],
)
def test_conversations_that_cannot_be_answered(messages: list[dict[str, Any]], param: str, says: str) -> None:
    with pytest.raises(APIError, match=says) as error:
        chat_prompt(request(*messages))
    assert error.value.status == 400
    assert error.value.body["error"]["param"] == param


@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("https://example.org/cat.png", "remote_image_url", "remote images are not fetched"),
        ("cat.png", "invalid_image_url", "not a data URL"),
        ("file:///etc/passwd", "invalid_image_url", "not a data URL"),
        ("data:image/png,abc", "invalid_image_url", "must be base64"),
        ("data:image/png;base64,@@@@", "invalid_base64", "not valid base64"),
        ("data:image/png;base64,abcde", "invalid_base64", "not valid base64"),
        ("data:image/png;base64,", "invalid_image", "not a readable image"),
        ("data:image/png;base64," + base64.b64encode(b"hello").decode(), "invalid_image", "not a readable image"),
    ],
)
def test_image_parts_that_are_no_image(url: str, code: str, says: str) -> None:
    with pytest.raises(APIError, match=says) as error:
        chat_prompt(request(user("first"), user([{"type": "text", "text": "this: "}, image(url)])))
    assert error.value.status == 400
    assert error.value.body["error"]["param"] == "messages[1].content[1].image_url.url"
    assert error.value.body["error"]["code"] == code


def test_a_truncated_image_is_refused(png: bytes) -> None:
    cut = "data:image/png;base64," + base64.b64encode(png[: len(png) // 2]).decode()
    with pytest.raises(APIError, match="not a readable image"):
        chat_prompt(request(user([image(cut)])))


def test_a_system_message_holds_no_image(data_url: str) -> None:
    with pytest.raises(APIError, match="text only"):
        chat_prompt(request({"role": "system", "content": [image(data_url)]}, user("x")))


def test_plain_and_drawing_prompts() -> None:
    assert plain_prompt("def f(").segments == (Text("def f("),)
    assert plain_prompt("").segments == ()
    assert image_prompt("a seven").segments == (Text("a seven", "user"),)


@pytest.mark.parametrize(
    ("modalities", "mode"),
    [(["text"], "text"), (["image"], "image"), (["text", "image"], "interleaved"), (["image", "text"], "interleaved")],
)
def test_modalities_choose_the_mode(modalities: list[str], mode: str) -> None:
    asked = request(user("x"), modalities=modalities)
    assert sampling_params(asked, asked.modalities, SamplingDefaults()).mode == mode


def test_what_a_request_leaves_open_comes_from_the_settings() -> None:
    defaults = SamplingDefaults(temperature=0.3, image_top_p=0.5, guidance_text=2.0, max_images=3)
    params = sampling_params(request(user("x")), ["text", "image"], defaults)
    assert (params.text.temperature, params.image.top_p, params.guidance_text, params.max_images) == (0.3, 0.5, 2.0, 3)
    assert params.seed is None


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_and_minus_one_are_random(seed: int | None) -> None:
    params = sampling_params(request(user("x"), seed=seed), ["text"], SamplingDefaults())
    assert params.seed is None
    one = GenerationRequest("a", plain_prompt("x"), params)
    assert [choice.params.seed for choice in expand_choices(one, 2)] == [None, None]


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [
        (5, [5, 6, 7]),
        (2**63 - 1, [2**63 - 1, 2**63, 2**63 + 1]),
        (2**64 - 1, [2**64 - 1, 0, 1]),
        (-2, [2**64 - 2, 2**64 - 1, 0]),
        (-(2**63), [2**63, 2**63 + 1, 2**63 + 2]),
    ],
)
def test_seeds_of_several_answers_follow_each_other_and_wrap(seed: int, seeds: list[int]) -> None:
    params = sampling_params(request(user("x"), seed=seed), ["text"], SamplingDefaults())
    choices = expand_choices(GenerationRequest("a", plain_prompt("x"), params), 3)
    assert [choice.params.seed for choice in choices] == seeds


def test_fields_of_the_text_reach_the_engine() -> None:
    asked = request(
        user("x"), presence_penalty=0.5, frequency_penalty=-1, logit_bias={"5": -100, "7": 2}, min_tokens=2,
        stop_token_ids=[9], ignore_eos=True, allowed_token_ids=[5, 7], guided_regex="[0-9]+",
    )  # fmt: skip
    params = sampling_params(asked, asked.modalities, SamplingDefaults())
    assert (params.text.presence_penalty, params.text.frequency_penalty) == (0.5, -1)
    assert (params.image.presence_penalty, params.image.frequency_penalty) == (0, 0)
    assert params.logit_bias == ((5, -100), (7, 2))
    assert (params.min_tokens, params.stop_ids, params.ignore_eos, params.allowed_ids) == (2, (9,), True, (5, 7))
    assert params.constraint == Constraint("regex", "[0-9]+")


def test_a_request_overrides_the_settings() -> None:
    asked = request(
        user("x"),
        temperature=0,
        top_p=0.4,
        seed=5,
        image_temperature=1.5,
        image_top_p=0.2,
        guidance_image=1,
        max_images=2,
    )
    params = sampling_params(asked, asked.modalities, SamplingDefaults())
    assert (params.text.temperature, params.text.top_p, params.seed) == (0, 0.4, 5)
    assert (params.image.temperature, params.image.top_p, params.guidance_image, params.max_images) == (1.5, 0.2, 1, 2)
