"""muP: one learning rate for all widths, as the package of the paper's authors has it (mup 1.0.0)."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.training.steps import engine
from calumma.platform.training.trials import width

VOCABULARY = 48


def shape(times: int) -> ModelConfig:
    """`times` as wide as the base."""
    wide = {"width": 16 * times, "heads": 2 * times, "kv_heads": times, "ffn_width": 40 * times}
    return ModelConfig(vocabulary_size=VOCABULARY, layers=2, context=32, **wide)


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (4, 17), generator=generator) for _ in range(steps)]


class WithReadout(nn.Module):
    """The Transformer below the package's own output layer."""

    def __init__(self, config: ModelConfig, readout: type[nn.Linear]) -> None:
        super().__init__()
        self.below = Transformer(config)
        del self.below.output
        self.readout = readout(config.width, VOCABULARY, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.readout(self.below.hidden(tokens_BT))
        return logits


def train(forward: Any, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    """Logits of the first batch after so many steps of AdamW."""
    for tokens_BS in batches(steps):
        loss = nn.functional.cross_entropy(forward(tokens_BS[:, :-1]).flatten(0, 1), tokens_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits: Tensor = forward(batches(1)[0][:, :-1])
    return logits


@pytest.mark.parametrize("times", [1, 3])
def test_a_training_is_that_of_the_authors_package(times: int) -> None:
    mup = importlib.import_module("mup")
    config, base = shape(times), shape(1)
    theirs = WithReadout(config, mup.MuReadout)
    mup.set_base_shapes(theirs, WithReadout(base, mup.MuReadout), delta=WithReadout(shape(2), mup.MuReadout))
    for name, value in Transformer(config).initial_weights(7):
        parameter = theirs.readout.weight if name == width.OUTPUT else theirs.below.get_parameter(name)
        if parameter.dim() > 1 and "norm" not in name:
            mup.init.constant_std_init_(parameter, _filled_with(value))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-15}
    expected = train(theirs, mup.MuAdamW(trained, lr=0.02, weight_decay=0.1, **settings), 6)

    ours = Transformer(config).initialize(7)
    width.scale_weights(ours, base)
    for group in (groups := width.parameter_groups(ours, base, 0.1)):
        group["lr"] = 0.02 * group["scale"]
        group["weight_decay"] = 0.1 / group["scale"]  # the package decays norms, too
    torch.testing.assert_close(train(ours, torch.optim.AdamW(groups, **settings), 6), expected, rtol=2e-4, atol=2e-4)


def _filled_with(value: Tensor) -> Any:
    """For the package, which says by what a fresh value counts."""

    @torch.no_grad()
    def fill(parameter: Tensor, scale: float = 1.0) -> None:
        parameter.copy_(value * scale)

    return fill


def change(times: int, mup: bool, rate: float = 0.02) -> tuple[float, float]:
    """RMS by which the states and the logits of a batch have changed after five steps."""
    config = shape(times)
    transformer = Transformer(config).initialize(0)
    groups: Any = engine.parameter_groups(transformer, 0.0)
    if mup:
        width.scale_weights(transformer, shape(1))
        groups = width.parameter_groups(transformer, shape(1), 0.0)
    for group in groups:
        group["lr"] = rate * group.get("scale", 1.0)
    tokens_BT = batches(1)[0][:, :-1]
    with torch.no_grad():
        before = transformer.hidden(tokens_BT), transformer(tokens_BT)
    train(transformer, torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-12), 5)
    with torch.no_grad():
        after = transformer.hidden(tokens_BT), transformer(tokens_BT)
    hidden, logits = (float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True))
    return hidden, logits


def test_steps_move_logits_alike_at_every_width() -> None:
    """The coordinate check of the paper's appendix D.1: what a few steps change grows with the width without muP, and
    does not with it."""

    def slope(mup: bool) -> float:
        narrow, wide = (change(times, mup)[1] for times in (4, 16))
        return math.log2(wide / narrow) / 2

    assert abs(slope(mup=True)) < 0.15
    assert slope(mup=False) > 0.5


def test_the_base_is_the_plain_model() -> None:
    plain, ours = Transformer(shape(1)).initialize(0), Transformer(shape(1)).initialize(0)
    width.scale_weights(ours, shape(1))
    torch.testing.assert_close(dict(ours.named_parameters()), dict(plain.named_parameters()))
    groups = width.parameter_groups(ours, shape(1), 0.1)
    assert [(group["scale"], group["weight_decay"]) for group in groups] == [(1.0, 0.1), (1.0, 0.0)]


def test_every_parameter_is_in_one_group() -> None:
    transformer = Transformer(shape(3))
    groups = width.parameter_groups(transformer, shape(1), 0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in transformer.parameters())
