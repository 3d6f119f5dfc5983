"""The report says what the judgements amount to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import AnswerJudgement, Judgement, Rating
from calumma.platform.study.report.findings import MIXED, NONE, TEXT, find
from calumma.platform.study.report.publish import Unknown, as_json, publish, summary
from calumma.platform.study.store.dialogues import Dialogue, Dialogues
from calumma.platform.study.store.tables import Database

from .conftest import made
from .test_exchange import judged


def test_votes_agreement_and_issues_of_a_study(study: Study, database: Database) -> None:
    study.ratings(database).bring(judged(study))
    found, place = publish(study, database)
    (duel,) = found.duels[""]
    assert (duel.first, duel.second, duel.wins, duel.ties, duel.losses) == ("ours", "rival", 4, 0, 0)
    assert found.fulfilment[""]["ours"]["fully"].value == 1.0
    assert found.fulfilment[""]["rival"]["not"].value == 1.0
    assert {MIXED, TEXT, "category: how-to", "category: comparison"} < set(found.duels)
    assert found.duels[MIXED][0].rate.total == 1
    first, *_ = study.specification.issues
    assert (found.issues["rival"][first].value, found.issues["ours"][first].value) == (1.0, 0.0)
    assert found.agreements["fulfilment"].alpha_nominal == 1.0
    assert (found.complete, found.judgements, found.annotators) == (4, 12, 3)
    page = Path(place, "report.html").read_text()
    assert "&lt;&amp;&gt; quotes" in page  # an annotator's note, escaped
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs nothing else"
    told = json.loads(Path(place, "report.json").read_text())
    assert told["duels"]["all"][0]["rate"]["value"] == 1.0
    lines = "\n".join(summary(found))
    assert "ours against rival: 100.0 %" in lines
    assert "12 judgements by 3 people, 4 of 4 items have 3" in lines


def test_an_annotators_judgements_may_be_left_out(study: Study, database: Database) -> None:
    study.ratings(database).bring(judged(study))
    found, place = publish(study, database, without=["ben"])
    assert (found.judgements, found.complete) == (8, 0)
    assert "Without the judgements of ben." in Path(place, "report.html").read_text()
    with pytest.raises(Unknown, match="eve has judged nothing; there are ann, ben, cleo"):
        publish(study, database, without=["eve"])


def test_a_study_without_any_judgement_has_a_report_too(study: Study, database: Database) -> None:
    found, place = publish(study, database)
    assert found.judgements == 0
    assert "0 / 4" in Path(place, "report.html").read_text()


def test_undecided_items_are_ties_and_have_no_fulfilment(study: Study) -> None:
    item = next(iter(study.items.values()))
    said = [("left", "fully"), ("same", "partly"), ("right", "not")]
    ratings = [
        Rating(
            item.id, f"ann{n}", item.systems,
            Judgement.model_validate({"preference": p, "answers": [{"fulfils": f}, {"fulfils": "not"}]}),
        )
        for n, (p, f) in enumerate(said)
    ]  # fmt: skip
    spec = study.specification
    found = find(spec.name, spec.kind, spec.names, 3, study.items, {}, ratings, (), spec.issues)
    (duel,) = found.duels[""]
    assert (duel.ties, duel.undecided, duel.rate.value) == (1, 1, 0.5)
    assert found.fulfilment[""][item.systems[0]][NONE].count == 1
    assert found.agreements["preference"].shares == {3: 0.0, 2: 0.0, 1: 1.0}


def test_more_than_two_systems_have_strengths_and_a_picture_of_them(tmp_path: Path, database: Database) -> None:
    systems = [{"url": "http://127.0.0.1:1/v1", "name": name} for name in ("best", "middle", "worst")]
    study = made(tmp_path, prompts=8, systems=systems, annotators=1)
    order = ["best", "middle", "worst"]
    ratings = []
    for item in study.items.values():
        better = min(item.systems, key=order.index)
        preference = "left" if item.systems[0] == better else "right"
        answers = (AnswerJudgement(fulfils="fully"), AnswerJudgement(fulfils="fully"))
        ratings.append(Rating(item.id, "ann", item.systems, Judgement(preference=preference, answers=answers)))
    study.ratings(database).bring(ratings)
    found, place = publish(study, database)
    assert [one.system for one in found.strengths] == order
    assert found.strengths[0].expected > found.strengths[1].expected > found.strengths[2].expected
    assert "whisker" in Path(place, "report.html").read_text()


def test_the_safety_table_has_prompts_and_red_team_dialogues(tmp_path: Path, database: Database) -> None:
    study = made(tmp_path, kind="safety", systems=[{"url": "http://127.0.0.1:1/v1", "name": "ours"}])
    ratings = []
    for number, item in enumerate(study.items.values()):
        labels = [("safe", "safe", "unsafe"), ("unsafe", "unsafe", "safe"), ("safe", "unsafe", "unsure"), ("safe",) * 3]
        for name, label in zip(("ann", "ben", "cleo"), labels[number], strict=True):
            judgement = Judgement.model_validate({"answers": [{"label": label}]})
            ratings.append(Rating(item.id, name, item.systems, judgement))
    study.ratings(database).bring(ratings)
    dialogues = Dialogues(database, study.specification.name, study.specification.names)
    for label, harm in (("safe", None), ("safe", None), ("unsafe", "violence")):
        talk = dialogues.current("dan")
        dialogues.say("dan", talk.id, 0, "user", [{"type": "text", "text": "Hello"}])
        dialogues.say("dan", talk.id, 1, "assistant", [{"type": "text", "text": "Good day"}])
        dialogues.label("dan", talk.id, label, harm, "")  # type: ignore[arg-type]
    found, place = publish(study, database)
    prompts, talks = found.safety
    assert {label: of.count for label, of in prompts.shares.items()} == {"safe": 2, "unsafe": 1, "unsure": 1}
    assert {label: of.count for label, of in talks.shares.items()} == {"safe": 2, "unsafe": 1, "unsure": 0}
    assert found.harms["violence"] == {"safe": 0, "unsafe": 1, "unsure": 0}
    page = Path(place, "report.html").read_text()
    assert "20,000 crowdsourced prompts and 445 red-team dialogues" in page
    assert "66.7 % (2)" in page
    assert as_json(found)["safety"][1]["shares"]["unsafe"]["low"] > 0


def test_open_dialogues_are_not_counted() -> None:
    found = find("s", "safety", ["ours"], 3, {}, {}, (), [Dialogue("d", "ann", "ours")])
    assert found.safety == []
