"""Presets of model shapes."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from calumma.model.config import ModelConfig, preset
from calumma.model.transformer import Transformer


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        ("chameleon-7b", 7040, 0.01),
        ("chameleon-34b", 34300, 0.01),
        ("calumma-20m", 20, 0.05),
        ("calumma-125m", 125, 0.05),
        ("calumma-350m", 350, 0.05),
        ("calumma-1.3b", 1300, 0.05),
    ],
)
def test_presets_have_the_sizes_in_their_names(name: str, millions: float, within: float) -> None:
    with torch.device("meta"):
        model = Transformer(preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(KeyError, match="chameleon-34b, chameleon-7b"):
        preset("chameleon-8b")
    with pytest.raises(ValidationError, match=r"no model preset 'x'; there are: calumma-1\.3b"):
        ModelConfig.model_validate({"preset": "x"})


def test_a_preset_can_be_named_and_changed_in_a_configuration() -> None:
    small = ModelConfig.model_validate({"preset": "calumma-125m", "context": 512, "vocabulary_size": 0})
    assert small == preset("calumma-125m").model_copy(update={"context": 512, "vocabulary_size": 0})
    assert ModelConfig.model_validate_json(small.model_dump_json()) == small
