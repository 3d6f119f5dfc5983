"""The same pair, in every layout that TRL, LLaMA-Factory and ms-swift have, with images in question and answers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from calumma.model.document import Document, Text
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.preferences import Pair, read_pairs


def picture(shade: int) -> str:
    buffer = io.BytesIO()
    PILImage.new("RGB", (2, 2), (shade, 0, 0)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(words: Any) -> dict[str, Any]:
    return {"role": "user", "content": words}


def assistant(words: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


def read(folder: Path, *records: dict[str, Any], name: str = "pairs.jsonl") -> list[Pair | BadInput]:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_pairs(str(folder)))


def said(document: Document) -> list[Any]:
    return [
        (s.role, s.text if isinstance(s, Text) else s.open().getpixel((0, 0))[0], s.trained)  # type: ignore[index]
        for s in document.segments
    ]


PLAIN: dict[str, dict[str, Any]] = {
    "TRL, standard": {"prompt": "Which?", "chosen": "this", "rejected": "that"},
    "TRL, conversational": {"prompt": [user("Which?")], "chosen": [assistant("this")], "rejected": [assistant("that")]},
    "TRL, implicit prompt": {
        "chosen": [user("Which?"), assistant("this")],
        "rejected": [user("Which?"), assistant("that")],
    },
    "LLaMA-Factory, sharegpt": {
        "conversations": [{"from": "human", "value": "Which?"}],
        "chosen": {"from": "gpt", "value": "this"},
        "rejected": {"from": "gpt", "value": "that"},
    },
    "LLaMA-Factory, alpaca": {"instruction": "Which?", "input": "", "chosen": "this", "rejected": "that"},
    "ms-swift": {"messages": [user("Which?"), assistant("this")], "rejected_response": "that"},
}


@pytest.mark.parametrize("layout", PLAIN)
def test_layouts_say_the_same(layout: str, tmp_path: Path) -> None:
    [pair] = read(tmp_path, PLAIN[layout])
    assert isinstance(pair, Pair), pair
    assert said(pair.chosen) == [("user", "Which?", True), ("assistant", "this", True)]
    assert said(pair.rejected) == [("user", "Which?", True), ("assistant", "that", True)]


MARKED: dict[str, dict[str, Any]] = {
    "marks": {
        "prompt": "Draw <image>",
        "chosen": "here: <image>",
        "rejected": "<image> or <image>",
        "images": [picture(n) for n in (1, 2, 3, 4)],
    },
    "parts": {
        "prompt": [user([{"type": "text", "text": "Draw "}, {"type": "image"}])],
        "chosen": [assistant([{"type": "text", "text": "here: "}, {"type": "image", "image": picture(2)}])],
        "rejected": [assistant("<image> or <image>")],
        "images": [picture(1), picture(3), picture(4)],
    },
}


@pytest.mark.parametrize("layout", MARKED)
def test_images_of_question_and_answers_stand_where_they_belong(layout: str, tmp_path: Path) -> None:
    [pair] = read(tmp_path, MARKED[layout])
    assert isinstance(pair, Pair), pair
    question = [("user", "Draw", True), ("user", 1, True)]
    assert said(pair.chosen) == [*question, ("assistant", "here:", True), ("assistant", 2, True)]
    assert said(pair.rejected) == [*question, ("assistant", 3, True), ("assistant", "or", True), ("assistant", 4, True)]


def test_earlier_answers_are_only_read(tmp_path: Path) -> None:
    earlier = [user("Hello"), assistant("Hi"), user("Which?")]
    [pair] = read(tmp_path, {"prompt": earlier, "chosen": [assistant("this")], "rejected": [assistant("that")]})
    assert isinstance(pair, Pair)
    assert [(s.role, s.trained) for s in pair.chosen.segments if s.role == "assistant"] == [
        ("assistant", False),
        ("assistant", True),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "this", "rejected": "that"}, "has no prompt: `chosen` and `rejected` begin with different turns"),
        ({"prompt": "Which?", "chosen": "this"}, "has no `chosen` and `rejected`; it has prompt, chosen"),
        ({"prompt": "Which?", "chosen": "this", "rejected": "this"}, "the chosen and the rejected answer are equal"),
        ({"prompt": [assistant("Hi")], "chosen": "this", "rejected": "that"}, "does not end with a question"),
        ({**PLAIN["ms-swift"], "images": [picture(1)]}, "has 1 images, and 0 <image> marks in the prompt"),
        ({"prompt": "Which?", "chosen": [user("this")], "rejected": "that"}, "`chosen` is no answer of the assistant"),
    ],
)
def test_wrong_pairs_are_told_by_line_and_cost_themselves(record: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = PLAIN["TRL, standard"]
    first, bad, last = read(tmp_path, good, record, good)
    assert isinstance(first, Pair)
    assert isinstance(last, Pair)
    assert isinstance(bad, BadInput)
    assert bad.name.endswith("line 2")
    assert reason in bad.reason
