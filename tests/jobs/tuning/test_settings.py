"""Settings that nobody has given fit the examples, the model and the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from calumma.jobs.tuning.settings import Base, Machine, Options, context_for, pairs, tokenization, training, usual_rate
from calumma.jobs.tuning.split import Parts
from calumma.model.config import ModelConfig, preset
from calumma.platform.specification import SpecificationError

SHAPE = ModelConfig(layers=2, width=256, heads=4, kv_heads=4, ffn_width=512, context=4096, vocabulary_size=512)
BASE = Base("models:/base@champion", "/models/base", SHAPE, 16)
OPTIONS = Options("models:/base@champion", "talks.jsonl", Path("/data/out"))
PARTS = Parts(train=1000, held_out=50, tokens=200_000, longest=700)


def test_rows_hold_the_longest_example_and_are_not_few() -> None:
    assert context_for(4096, PARTS, "off") == 704
    assert context_for(4096, PARTS, "apart") == 3136
    assert context_for(512, PARTS, "apart") == 512
    assert context_for(4096, Parts(4, 1, 80, 30), "apart") == 64


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("lora", [None, 16])
def test_all_examples_are_passed_as_often_as_asked(gpus: int, lora: int | None) -> None:
    options, machine = replace(OPTIONS, lora=lora, epochs=2.0), Machine(4, gpus)
    tokens = tokenization(options, BASE, PARTS, machine)
    row_groups = 40
    spec = training(options, BASE, PARTS, tokens, row_groups, machine)
    assert spec.steps * spec.micro_batches / row_groups == pytest.approx(2.0, rel=0.1)
    assert (spec.lora is not None) == (lora is not None)
    assert spec.mask_documents
    assert spec.resources.max_workers == max(1, gpus)
    assert spec.precision == ("bfloat16" if gpus else "float32")
    assert training(replace(options, packing="together"), BASE, PARTS, tokens, 40, machine).mask_documents is None


def test_few_examples_still_take_several_steps() -> None:
    tokens = tokenization(OPTIONS, BASE, Parts(5, 1, 300, 60), Machine(2, 0))
    assert training(OPTIONS, BASE, Parts(5, 1, 300, 60), tokens, 1, Machine(2, 0)).steps == 3


def test_a_weight_of_images_balances_the_two_modalities_of_pairs() -> None:
    machine, options = Machine(2, 0), replace(OPTIONS, image_weight=0.25)
    tokens = pairs(options, BASE, machine)
    found = training(options, BASE, PARTS, tokens, 40, machine).preference
    assert found is not None
    assert found.model_fields_set >= {"text_weight", "image_weight"}  # both given: then both have to be in the pairs
    assert (found.text_weight, found.image_weight) == (1.0, 0.25)


def test_adapters_and_narrow_models_learn_faster() -> None:
    assert usual_rate(2000, adapters=False) == 5e-5
    assert usual_rate(2000, adapters=True) == 5e-4
    assert usual_rate(4096, adapters=True) == pytest.approx(2.9e-4)
    assert usual_rate(128, adapters=False) > 4e-4


@pytest.mark.parametrize(
    ("lora", "kind", "gpus", "stage"),
    [(16, "H100", 1, 1), (16, "L40S", 1, 1), (None, "H100", 8, 1), (None, "A100-SXM4-40GB", 8, 2)],
)
def test_a_7b_gets_what_the_plan_says_fits(lora: int | None, kind: str, gpus: int, stage: int) -> None:
    """Only what memory asks for: each stage above the first sends more, computing activations again takes longer."""
    base = replace(BASE, config=preset("chameleon-7b"))
    options, machine = replace(OPTIONS, lora=lora), Machine(16, gpus, kind)
    tokens = tokenization(options, base, PARTS, machine)
    assert training(options, base, PARTS, tokens, 40, machine).zero_stage == stage


def test_what_no_setting_fits_is_refused_with_what_would() -> None:
    base, machine = replace(BASE, config=preset("chameleon-34b")), Machine(16, 1, "L4")
    tokens = tokenization(OPTIONS, base, PARTS, machine)
    with pytest.raises(SpecificationError, match=r"1 x L4 cannot train the model: .* low-rank adapters \(--lora 16\)"):
        training(OPTIONS, base, PARTS, tokens, 40, machine)


def test_four_bits_bring_a_34b_to_a_gpu_that_adapters_alone_do_not() -> None:
    base, machine = replace(BASE, config=preset("chameleon-34b")), Machine(16, 1, "A100", 512e9)
    options = replace(OPTIONS, lora=16)
    tokens = tokenization(options, base, PARTS, machine)
    with pytest.raises(SpecificationError, match=r"frozen weights in 4 bits \(--quantize 4\) take less"):
        training(options, base, PARTS, tokens, 40, machine)
    spec = training(replace(options, quantize=4), base, PARTS, tokens, 40, machine)
    assert spec.lora is not None
    assert (spec.lora.rank, spec.lora.quantize) == (16, 4)


def test_what_is_of_adapters_is_refused_without_them() -> None:
    with pytest.raises(SpecificationError, match="--quantize is of low-rank adapters: give their rank, say --lora 16"):
        replace(OPTIONS, quantize=4)
