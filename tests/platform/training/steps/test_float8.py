"""Float8 products by torchao, with the rounding emulated on a CPU: what is converted, and that it still learns."""

from __future__ import annotations

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.specification import SpecificationError
from calumma.platform.training.steps import engine, float8
from calumma.platform.training.steps.held_out import HeldOutBatch

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32, vocabulary_size=50)


def losses(model: Transformer, steps: int) -> list[float]:
    """Of training on one batch again and again."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.arange(33).repeat(2, 1) % 7 + torch.tensor([[0], [20]])
    batch = HeldOutBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens))
    found = []
    for _ in range(steps):
        loss = engine.losses(model, batch, torch.zeros(50, dtype=torch.bool), z_loss=0.0, normalizer=64).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def test_the_linear_layers_of_the_blocks_round_to_float8_and_learn_as_the_plain_ones() -> None:
    plain, rounded = (Transformer(SHAPE).initialize(0).bfloat16() for _ in range(2))
    for model in (plain, rounded):
        model.rebuild_rope(torch.device("cpu"))
    converted = float8.convert(rounded, emulate=True)
    linear = [name for name, module in plain.named_modules() if type(module) is torch.nn.Linear]
    assert converted == [name for name in linear if name.startswith("blocks.")]
    assert len(converted) >= 2 * 6
    assert rounded.state_dict().keys() == plain.state_dict().keys()
    expected, found = losses(plain, 30), losses(rounded, 30)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.2, abs=0.05)
    assert found[-1] < found[0] / 4


def test_a_machine_without_such_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SpecificationError, match="float8: there is no GPU here"):
        float8.convert(Transformer(SHAPE))
