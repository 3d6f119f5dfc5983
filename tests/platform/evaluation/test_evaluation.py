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
from calumma.platform import storage
from calumma.platform.cluster import runner
from calumma.platform.cluster.progress import no_progress
from calumma.platform.evaluation import evaluate, judge, tasks
from calumma.platform.evaluation.benchmarks.conversations import _differences
from calumma.platform.evaluation.judges.kinds import named
from calumma.platform.evaluation.specification import EvaluateSpecification, EvaluationTask
from calumma.platform.evaluation.suite import running
from calumma.platform.evaluation.systems.prompts import Answer, Prompt
from calumma.platform.evaluation.tasks import Case, Kind
from calumma.platform.reports.confusion import confusion_counts, confusion_matrix
from calumma.platform.shards import documents as document_shards
from calumma.platform.specification import Resources
from calumma.platform.storage.manifest import FileEntry, Manifest

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


def conversations(root: Path, name: str, *documents: Document) -> str:
    data = document_shards.to_parquet(list(documents))
    storage.write_bytes(f"{root}/curated/{name}/documents.parquet", data)
    entry = FileEntry.from_bytes("documents.parquet", data, rows=len(documents))
    Manifest(kind=document_shards.CURATED, files=[entry]).write(f"{root}/curated/{name}")
    return f"curated/{name}"


class Painter:
    """Answers as it is told to: reads right, draws the same four whatever it is asked for."""

    name = "painter"

    def answer(self, prompts: Sequence[Prompt], progress: object = None) -> list[Answer]:
        return [Answer(self._said(prompt)) for prompt in prompts]

    def _said(self, prompt: Prompt) -> Document:
        if prompt.sampling.mode == "text":
            return Document(tuple(Text(see([shown.open()])[0]) for shown in prompt.document.images))
        return Document((image("four"),))

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, *_: object) -> None: ...


def conversation_specification(root: Path, model: str) -> EvaluateSpecification:
    """Three readings, three drawings, one telling, answered in this process."""
    words = ("four", "six", "nine")
    conversations(root, "shown", *(Document((image(word),)) for word in words for _ in range(3)))
    read = [Document((Text("Which?", "user"), image(word, "user"), Text(word, "assistant"))) for word in words]
    conversations(root, "read", *read)
    draw = [Document((Text(f"Draw {word}.", "user"), image(word, "assistant"))) for word in words]
    conversations(root, "draw", *draw)
    told = [segment for word in words[:2] for segment in (Text(word, "assistant"), image(word, "assistant"))]
    conversations(root, "tell", Document((Text("Tell.", "user"), *told)))
    return EvaluateSpecification(
        storage=str(root),
        resources=Resources(workers=0),
        model=model,
        tasks=[
            EvaluationTask(name="reading", kind="recognition", documents="curated/read"),
            EvaluationTask(name="drawing", kind="generation", documents="curated/draw"),
            EvaluationTask(name="telling", kind="interleaved", documents="curated/tell"),
        ],
        judge_training="curated/shown",
        judge_held_out="curated/shown",
        labels=["nine", "six"],
    )


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateSpecification:
    """For a system that reads well and draws but fours."""
    monkeypatch.setattr(running, "open_system", lambda *_: Painter())
    Manifest(kind="model").write(str(tmp_path / "one"))
    found = conversation_specification(tmp_path, "one")
    return found.model_copy(update={"tasks": found.tasks[:2]})


def test_drawings_that_differ_half_as_much_as_real_pictures() -> None:
    real = [PILImage.new("RGB", (8, 8), (shade,) * 3) for shade in (20, 120, 220, 0, 100)]
    drawn = [PILImage.new("RGB", (8, 8), (shade,) * 3) for shade in (70, 120, 170, 30, 80)]
    words = ["six", "six", "six", "nine", "nine"]
    found = _differences(words, [[picture] for picture in drawn], [[picture] for picture in real])
    assert found["diversity_of_real"] == pytest.approx(0.5, abs=1e-5)
    assert found["diversity_within"] == pytest.approx((200 / 3 + 50) / 2 / 255, abs=1e-5)


def test_a_system_that_draws_always_the_same_is_seen(spec: EvaluateSpecification) -> None:
    run = MagicMock(id="run")
    manifest = evaluate.evaluate(spec, run, no_progress)
    manifest.verify(spec.output_uri, content=True)
    found = manifest.report
    assert (found["reading_accuracy"], found["drawing_accuracy"]) == (1.0, pytest.approx(1 / 3))
    assert (found["drawing_distinct"], found["drawing_diversity"]) == (pytest.approx(1 / 3), 0.0)
    assert found["judge_accuracy"] == 1.0
    assert found["cases"] == {"reading": 3, "drawing": 3}
    logged = {call.args[1] for call in run.log_image.call_args_list}
    assert logged >= {"evaluation/reading_confusion.png", "evaluation/drawing_confusion.png", "evaluation/drawing.png"}
    lines = storage.read_bytes(storage.join(spec.output_uri, "drawing.jsonl")).decode().splitlines()
    assert json.loads(lines[1]) == {"question": "Draw six.", "expected": "six", "said": "four", "right": False}
    assert storage.read_bytes(storage.join(spec.output_uri, "report.html")).decode().count("data:image/png") > 4


def test_a_confusion_matrix_counts_what_was_asked_for_and_what_came() -> None:
    pairs = [("six", "four"), ("six", "six"), ("nine", "no picture"), ("six", "four")]
    assert confusion_counts(pairs, ["nine", "six", "four"]) == [[0, 0, 0, 1], [0, 1, 2, 0], [0, 0, 0, 0]]
    whole = confusion_matrix([("six", "six")], ["six", "four"], "asked for", "drawn")
    missed = confusion_matrix([("six", "four")], ["six", "four"], "asked for", "drawn")
    assert (46, 160, 67) in {colour for _, colour in whole.getcolors(1 << 20)}
    assert (218, 54, 51) in {colour for _, colour in missed.getcolors(1 << 20)}


def test_an_evaluation_is_not_finished_when_its_alias_has_moved(
    spec: EvaluateSpecification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = [str(tmp_path / "one")]
    Manifest(kind="model").write(str(tmp_path / "two"))
    monkeypatch.setattr("calumma.platform.tracking.registry.model_source", lambda uri, tracking: champion[0])
    spec = spec.model_copy(update={"model": "models:/m@champion"})
    manifest = evaluate.evaluate(spec, MagicMock(id="run"), no_progress)
    assert runner.reusable_result(spec) == manifest
    champion[0] = str(tmp_path / "two")
    assert runner.reusable_result(spec) is None


def test_benchmarks_stand_beside_the_tasks(spec: EvaluateSpecification) -> None:
    spec = spec.model_copy(update={"suite": "safety", "only": ["look_alikes"]})
    found = evaluate.evaluate(spec, MagicMock(id="run"), no_progress).report
    assert found["look_alikes/refused"] == 1.0
    assert found["reading_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("said", "label"),
    [("A six.", "six"), ("It is sixteen", "sixteen"), ("Six, or nine", "six"), ("none", "unsure"), ("", "unsure")],
)
def test_a_model_as_judge_names_a_label(said: str, label: str) -> None:
    assert named(said, ["six", "sixteen", "nine"]) == label


def test_a_model_is_asked_all_three_kinds_without_a_cluster(tmp_path: Path, model_directory: Path) -> None:
    spec = conversation_specification(tmp_path, str(model_directory))
    manifest = evaluate.evaluate(spec, MagicMock(id="run"), no_progress)
    found = manifest.report
    assert found["cases"] == {"reading": 3, "drawing": 3, "telling": 1}
    assert found["drawing_distinct"] > 0
    assert {"telling_valid", "telling_words", "telling_digits", "reading_accuracy", "judge_accuracy"} <= set(found)
    assert "no picture" not in storage.read_bytes(storage.join(spec.output_uri, "drawing.jsonl")).decode()
    assert runner.reusable_result(spec) == manifest
