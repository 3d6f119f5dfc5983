"""What is taken to another tool comes back as it was, and nothing in it names a system."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from calumma.platform.sources.preferences import Pair, read_pairs
from calumma.platform.study.exchange import argilla, label_studio
from calumma.platform.study.exchange.table import Unreadable, read, write
from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import AnswerJudgement, Judgement, Rating
from calumma.platform.study.prompts import as_parts
from calumma.platform.study.store.ratings import StudyError
from calumma.platform.study.store.tables import Database

from .conftest import made


def judged(study: Study) -> list[Rating]:
    """Three people's judgements of every item, on both sides."""
    issue = study.specification.issues[0]
    found = []
    for number, item in enumerate(study.items.values()):
        for seat, name in enumerate(("ann", "ben", "cleo")):
            shown = item.shown(seat)
            better = "left" if shown[0] == "ours" else "right"
            preference: Any = "same" if (number + seat) % 4 == 0 else better
            answers = [
                AnswerJudgement(
                    fulfils="fully" if system == "ours" else "not", issues=() if system == "ours" else (issue,)
                )
                for system in shown
            ]
            note = "<&> quotes \" and 'more'" if seat == 1 else ""
            judgement = Judgement(preference=preference, answers=tuple(answers), note=note)
            found.append(Rating(item.id, name, shown, judgement, 1_800_000_000.0 + number, 12.5))
    return found


def said(ratings: list[Rating]) -> set[tuple[Any, ...]]:
    """What was said of which system, whatever stood left."""
    return {
        (
            r.item, r.annotator, r.preferred, r.judgement.note,
            *sorted((system, a.fulfils, a.issues) for system, a in zip(r.systems, r.judgement.answers, strict=True)),
        )
        for r in ratings
    }  # fmt: skip


@pytest.mark.parametrize("format", ["jsonl", "label-studio", "argilla"])
def test_judgements_come_back_as_they_were(study: Study, database: Database, tmp_path: Path, format: str) -> None:
    given = judged(study)
    file = str(tmp_path / "out.json")
    write(format, study, given, file)
    back = read(format, study, file)
    assert said(back) == said(given)
    ratings = study.ratings(database)
    assert ratings.bring(back) == (12, 0)
    assert ratings.bring(back) == (0, 12)
    assert said(ratings.all()) == said(given)
    assert ratings.progress().complete == 4
    stranger = [Rating(r.item, "dan", r.systems, r.judgement) for r in back[:1]]
    with pytest.raises(StudyError, match="no seat left for the judgement of 'dan'"):
        ratings.bring(stranger)


@pytest.mark.parametrize("format", ["label-studio", "argilla"])
def test_what_annotators_see_elsewhere_names_no_system_and_keeps_pictures(
    study: Study, tmp_path: Path, format: str
) -> None:
    file = tmp_path / "out.json"
    write(format, study, [], str(file))
    seen = "".join(path.read_text() for path in tmp_path.glob("out*"))
    assert not re.search(r"\b(ours|rival)\b", seen)
    assert seen.count("data:image/png;base64,") == 9  # a picture in a prompt, and one in each answer
    if format == "label-studio":
        assert "<b onclick" not in seen
        assert "&lt;b onclick" in seen


def test_the_interface_of_label_studio_is_xml_whose_names_are_those_of_the_tasks(study: Study) -> None:
    from xml.etree import ElementTree

    root = ElementTree.fromstring(label_studio.config(study))
    controls = {tag.get("name"): tag for tag in root.iter() if tag.tag in ("Choices", "TextArea")}
    objects = {tag.get("name") for tag in root.iter("HyperText")}
    (task, *_) = label_studio.tasks(study, {item: judged(study)[:3] for item in study.items})
    assert objects == {"prompt", "answer_a", "answer_b"} <= set(task["data"])
    for annotation in task["annotations"]:
        for region in annotation["result"]:
            control = controls[region["from_name"]]
            assert control.get("toName") == region["to_name"]
            assert control.tag.lower() == region["type"]
            values = {choice.get("value") for choice in control.iter("Choice")}
            assert set(region["value"].get("choices", ())) <= values


def test_exports_of_label_studio_itself_are_read(study: Study) -> None:
    """As its server writes them: annotators by number, unfinished work, fields of its own."""
    item = next(iter(study.items.values()))

    def region(name: str, choices: list[str]) -> dict[str, Any]:
        about = "prompt" if name == "preference" else f"answer_{name[-1]}"
        return {
            "id": "Dx_aB91ISN", "from_name": name, "to_name": about, "type": "choices", "origin": "manual",
            "value": {"choices": choices},
        }  # fmt: skip

    result = [region("preference", ["left"]), region("fulfils_a", ["fully"]), region("fulfils_b", ["not"])]
    annotation = {
        "id": 1001, "completed_by": 7, "result": result, "was_cancelled": False, "ground_truth": False,
        "created_at": "2021-03-09T22:16:08.728353Z", "updated_at": "2021-03-09T22:16:08.728378Z", "lead_time": 4.288,
        "result_count": 0, "task": 1,
    }  # fmt: skip
    task = {
        "id": 1,
        "project": 83,
        "data": {"item": item.id},
        "annotations": [annotation, {**annotation, "was_cancelled": True}],
    }
    (rating,) = label_studio.ratings(study, [task])
    assert (rating.annotator, rating.preferred) == ("label-studio 7", item.shown(0)[0])
    assert rating.given_at == pytest.approx(1615328168.728353)
    with pytest.raises(ValueError, match="annotation 1001: preference must be"):
        label_studio.ratings(study, [{**task, "annotations": [{**annotation, "result": result[1:]}]}])


def test_records_of_argilla_keep_people_apart_by_their_uuids(study: Study) -> None:
    item = next(iter(study.items.values()))
    users = ["0b2c8d3e-0000-4000-8000-000000000001", "0b2c8d3e-0000-4000-8000-000000000002"]
    responses = {
        name: [{"value": value, "user_id": user} for user, value in zip(users, values, strict=True)]
        for name, values in (
            ("preference", ["left", "same"]), ("fulfils_a", ["fully", "partly"]), ("fulfils_b", ["not", "not"]),
        )
    }  # fmt: skip
    first, second = argilla.ratings(study, [{"id": item.id, "fields": {}, "responses": responses}])
    assert (first.annotator, second.annotator) == tuple(users)
    drafts = {name: [{**one, "status": "draft"} for one in given] for name, given in responses.items()}
    assert argilla.ratings(study, [{"id": item.id, "fields": {}, "responses": drafts}]) == []
    assert (first.preferred, second.preferred) == (item.shown(0)[0], None)


@pytest.mark.parametrize(
    ("format", "content", "said"),
    [
        ("jsonl", "{", "not JSON"),
        ("jsonl", '{"item": "x"}', "`ratings` is missing"),
        ("label-studio", "{}", "no label-studio export"),
        ("label-studio", "[1]", "no label-studio export"),
        ("argilla", '[{"fields": {}}]', "`id` is missing"),
        ("argilla", '[{"id": "unknown", "responses": {}}]', "`unknown` is missing"),
    ],
)
def test_files_of_another_kind_are_told(study: Study, tmp_path: Path, format: str, content: str, said: str) -> None:
    file = tmp_path / "in.json"
    file.write_text(content)
    if format == "label-studio" and content == "{}":
        assert read(format, study, str(file)) == []
        return
    with pytest.raises(Unreadable, match=said):
        read(format, study, str(file))


def test_preferences_become_pairs_of_the_winners_and_losers_words_and_pictures(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    assert write("preferences", study, judged(study), str(file)) == "4 pairs; 0 items without a winner give none"
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    for pair in pairs:
        assert pair["prompt"][-1]["role"] == "user"
        (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        assert [part["type"] for part in chosen["content"]] == ["text", "image_url"]
        assert chosen["content"][1] != rejected["content"][1]
        assert pair["votes"]["chosen"] > pair["votes"]["rejected"]
    assert {part["type"] for pair in pairs for turn in pair["prompt"] for part in turn["content"]} == {
        "text",
        "image_url",
    }
    read = list(read_pairs(str(file)))  # as training on preferences reads them
    for pair, found in zip(pairs, read, strict=True):
        assert isinstance(found, Pair)
        for document, name in ((found.chosen, "chosen"), (found.rejected, "rejected")):
            *_, answer = document.turns()
            assert answer.role == "assistant"
            assert as_parts(answer.segments) == pair[name][0]["content"]
    assert sum(len(found.chosen.images) for found in read if isinstance(found, Pair)) == 5
    tied = [
        Rating(r.item, r.annotator, r.systems, r.judgement.model_copy(update={"preference": "same"}))
        for r in judged(study)
    ]
    assert write("preferences", study, tied, str(file)) == "0 pairs; 4 items without a winner give none"


def test_a_study_of_safety_travels_too(tmp_path: Path) -> None:
    study = made(tmp_path, kind="safety", systems=[{"url": "http://127.0.0.1:1/v1", "name": "ours"}])
    given = [
        Rating(item.id, "ann", item.systems, Judgement(answers=(AnswerJudgement(label="unsafe"),)), 5.0)
        for item in study.items.values()
    ]
    for format in ("jsonl", "label-studio", "argilla"):
        file = str(tmp_path / f"{format}.json")
        write(format, study, given, file)
        back = read(format, study, file)
        assert [r.judgement.answers[0].label for r in back] == ["unsafe"] * 4
