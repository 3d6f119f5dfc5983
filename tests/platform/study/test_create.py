"""Answers are stored one by one, nothing is asked twice, and a system that is away loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.evaluation.systems.prompts import Answer, Prompt, SystemAway
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import SpecificationError
from calumma.platform.study.create import AnswersMissing, create
from calumma.platform.study.folder import Study
from calumma.platform.study.items import make_items

from .conftest import KnownSystem, known_systems, made, specification


def test_a_study_holds_prompts_answers_and_items_with_their_pictures(study: Study) -> None:
    assert sorted(study.prompts) == ["p0", "p1", "p2", "p3"]
    assert study.prompts["p0"].mixed_modal
    assert not study.prompts["p1"].mixed_modal
    assert len(study.items) == 4
    answer = study.answer("rival", "p0")
    text, picture = answer.segments
    assert isinstance(text, Text)
    assert text.text.startswith("An answer to: What is this?")
    assert isinstance(picture, Image)
    assert picture.open().getpixel((0, 0)) == (30, 60, 200)
    assert {s.role for s in answer.segments} == {"assistant"}


def test_what_is_there_is_not_asked_again(tmp_path: Path) -> None:
    spec = specification(tmp_path)
    asked: list[KnownSystem] = []

    def opener(system: SystemSpecification) -> KnownSystem:
        asked.append(known_systems(system))
        return asked[-1]

    assert create(spec, opener=opener).asked == 8
    again = create(spec, opener=opener)
    assert (again.asked, again.kept) == (0, 8)
    assert len(asked) == 2  # systems were not even opened
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    changed = json.loads(lines[2]) | {"prompt": "Another question?"}
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:2], json.dumps(changed), *lines[3:]]))
    assert create(spec, opener=opener).asked == 2


def test_a_system_that_is_away_loses_nothing(tmp_path: Path) -> None:
    spec = specification(tmp_path, prompts=40)

    def away_in_the_middle(system: SystemSpecification) -> KnownSystem:
        def fails(prompt: Prompt) -> None:
            if "Question 30" in prompt.document.text:
                raise SystemAway("nobody answers at the endpoint")

        return KnownSystem(system.title, fails if system.title == "ours" else lambda prompt: None)

    with pytest.raises(AnswersMissing, match="ours cannot be used: nobody answers") as told:
        create(spec, opener=away_in_the_middle)
    assert "56 of 80 answers are stored" in str(told.value)  # 16 of ours, in rounds of 16, and all 40 of rival's
    assert not storage.exists(f"{spec.output}/study.json")
    with pytest.raises(SpecificationError, match="holds no study"):
        Study(spec.output)
    done = create(spec, opener=known_systems)
    assert (done.kept, done.asked) == (56, 24)
    assert len(Study(spec.output).items) == 40


def test_halves_of_surrogate_pairs_which_json_may_carry_stop_nothing(tmp_path: Path) -> None:
    spec = specification(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('\n{"id": "half", "prompt": "What is \\ud83d?"}\n')
    create(spec, opener=known_systems)
    assert Study(spec.output).prompts["half"].conversation.text == "What is ??"


def test_a_prompt_that_a_system_does_not_answer_is_told_and_may_be_left_out(tmp_path: Path) -> None:
    spec = specification(tmp_path)

    def refuses(system: SystemSpecification) -> KnownSystem:
        def fails(prompt: Prompt) -> Answer | None:
            if "Question 1" in prompt.document.text and system.title == "rival":
                return Answer(Document(()), error="too long")
            return None

        return KnownSystem(system.title, fails)

    with pytest.raises(AnswersMissing, match="rival does not answer 1 prompts: p1: too long"):
        create(spec, opener=refuses)
    create(spec, opener=refuses, leave_out=True)
    assert sorted(item.prompt for item in Study(spec.output).items.values()) == ["p0", "p2", "p3"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not JSON"),
        ('{"prompt": "x", "category": "nonsense"}', "category 'nonsense' is not one of"),
        ('{"prompt": "x", "kind": 1}', "unknown field 'kind'"),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"id": "p1", "prompt": "x"}', "another prompt is called 'p1' too"),
        ('{"prompt": [{"type": "image", "image": "missing.png"}]}', "missing.png"),
        ('{"prompt": [{"type": "image", "image": "data:image/svg+xml;base64,PHN2Zy8+"}]}', "SVG|not a readable image"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last turn must be the user's"),
    ],
)
def test_prompts_that_cannot_be_used_are_told_by_line_before_anything_is_asked(
    tmp_path: Path, record: str, said: str
) -> None:
    spec = specification(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(f"\n{record}\n")
    with pytest.raises(SpecificationError, match=f"line 5: .*({said})"):
        create(spec, opener=known_systems)


@pytest.mark.parametrize("seats", [1, 2, 3, 5])
def test_each_system_stands_left_as_often_as_right_in_every_category(seats: int) -> None:
    prompts = [(f"p{n}", ("advice", "story", "report")[n % 3]) for n in range(100)]
    items = make_items(prompts, ["b", "a", "c"], "preference", seed=7, seats=seats)
    assert len(items) == 300
    assert items == make_items(prompts, ["c", "a", "b"], "preference", seed=7, seats=seats)
    for category in ("advice", "story", "report", None):
        of = [item for item in items if category in (None, item.category)]
        for pair in {item.systems for item in of}:
            left = [item.shown(seat)[0] for item in of if item.systems == pair for seat in range(seats)]
            assert abs(left.count(pair[0]) - left.count(pair[1])) <= 1
    assert len({item.left_first for item in items if item.systems == ("a", "b")}) == 2
    other = make_items(prompts, ["a", "b"], "preference", seed=8, seats=seats)
    assert [item.id for item in other] != [item.id for item in items if item.systems == ("a", "b")]


def test_more_than_two_systems_are_compared_in_pairs_and_safety_judges_each_alone(tmp_path: Path) -> None:
    systems = [{"url": "http://127.0.0.1:1/v1", "name": name} for name in ("a", "b", "c")]
    study = made(tmp_path, systems=systems)
    assert sorted({item.systems for item in study.items.values()}) == [("a", "b"), ("a", "c"), ("b", "c")]
    safety = made(tmp_path, systems=systems[:1], kind="safety", output=str(tmp_path / "safety"))
    assert {item.systems for item in safety.items.values()} == {("a",)}


def test_a_study_may_be_in_object_storage_with_its_judgements_elsewhere(tmp_path: Path, s3: str) -> None:
    study = made(tmp_path, output=f"{s3}/study")
    assert study.answer("ours", "p1").text.startswith("An answer to: Question 1?")
    with pytest.raises(SpecificationError, match="cannot hold a database; name one: --database postgresql"):
        _ = study.default_database
