"""A stage that trains a part of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calumma.model.vocabulary import Vocabulary
from calumma.platform.specification import SpecificationError
from calumma.platform.training import preparation

STEPS = 20


def test_adapters_are_merged_into_a_plain_model_that_has_learned(scenarios: Any) -> None:
    found, before = scenarios.weights("lora"), scenarios.weights("straight")
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert {name.split(".")[2] for name in changed} == {"attention", "feed_forward"}
    assert scenarios.history("lora", "loss")[STEPS] < scenarios.history("straight", "loss")[STEPS]
    small, whole = scenarios.report("lora")["trained_parameters"], scenarios.report("lora")["parameters"]
    assert 0 < small < whole == scenarios.report("straight")["parameters"]


def test_adapters_that_are_killed_and_resumed_come_to_the_same_weights(scenarios: Any) -> None:
    scenarios.report("lora, killed")
    for name, weight in scenarios.weights("lora, killed").items():
        torch.testing.assert_close(weight, scenarios.weights("lora")[name], rtol=0, atol=1e-6)


def test_an_image_head_changes_the_rows_of_image_ids_alone(scenarios: Any, root: str) -> None:
    scenarios.report("image head")
    found, before = scenarios.weights("image head"), scenarios.weights("straight")
    for name in found.keys() - {"output.weight"}:
        assert torch.equal(found[name].float(), before[name].bfloat16().float()), name
    same = (found["output.weight"].float() == before["output.weight"].bfloat16().float()).all(dim=1)
    vocabulary = Vocabulary.read(f"{root}/tokenizers/text")
    assert (~same).nonzero()[:, 0].tolist() == vocabulary.image_ids


def test_a_model_as_text_models_are_learns_and_then_its_rows_of_images_alone(scenarios: Any, root: str) -> None:
    assert scenarios.history("text model", "loss")[STEPS] < 0.8 * scenarios.history("text model", "loss")[2]
    scenarios.report("text model, rows")
    found, before = scenarios.weights("text model, rows"), scenarios.weights("text model")
    assert found.keys() == before.keys()
    assert "output.weight" not in found
    same = (found["embedding.weight"].float() == before["embedding.weight"].bfloat16().float()).all(dim=1)
    vocabulary = Vocabulary.read(f"{root}/tokenizers/text")
    assert (~same).nonzero()[:, 0].tolist() == sorted(
        [vocabulary.begin_image, vocabulary.end_image, *vocabulary.image_ids]
    )


def test_another_choice_of_what_is_trained_cannot_go_on_with_an_optimizer(scenarios: Any) -> None:
    scenarios.report("straight")
    fields = {"initial": "stages/straight", "model": None, "continue_schedule": True, "lora": {"rank": 2}}
    with pytest.raises(
        SpecificationError, match="lora: the stage whose optimizer continue_schedule goes on with had None"
    ):
        preparation.prepare(scenarios.specification("next", **fields), scenarios.runs["straight"][0])
