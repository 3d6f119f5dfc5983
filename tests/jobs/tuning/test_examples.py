"""Examples are looked at before anything is trained: what is wrong is told with the first place that shows it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from calumma.jobs.tuning.examples import WrongExamples, check, find_source
from calumma.model.document import Document, Image, Text


def picture() -> str:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def conversation(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": words} for who, words in turns], **more}


def written(folder: Path, *records: dict[str, Any]) -> str:
    file = folder / "examples.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


GOOD = conversation(("human", "What is it?"), ("gpt", "a cat"))


def looked_at(place: str, share: float = 0.0) -> Any:
    return check(find_source(place, None, {}), share)


def test_good_examples_are_counted(tmp_path: Path) -> None:
    drawn = conversation(("human", "Draw one."), ("gpt", "here: <image>"), images=[picture()])
    found = looked_at(written(tmp_path, GOOD, drawn))
    assert (found.documents, found.conversations, found.wrong) == (2, 2, 0)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (conversation(("gpt", "a cat")), r"1 is wrong: an answer without a question; the first: .*: line 2"),
        (conversation(("human", "What is it?")), r"1 is wrong: a question without an answer; the first: .*: line 2"),
        (
            conversation(("human", "What is it?"), ("gpt", "<image>")),
            r"has 1 <image> marks and 0 images; they must agree; the first: .*: line 2",
        ),
    ],
)
def test_what_is_wrong_is_told_with_the_first_line_that_shows_it(
    record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    place = written(tmp_path, GOOD, record, GOOD, GOOD)
    with pytest.raises(WrongExamples, match=said) as told:
        looked_at(place)
    assert "1 of 4 examples are wrong, more than --max-bad-share 0 allows" in str(told.value)
    assert looked_at(place, share=0.25).documents == 3


def test_images_without_a_mark_are_no_guess(tmp_path: Path) -> None:
    unmarked = conversation(("human", "What is it?"), ("gpt", "a cat"), images=[picture()])
    place = written(tmp_path, unmarked, unmarked)
    with pytest.raises(WrongExamples, match=r"line 1: has images and no mark .* --option unmarked=first"):
        find_source(place, None, {})
    assert check(find_source(place, None, {"unmarked": "first"}), 0.0).documents == 2


def test_nothing_to_read_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "notes.xyz").write_bytes(b"\x00\x01")
    with pytest.raises(WrongExamples, match="no format is known"):
        find_source(str(tmp_path), None, {})


def test_a_question_and_the_answer_that_is_expected() -> None:
    from calumma.jobs.tuning.samples import questions

    image = Image(PILImage.new("RGB", (4, 4)))
    talk = Document((Text("one?", "user"), Text("1", "assistant"), Text("two?", "user"), Text("2", "assistant")))
    pair = Document((image, Text("a cat")))
    lone = Document((Text("a page"),))
    found = list(questions(iter([talk, pair, lone])))
    assert [(q.text, e.text) for q, e in found] == [("one?1two?", "2"), ("", "a cat")]
