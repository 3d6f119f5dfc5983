"""The maximal update parametrization (muP, arXiv 2203.03466): a learning rate that is right at one width stays right
at every other.

Table 3 of the paper, for Adam: matrices between two widths begin with a variance of 1/fan-in and learn at a rate of
1/fan-in; the output projection begins with 1/fan-in^2 and learns at 1/fan-in, which is table 8's constant projection
behind a multiplier of 1/width (lemma J.1); embedding, norms and biases stay as they are. All of it is relative to a
base shape, of which a model is the plain one. Decay counts by rate x decay, which stays. Heads keep their size, so that
attention's 1/sqrt(head size) is the same constant everywhere.
"""

from __future__ import annotations

from typing import Any

import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.training.forecast.shape import block_matrices
from calumma.platform.training.steps import engine

OUTPUT = "output.weight"


def ratios(config: ModelConfig, base: ModelConfig) -> dict[str, float]:
    """Name of each parameter whose fan-in is a width -> that of the base over its own."""
    found = {OUTPUT: base.width / config.width}
    before = block_matrices(base)
    for name, (_, columns) in block_matrices(config).items():
        for layer in range(config.layers):
            found[f"blocks.{layer}.{name}.weight"] = before[name][1] / columns
    return found


@torch.no_grad()
def scale_weights(transformer: Transformer, base: ModelConfig) -> None:
    """Fresh weights of `initial_weights`, which are as large at every width, become muP's."""
    parameters = dict(transformer.named_parameters())
    for name, ratio in ratios(transformer.config, base).items():
        parameters[name].mul_(ratio if name == OUTPUT else ratio**0.5)


def parameter_groups(transformer: Transformer, base: ModelConfig, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's, each with the `scale` of its learning rate."""
    scaled = ratios(transformer.config, base)
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    groups = []
    for group in engine.parameter_groups(transformer, weight_decay):
        by_scale: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scaled.get(names[parameter], 1.0), []).append(parameter)
        for scale, parameters in by_scale.items():
            decay = group["weight_decay"] / scale
            groups.append({"params": parameters, "weight_decay": decay, "scale": scale})
    return groups
