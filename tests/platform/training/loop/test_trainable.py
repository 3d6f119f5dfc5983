"""A stage that trains a part of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torchao.quantization import to_nf4

from calumma.model.adapters.files import read_adapter
from calumma.model.config import ModelConfig
from calumma.model.vocabulary import Vocabulary
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training import preparation
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.trainable import lora

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


@pytest.mark.parametrize("other", ["quantized, killed", "quantized, two workers"])
def test_adapters_on_four_bits_come_to_the_same_weights_interrupted_and_on_two_workers(
    scenarios: Any, other: str
) -> None:
    scenarios.report(other)
    for name, weight in scenarios.weights(other).items():
        torch.testing.assert_close(weight, scenarios.weights("quantized")[name], rtol=0, atol=1e-5)


def test_adapters_on_four_bits_learn_and_are_all_that_a_checkpoint_holds(scenarios: Any, root: str) -> None:
    report = scenarios.report("quantized")
    assert report["held_out"]["counting"]["loss"] < report["held_out_before"]["counting"]["loss"]
    assert report["parameters"] == scenarios.report("straight")["parameters"]
    (index,) = Path(root, "stages/quantized/checkpoints/step-00000020").glob("*/index.parquet")
    names = set(pq.read_table(index)["parameter"].to_pylist())
    assert len(names) == 2 * 14
    assert all(lora.is_part(name) for name in names)


def test_the_model_of_four_bits_and_adapters_is_the_one_that_was_measured(scenarios: Any, root: str) -> None:
    """Its weights are the dequantized ones with the adapter in them, by torchao and by PEFT's format."""
    scenarios.report("quantized")
    found, before = scenarios.weights("quantized"), scenarios.weights("straight")
    adapter = read_adapter(f"{root}/stages/quantized/adapter", ModelConfig.read(f"{root}/stages/quantized/model"))
    assert len(adapter.layers) == 14
    for name, layer in adapter.layers.items():
        weight_OI = before[f"{name}.weight"]
        stored = to_nf4(weight_OI, 64, weight_OI.numel() // 64).get_original_weight()
        torch.testing.assert_close(found[f"{name}.weight"], layer.merged(stored), rtol=0, atol=1e-6)


def test_a_checkpoint_of_adapters_has_the_bytes_of_what_is_trained(scenarios: Any, root: str) -> None:
    """Twelve for each trained parameter, a float32 weight and two moments, and what every checkpoint has besides: an
    index, a report. The frozen weights are not in it."""

    def written(name: str) -> int:
        (step, *_) = catalog.published_steps(f"{root}/stages/{name}")
        manifest = Manifest.read(catalog.checkpoint_uri(f"{root}/stages/{name}", step))
        return sum(file.bytes for file in manifest.files)

    trained, whole = (scenarios.report("lora")[key] for key in ("trained_parameters", "parameters"))
    besides = written("straight") - 12 * whole
    assert 0 < besides < 24_000
    assert 12 * trained < written("lora") < 12 * trained + 2 * besides
    assert written("lora") < written("straight") / 4


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
