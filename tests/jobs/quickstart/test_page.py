"""The quickstart's page and closing table, from made-up results. No cluster."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from calumma.jobs.quickstart import report
from calumma.jobs.quickstart.page import Curve, Story, page
from calumma.jobs.quickstart.questions import Answer, AnswerPart
from calumma.jobs.quickstart.steps import DIGITS, MEASURED

PICTURE = "data:image/png;base64,iVBORw=="
PLACE = f"/tmp/{'a-long-folder/' * 8}quickstart/storage/stages/finetuned/model"


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        **dict.fromkeys(MEASURED, 0.91),
        "image_reconstruction_error": 0.0123,
        "interleaved_valid": 0.5,
        "seconds": {"documents": 8.0, "cluster": 7.0, "stage1": 155.0},
        "model_uri": "models:/calumma-quickstart@champion",
        "model_directory": PLACE,
        "evaluation_directory": "/evaluation",
    }


def answer(kind: str, *parts: str, question: str = "Which <b>digit</b>?", picture: str | None = None) -> Answer:
    made = [AnswerPart(kind="image" if part == PICTURE else "text", value=part) for part in parts]
    return Answer(
        kind=kind, question=question, picture=picture, shows="seven" if picture else None, parts=made, seconds=1
    )


def falling(steps: int) -> Curve:
    return Curve(list(range(1, steps + 1)), [6 / step for step in range(1, steps + 1)])


def drawn(story: Story) -> list[list[list[float]]]:
    """Of each line on a page its points."""
    lines = re.findall(r'<polyline points="([^"]+)"', page(story))
    return [[[float(share) for share in point.split(",")] for point in line.split()] for line in lines]


def test_the_page_says_what_was_measured(results: dict[str, Any]) -> None:
    story = Story(
        results, fast=False, answers=[], sheets={"A sheet": b"\x89PNG"}, commands=[("Talk", "calumma 'chat'")]
    )
    made = page(story)
    assert "on this machine in 2 min 50 s" in made
    assert "Made with --fast" not in made
    for name, title in MEASURED.items():
        value = (
            "0.0123" if name == "image_reconstruction_error" else "50.0%" if name == "interleaved_valid" else "91.0%"
        )
        assert f'<td>{title}</td><td class="number">{value}</td>' in made
    assert made.count('<div class="card">') >= 2
    assert '<div class="card miss"><b>50.0%</b><span>Interleaved: alternation valid (target 100%)</span>' in made
    assert "<td>≥ 90%: reached</td>" in made
    assert "<td>100%: missed</td>" in made
    assert "width:100.0%" in made
    assert '<img alt="A sheet" title="A sheet" src="data:image/png;base64,iVBORw==">' in made
    assert "<pre><code>calumma &#39;chat&#39;</code></pre>" in made
    assert "Learning curves" not in made
    assert "Made with --fast" in page(Story(results, fast=True, answers=[]))


def test_answers_stand_in_their_order_words_with_their_picture(results: dict[str, Any]) -> None:
    counted = answer("interleaved", "two", PICTURE, "three", PICTURE, PICTURE, "end", question="Count.")
    asked = answer("recognition", "<i>seven</i>", picture=PICTURE)
    made = page(Story(results, fast=False, answers=[counted, asked, answer("generation")]))
    pieces = re.findall(r'<span class="piece">([^<]*)(<img)?', made)
    assert pieces == [
        ("&lt;i&gt;seven&lt;/i&gt;", ""),
        ("two", "<img"),
        ("three", "<img"),
        ("", "<img"),
        ("end", ""),
    ]
    assert "Which &lt;b&gt;digit&lt;/b&gt;?<img" in made
    assert "<em>(no answer)</em>" in made
    assert "asked about: seven" in made


def test_names_and_answers_cannot_become_markup(results: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    results["model_uri"] = results["model_directory"] = evil
    story = Story(
        results,
        fast=False,
        answers=[
            answer(kind, evil, question=evil, picture=f'{PICTURE}" onerror="x')
            for kind in ("recognition", "generation")
        ],
        sheets={evil: b""},
        commands=[(evil, evil)],
    )
    made = page(story)
    assert "<script" not in made
    assert '" onerror=' not in made
    assert made.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 9


def test_curves_of_the_stages_follow_each_other(results: dict[str, Any]) -> None:
    losses = {"loss_text": falling(40), "loss_image": falling(40)}
    stages = {"stage1": losses, "stage2": {"loss_text": falling(10)}, "finetune": losses}
    story = Story(results, False, [], curves={**stages, "train_image_tokenizer": {"reconstruction": falling(20)}})
    made = page(story)
    assert made.count("<svg ") == 2
    for title in ("Pre-training, stage 1", "Pre-training, stage 2", "Fine-tuning"):
        assert made.count(f">{title}</span>") == 1
    lines = drawn(story)
    assert [len(line) for line in lines] == [40, 10, 40, 40, 40, 20]
    begins = [line[0][0] for line in lines[:5]]
    assert begins == pytest.approx([100 * step / 90 for step in (1, 41, 51, 1, 51)], abs=0.01)


def test_a_loss_that_is_no_number_leaves_a_gap(results: dict[str, Any]) -> None:
    diverged = Curve([1, 2, 3], [6.0, math.nan, math.inf])
    assert drawn(Story(results, False, [], curves={"stage1": {"loss_text": diverged}})) == [[[100, 4.76]] * 2]
    nothing = Story(results, False, [], curves={"stage1": {"loss_text": Curve([1], [math.nan])}})
    assert "Learning curves" not in page(nothing)


@pytest.mark.parametrize("columns", [80, 200])
def test_paths_can_be_copied_whatever_the_width(results: dict[str, Any], columns: int) -> None:
    workdir = Path(PLACE).parents[3]
    out = io.StringIO()
    Console(file=out, width=columns).print(report.table(results))
    assert PLACE[:40] not in out.getvalue()
    assert all(len(line) <= columns for line in out.getvalue().splitlines())
    shown = " ".join(re.sub(r"[│┃]", " ", out.getvalue()).split())
    for word in ("Recognition:", "91.0%", "0.0123", "2 min 35 s", "train_image_tokenizer", "results.json"):
        assert word in shown
    assert [place for _, place in report.places(results, workdir)] == [
        str(workdir / "report.html"),
        "/evaluation/report.html",
        str(workdir / "results.json"),
        "models:/calumma-quickstart@champion",
        PLACE,
    ]
    assert set(DIGITS.targets) <= set(MEASURED)
