"""Settings that nobody has given fit the examples, the model and the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from calumma.jobs.tuning.settings import Base, Machine, Options, context_for, tokenization, training, usual_rate
from calumma.jobs.tuning.split import Parts
from calumma.model.config import ModelConfig

SHAPE = ModelConfig(layers=2, width=256, heads=4, kv_heads=4, ffn_width=512, context=4096, vocabulary_size=512)
BASE = Base("models:/base@champion", "/models/base", SHAPE, 16)
OPTIONS = Options("models:/base@champion", "talks.jsonl", Path("/work/out"))
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


def test_adapters_and_narrow_models_learn_faster() -> None:
    assert usual_rate(2000, adapters=False) == 5e-5
    assert usual_rate(2000, adapters=True) == 5e-4
    assert usual_rate(4096, adapters=True) == pytest.approx(2.9e-4)
    assert usual_rate(128, adapters=False) > 4e-4
