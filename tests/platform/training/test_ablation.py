"""Ablations: curves of the norms that each stabilizer bounds."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from calumma.model.config import ModelConfig
from calumma.platform.training import ablation
from calumma.platform.training.specification import (
    AblateSpecification,
)


def ablation_of(root: str, shape: ModelConfig, **fields: Any) -> AblateSpecification:
    values: dict[str, Any] = {
        "storage": root,
        "mixture": {"tokens/pairs": 0.5, "tokens/lines": 0.5},
        "model": shape.model_copy(update={"dropout": 0.0}).model_dump(exclude={"vocabulary_size"}),
        "variants": {"all": {}, "no query-key norm": {"query_key_norm": False}, "no z-loss": {"z_loss": 0}},
        "learning_rates": [0.01],
        "z_loss": 0.1,
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "steps": 30,
        "micro_batches": 2,
    }
    return AblateSpecification.model_validate(values | fields)


def test_an_ablation_shows_what_each_stabilizer_bounds(root: str, shape: ModelConfig) -> None:
    spec = ablation_of(root, shape)
    curves = {(name, 0.01): ablation.train_variant(spec, name, 0.01) for name in spec.variants}
    found = ablation.summary(curves)
    assert found["all, 0.01: loss"] < curves["all", 0.01][0]["loss"] - 0.5
    growth = {name: found[f"{name}, 0.01: query_norm"] / curves[name, 0.01][0]["query_norm"] for name in spec.variants}
    assert growth["no query-key norm"] > 2 * growth["all"]
    assert abs(found["all, 0.01: log_z"]) < abs(found["no z-loss, 0.01: log_z"])
    assert ablation.train_variant(spec, "all", 0.01) == curves["all", 0.01]  # the same again
    drawn = ablation.figure(spec, curves)
    assert {line.get_label() for line in drawn.axes[0].get_lines()} == set(spec.variants)


def test_a_variant_of_an_unknown_field_is_refused_by_its_name(root: str, shape: ModelConfig) -> None:
    with pytest.raises(ValidationError, match=r"variants\.odd: .*\n?.*qk_norm"):
        ablation_of(root, shape, variants={"odd": {"qk_norm": False}})
