"""Evaluation: what is asked, how answers are marked, and that the judge is fair. No model is needed for any of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.jobs.quickstart import digits
from calumma.model.document import Document, Image, Role, Segment, Text
from calumma.platform.cluster import runner
from calumma.platform.cluster.progress import no_progress
from calumma.platform.evaluation import evaluate, judge, tasks
from calumma.platform.evaluation.specification import EvaluateSpecification, EvaluationTask
from calumma.platform.evaluation.tasks import Case, Kind
from calumma.platform.storage.manifest import Manifest

GREY = {word: 20 * (i + 1) for i, word in enumerate(digits.WORDS)}
BACK = {value: word for word, value in GREY.items()}


def picture(word: str) -> PILImage.Image:
    """A picture that `see` reads as the word."""
    return PILImage.new("L", (8, 8), GREY[word])


def see(pictures: Sequence[PILImage.Image]) -> list[str]:
    return [BACK[p.convert("L").getpixel((0, 0))] for p in pictures]  # type: ignore[index]


def image(word: str, role: Role | None = None) -> Image:
    return Image(picture(word), word, role)


def asked(kind: Kind, *words: str) -> Case:
    answer: list[Segment] = [Text(words[0], "assistant")]
    if kind != "recognition":
        answer = [s for word in words for s in (Text(word, "assistant"), image(word, "assistant"))]
    return tasks.make_case(kind, Document((Text("What?", "user"), *answer)))


def answer(*pieces: str | Image) -> Document:
    return Document(tuple(Text(p) if isinstance(p, str) else p for p in pieces))


# -- cases


def test_a_case_is_the_prompt_without_its_last_answer() -> None:
    turns = (Text("Hello.", "user"), Text("Hi.", "assistant"), Text("Which digit? ", "user"), image("six", "user"))
    case = tasks.make_case("recognition", Document((*turns, Text(" Six. ", "assistant"))))
    assert case.prompt.segments == turns
    assert case.words == ("six",)


@pytest.mark.parametrize(
    "segments",
    [(), (Text("page"),), (Text("only a question", "user"),), (Text("a", "assistant"), Text("b", "user"))],
)
def test_what_is_no_question_and_answer_is_refused(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(tasks.InvalidCase, match="must end with a user's and an assistant's turn"):
        tasks.make_case("recognition", Document(segments))


@pytest.mark.parametrize("kind", ["generation", "interleaved"])
def test_pictures_that_say_not_what_they_show_are_refused(kind: Kind) -> None:
    unlabelled = Document((Text("Draw.", "user"), Image(picture("one"), None, "assistant")))
    with pytest.raises(tasks.InvalidCase, match="each with a caption"):
        tasks.make_case(kind, unlabelled)


# -- marks


@pytest.mark.parametrize(
    ("said", "right"),
    [("seven", True), (" Seven.\n", True), ("seventeen", False), ("", False), ("seven eight", False), ("eight", False)],
)
def test_recognition_wants_the_exact_word(said: str, right: bool) -> None:
    assert tasks.grade(asked("recognition", "seven"), answer(said), see).right is right


def test_recognition_with_a_picture_in_the_answer_is_wrong() -> None:
    assert not tasks.grade(asked("recognition", "seven"), answer("seven", image("seven")), see).right


def test_generation_is_the_judges_verdict_on_one_picture() -> None:
    case = asked("generation", "four")
    assert tasks.grade(case, answer(image("four")), see).right
    assert not tasks.grade(case, answer(image("nine")), see).right
    assert not tasks.grade(case, answer(), see).right
    assert not tasks.grade(case, answer(image("four"), image("four")), see).right


def test_interleaved_marks_alternation_words_and_digits_apart() -> None:
    case = asked("interleaved", "two", "three")
    perfect = tasks.grade(case, answer("two ", image("two"), " three ", image("three")), see)
    assert (perfect.right, perfect.words, perfect.digits) == (True, True, (True, True))
    wrong_digit = tasks.grade(case, answer("two", image("two"), "three", image("eight")), see)
    assert (wrong_digit.right, wrong_digit.words, wrong_digit.digits) == (True, True, (True, False))
    wrong_word = tasks.grade(case, answer("two", image("two"), "four", image("three")), see)
    assert (wrong_word.right, wrong_word.words, wrong_word.digits) == (True, False, (True, True))


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        ("two",),
        ("two", image("two")),  # one short
        (image("two"), "two", image("three"), "three"),  # picture first
        ("two", image("two"), image("three"), "three"),
        ("two", image("two"), "three", image("three"), "four"),  # goes on
        ("two", image("two"), "three", image("three"), "four", image("four")),
    ],
)
def test_interleaved_answers_out_of_turn_are_not_valid(pieces: tuple[str | Image, ...]) -> None:
    assert not tasks.grade(asked("interleaved", "two", "three"), answer(*pieces), see).right


def test_a_missing_picture_counts_as_a_wrong_digit() -> None:
    found = tasks.grade(asked("interleaved", "two", "three"), answer("two", image("two")), see)
    assert found.digits == (True, False)
    assert tasks.summary("interleaved", [found]) == {"valid": 0.0, "words": 0.0, "digits": 0.5}


pieces = st.lists(st.one_of(st.sampled_from(["two", " ", "", "three "]), st.sampled_from([image("two"), image("one")])))


@given(pieces)
def test_pieces_never_have_empty_or_neighbouring_texts(given: list[str | Image]) -> None:
    found = tasks.texts_and_images(answer(*given))
    assert all(not (isinstance(a, Text) and isinstance(b, Text)) for a, b in pairwise(found))
    assert all(p.text.strip() for p in found if isinstance(p, Text))
    assert [p for p in found if isinstance(p, Image)] == [p for p in given if isinstance(p, Image)]


def test_shares_are_means_and_an_empty_task_has_none() -> None:
    marks = [tasks.Grade(True, "one"), tasks.Grade(False, "two"), tasks.Grade(True, "six"), tasks.Grade(True, "six")]
    assert tasks.summary("recognition", marks) == {"accuracy": 0.75}
    with pytest.raises(ValueError, match="without cases"):
        tasks.summary("generation", [])


# -- the judge


@pytest.fixture(scope="module")
def scans() -> tuple[list[digits.Scan], list[digits.Scan]]:
    return digits.split(digits.read_scans(), seed=0)


@pytest.fixture(scope="module")
def trained(scans: tuple[list[digits.Scan], list[digits.Scan]]) -> judge.Judge:
    return judge.Judge.train([(s.picture(), s.word) for s in scans[0]])


def test_the_judge_knows_held_out_scans(
    trained: judge.Judge, scans: tuple[list[digits.Scan], list[digits.Scan]]
) -> None:
    assert trained.accuracy([(s.picture(), s.word) for s in scans[1]]) > 0.97


def test_the_judge_gives_a_verdict_on_pictures_of_any_size_and_mode(
    trained: judge.Judge, scans: tuple[list[digits.Scan], list[digits.Scan]]
) -> None:
    scan = scans[0][0]
    large = scan.picture().convert("RGB").resize((64, 64), PILImage.Resampling.NEAREST)
    assert trained.classify([scan.picture(), large]) == [scan.word, scan.word]
    assert trained.classify([]) == []


def test_the_judge_is_not_fooled_by_wrong_labels(
    trained: judge.Judge, scans: tuple[list[digits.Scan], list[digits.Scan]]
) -> None:
    shifted = [(s.picture(), digits.WORDS[(s.digit + 1) % 10]) for s in scans[1]]
    assert trained.accuracy(shifted) < 0.03


def test_features_are_the_mean_grey_of_boxes() -> None:
    grey = np.zeros((32, 32), np.uint8)
    grey[0:4, 4:8] = 255
    found = judge.features([PILImage.fromarray(grey)])
    assert found.shape == (1, 64)
    assert found[0, 1] == 1.0
    assert found.sum() == 1.0


def test_a_judge_without_labels_says_what_to_check() -> None:
    with pytest.raises(judge.JudgeDataError, match="judge_training"):
        judge.Judge.train([(picture("one"), "one"), (picture("one"), "one")])
    able = judge.Judge.train([(picture("one"), "one"), (picture("nine"), "nine")])
    with pytest.raises(judge.JudgeDataError, match="judge_held_out"):
        able.accuracy([])


# -- what is asked of the model, and what is kept


def test_words_are_taken_greedily_and_room_is_left_for_one_picture_too_many() -> None:
    reading = evaluate.sampling_params(asked("recognition", "one"), seed=3, image_length=16, expected_tokens=4)
    assert (reading.mode, reading.text.temperature, reading.seed) == ("text", 0.0, 3)
    drawing = evaluate.sampling_params(asked("generation", "one"), 0, 16, 18)
    assert drawing.mode == "image"
    counting = evaluate.sampling_params(asked("interleaved", "one", "two"), 0, 16, 42)
    assert (counting.mode, counting.max_images) == ("interleaved", 3)
    assert counting.max_tokens >= 42 + 18


def test_an_evaluation_is_not_finished_when_its_alias_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = [str(tmp_path / "one")]
    for name in ("one", "two"):
        Manifest(kind="model").write(str(tmp_path / name))
    labelled = [(picture("one"), "one"), (picture("nine"), "nine")]
    monkeypatch.setattr("calumma.platform.tracking.registry.model_source", lambda uri, tracking: champion[0])
    monkeypatch.setattr(evaluate, "_labelled_images", lambda uri: labelled)
    monkeypatch.setattr(evaluate, "_cases", lambda task, spec: [asked("recognition", "six")])
    monkeypatch.setattr(evaluate, "_answers", lambda spec, cases, progress: iter([answer("six")]))
    spec = EvaluateSpecification(
        storage=str(tmp_path),
        model="models:/m@champion",
        tasks=[EvaluationTask(name="words", kind="recognition", documents="held-out")],
        judge_training="training",
        judge_held_out="held-out",
    )
    manifest = evaluate.evaluate(spec, MagicMock(id="run"), no_progress)
    assert manifest.report["words_accuracy"] == 1.0
    assert runner.reusable_result(spec) == manifest
    champion[0] = str(tmp_path / "two")
    assert runner.reusable_result(spec) is None


def test_answers_are_kept_with_what_was_expected() -> None:
    case = asked("generation", "four")
    (line,) = evaluate._lines([case], [tasks.grade(case, answer(image("nine")), see)]).splitlines()
    assert json.loads(line) == {"question": "What?", "expected": "four", "said": "nine", "right": False}
