"""Answers of a stage in training, and at its end, from the weights that its workers hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors

from calumma.model import load
from calumma.model.document import Document, Image
from calumma.platform import storage
from calumma.platform.training import samples
from calumma.platform.training.evaluation import evaluate
from calumma.platform.training.steps import early

STEPS = 10


def said(answers: list[Document]) -> list[list[str]]:
    return [["(image)" if isinstance(s, Image) else s.text for s in answer.segments] for answer in answers]


@pytest.mark.parametrize("name", ["early", "early, two workers"])
def test_the_best_weights_are_published_and_answer_at_the_end(scenarios: Any, root: str, name: str) -> None:
    """The data of the last two steps is chaos: what had the lowest held-out loss before it comes back to the workers,
    who publish it, and answer prompts and tasks with it. No model is loaded for that."""
    report, spec = scenarios.report(name), scenarios.specification("early")
    assert report["best_step"] == report["early"]["step"] == STEPS - 2
    assert report["held_out_loss"] == report["early"]["best"] < report["held_out"]["counting"]["loss"]
    kept = storage.read_bytes(f"{root}/stages/{name}/{early.FOLDER}/{early.FILE}")
    best = load_tensors(kept)
    for weight, value in scenarios.weights(name).items():
        assert torch.equal(value, best[weight]), weight
    (run,) = scenarios.runs[name]
    published = load(Path(root, "stages", name, "model"))
    records = json.loads(Path(run.client.download_artifacts(run.id, "answers/end.json")).read_text())["samples"]
    assert [record["answer"] for record in records] == said(
        samples.sample_answers(published, spec.samples, False, spec.seed)
    )
    measured = evaluate(published, spec)
    assert {f"evaluation/{key}": value for key, value in measured.items()}.items() <= run.latest().items()


@pytest.mark.parametrize("name", ["early", "early, two workers"])
def test_tasks_are_answered_on_the_way_and_at_the_end(scenarios: Any, name: str) -> None:
    (measure,) = {key for key in scenarios.runs[name][0].latest() if key.startswith("evaluation/next")}
    assert list(scenarios.history(name, measure)) == [4, 8, STEPS]
    assert "evaluation" in scenarios.outcomes[name][0]["places"]
