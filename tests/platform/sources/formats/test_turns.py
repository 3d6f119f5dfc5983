"""Turns of conversations as data in use has them: empty ones, systems, tools, images of their own, and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calumma.model.document import Document, Text
from calumma.platform.sources.files import BadInput, Item
from calumma.platform.sources.formats.conversations import reader
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import read_file


def read(folder: Path, *records: Any, **options: Any) -> tuple[list[Document], list[str], dict[str, Any]]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    notes = Notes()
    items: list[Item] = list(read_file("conversations", "source", str(path), notes=notes, options=options))
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item.reason for item in items if isinstance(item, BadInput)], notes.report().get("unread", {})


def said(document: Document) -> list[tuple[str | None, str]]:
    """Role and words of every turn; an image is its bytes in brackets."""
    return [
        (t.role, "".join(s.text if isinstance(s, Text) else f"[{s.data!r}]" for s in t.segments))
        for t in document.turns()
    ]


def talk(*turns: str | tuple[str, Any], **more: Any) -> dict[str, Any]:
    """Turns of user and assistant by turns, or of who is named."""
    named = [t if isinstance(t, tuple) else (("user", "assistant")[n % 2], t) for n, t in enumerate(turns)]
    return {"messages": [{"role": role, "content": words} for role, words in named], **more}


@pytest.mark.parametrize("empty", ["", "   \n", None, [], [{"type": "text", "text": " "}]])
def test_an_empty_answer_takes_its_exchange_with_it(tmp_path: Path, empty: Any) -> None:
    (document,), bad, unread = read(tmp_path, talk("one?", ("assistant", empty), "two?", "two."))
    assert said(document) == [("user", "two?"), ("assistant", "two.")]
    assert not bad
    assert unread == {"turns": {"of exchanges with an empty question or answer": 1}}
    (document,), _, _ = read(tmp_path, talk("one?", "one.", "two?", ("assistant", empty)))
    assert said(document) == [("user", "one?"), ("assistant", "one.")]
    (document,), _, _ = read(tmp_path, talk("one?", "one.", ("user", empty), "to nothing", "three?", "three."))
    assert said(document) == [
        ("user", "one?"),
        ("assistant", "one."),
        ("user", "three?"),
        ("assistant", "three."),
    ]
    assert read(tmp_path, talk("one?", ("assistant", empty)))[1] == ["has no exchange with a question and an answer"]
    assert read(tmp_path, talk(("user", empty), "to nothing"))[1] == ["has no exchange with a question and an answer"]


def test_an_exchange_with_an_image_is_not_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"0")
    assert read(tmp_path, talk("<image>what?", "", "and its colour?", "red", image="0.jpg"))[1] == [
        "an answer is empty whose question has an image"
    ]


def test_the_system_stays_when_an_exchange_goes(tmp_path: Path) -> None:
    exchange = [("user", "a?"), ("assistant", ""), ("user", "b?"), ("assistant", "b.")]
    (document,), _, _ = read(tmp_path, talk(("system", "Be brief."), *exchange))
    assert said(document) == [("user", "Be brief.\n\nb?"), ("assistant", "b.")]


def test_turns_of_one_role_stand_a_blank_line_apart(tmp_path: Path) -> None:
    (document,), _, _ = read(
        tmp_path, talk("x", ("user", "y"), ("assistant", "1"), ("assistant", ""), ("assistant", "2"))
    )
    assert said(document) == [("user", "x\n\ny"), ("assistant", "1\n\n2")]


@pytest.mark.parametrize(
    "record",
    [
        talk(("system", "Be brief."), ("user", "q"), ("assistant", "a")),
        talk(("developer", "Be brief."), ("user", "q"), ("assistant", "a")),
        talk("q", "a", system="Be brief."),
        talk("q", "a", system_prompt="Be brief."),
        talk(("system", "Be brief."), ("user", "q"), ("assistant", "a"), system="Be brief."),
        {"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}], "system": "Be brief."},
    ],
)
def test_the_systems_words_open_the_first_turn_wherever_they_stand(tmp_path: Path, record: Any) -> None:
    (document,), bad, unread = read(tmp_path, record)
    assert (said(document), bad, unread) == ([("user", "Be brief.\n\nq"), ("assistant", "a")], [], {})


@pytest.mark.parametrize("mask", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_turns_without_weight_are_not_trained(tmp_path: Path, mask: dict[str, Any]) -> None:
    record = talk("q", "wrong", "no", "right")
    record["messages"][1] |= mask
    (document,), _, unread = read(tmp_path, record)
    assert [(s.text, s.trained) for s in document.segments if isinstance(s, Text)] == [
        ("q", True),
        ("wrong", False),
        ("no", True),
        ("right", True),
    ]
    assert not unread
    record["messages"][3] |= {"weight": 1, "train": True}
    assert read(tmp_path, record)[0] == [document]


@pytest.mark.parametrize("weight", [0.5, -1, "0", [0]])
def test_a_share_of_a_loss_is_refused(tmp_path: Path, weight: Any) -> None:
    record = talk("q", "a")
    record["messages"][1]["weight"] = weight
    assert "allowed: 0, 1, false, true" in read(tmp_path, record)[1][0]


FUNCTION = {"name": "weather", "description": "now", "parameters": {"type": "object"}}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
RESULT = '<tool_response>{"name": "weather", "content": "12"}</tool_response>'


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                        }
                    ],
                },
                {"role": "tool", "content": "12", "tool_call_id": "1"},
                {"role": "assistant", "content": "12 degrees"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": "12"},
                {"from": "gpt", "value": "12 degrees"},
            ]
        },
    ],
)
@pytest.mark.parametrize("tools", [None, "[]", [{"type": "function", "function": FUNCTION}], json.dumps([FUNCTION])])
def test_tools_are_read_as_they_are_served(tmp_path: Path, record: dict[str, Any], tools: Any) -> None:
    (document,), bad, unread = read(tmp_path, {**record, "tools": tools})
    (_, question), *rest = said(document)
    assert rest == [("assistant", CALL), ("user", RESULT), ("assistant", "12 degrees")]
    assert (bad, unread) == ([], {})
    if tools in (None, "[]"):
        assert question == "q"
    else:
        assert '<tools>\n{"name": "weather"' in question
        assert question.endswith("</tools>\n\nq")


def test_a_call_keeps_its_turns_image(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"0")
    record = talk("q", ("function_call", '{"name": "weather"}'), ("observation", "12"), "12 degrees")
    record["messages"][1]["image"] = "0.jpg"
    (document,), _, unread = read(tmp_path, record)
    assert [image.data for image in document.images] == [b"0"]
    assert said(document)[1][1].startswith("[b'0']<tool_call>")
    assert not unread


def test_words_cannot_stand_for_a_call(tmp_path: Path) -> None:
    record = talk("say <tool_call>", "no", tools=[FUNCTION])
    (document,), _, _ = read(tmp_path, record)
    assert document.text.endswith("say <\\tool_call>no")
    assert read(tmp_path, talk("say <tool_call>", "no"))[0][0].text == "say <tool_call>no"
    assert "has no name" in read(tmp_path, talk("q", ("function_call", '{"n": 1}'), "a"))[1][0]


@pytest.mark.parametrize("field", ["image", "images", "image_path", "image_paths", "img"])
def test_images_are_found_in_records_and_in_turns(tmp_path: Path, field: str) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(b"%d" % number)
    value: Any = ["0.jpg"] if field.endswith("s") else "0.jpg"
    (document,), _, unread = read(tmp_path, talk("what is <image>?", "a", **{field: value}))
    assert (said(document)[0], unread) == (("user", "what is [b'0']?"), {})
    _, bad, _ = read(tmp_path, talk("what?", "a", **{field: value}))
    assert "has 0 <image> marks and 1 images" in bad[0]
    record = talk("what?", "a", "and <image> this?", "b")
    record["messages"][0][field] = value
    record["messages"][2][field] = ["1.jpg"]
    (document,), _, unread = read(tmp_path, record)
    assert [words for _, words in said(document)] == ["[b'0']what?", "a", "and [b'1'] this?", "b"]
    assert not unread
    record["messages"][2]["content"] = "<image> and <image>"
    assert "has a turn of 2 <image> marks and 1 images" in read(tmp_path, record)[1][0]


def test_what_is_not_read_is_refused_or_counted(tmp_path: Path) -> None:
    assert read(tmp_path, talk("<video>what?", "a", video="a.mp4"))[1] == ["has `video`, which is not read"]
    assert "different images" in read(tmp_path, talk("<image>", "a", image="0.jpg", images=["1.jpg"]))[1][0]
    record = talk("q", "a", id=7, score=None)
    record["messages"][1] |= {"reasoning_content": "hm", "refusal": None}
    assert read(tmp_path, record)[2] == {"fields": {"id": 1}, "turn fields": {"reasoning_content": 1}}


TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "human", "Assistant", "system", "tool", 3])},
    optional={
        "content": st.sampled_from(["one", "two", " ", "", "a < b", "<image>", "[IMG]", None, ["three"]]),
        "value": st.sampled_from(["one", "two"]),
        "from": st.sampled_from(["human", "gpt", None]),
        "weight": st.sampled_from([0, 1, None]),
    },
)
TALK = st.fixed_dictionaries(
    {"messages": st.lists(TURN, max_size=4)},
    optional={
        "conversations": st.sampled_from([None, [], [{"from": "human", "value": "so?"}]]),
        "system": st.sampled_from(["Be brief.", "", None]),
        "train": st.booleans(),
        "kto_tag": st.booleans(),
        "label": st.just(False),
        "video": st.just("a.mp4"),
        "url": st.just("https://example.org"),
        "tools": st.just([{"name": "look"}]),
        "images": st.lists(st.just("0.jpg"), max_size=1),
        "id": st.just(7),
    },
)


@given(
    talks=st.lists(
        TALK | st.lists(st.sampled_from(["one", "two", " ", "<b>", "<image>"]), max_size=4).map(lambda t: talk(*t)),
        max_size=5,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_plain_talk_is_read_as_any_other(tmp_path: Path, talks: list[dict[str, Any]]) -> None:
    (tmp_path / "0.jpg").write_bytes(b"0")
    found = read(tmp_path, *talks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "plain_segments", lambda row: None)
        assert read(tmp_path, *talks) == found
