"""Low-rank adapters on linear layers (LoRA, arXiv 2106.09685), in names that the plain model's weights keep.

A layer `blocks.0.attention.query` still holds its `weight`, now frozen, and gets `lora_down` and `lora_up` beside it,
so that ZeRO 3 gathers all three together. `merge_adapters` turns them into the plain weight again.

Shape suffixes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calumma.platform.specification import SpecificationError
from calumma.platform.training.specification import Lora

DOWN, UP = "lora_down", "lora_up"


class LoraLinear(nn.Linear):
    """A linear layer with frozen weight plus alpha / rank * up @ down. It starts out as the layer that it replaces."""

    def __init__(self, plain: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(plain.weight.detach(), requires_grad=False)
        self.bias = plain.bias  # trained or not as it was
        self.scale = scale
        down_RI = torch.empty(rank, plain.in_features).uniform_(-1, 1, generator=generator)
        self.lora_down = nn.Parameter(
            down_RI * plain.in_features**-0.5
        )  # the paper's code: kaiming_uniform_(a=5 ** 0.5)
        self.lora_up = nn.Parameter(torch.zeros(plain.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(input, self.lora_down), self.lora_up)
        return F.linear(input, self.weight, self.bias) + self.scale * low_rank


def target_layers(model: nn.Module, lora: Lora) -> list[str]:
    """Names of the linear layers that `lora.targets` picks. Raises SpecificationError when a pattern picks none."""
    # The output projection is no plain linear layer: its loss is computed chunk by chunk (model/ops/loss.py).
    layers = [name for name, module in model.named_modules() if type(module) in (nn.Linear, LoraLinear)]
    for pattern in lora.targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise SpecificationError(
                f"lora.targets: {pattern!r} is the name of no linear layer in the blocks; there are "
                f"{', '.join(name_patterns(layers))}"
            )
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in lora.targets)]


def add_adapters(model: nn.Module, lora: Lora, seed: int) -> None:
    """Put adapters, a function of the seed, on the targets in place. Raises SpecificationError as `target_layers`."""
    generator = torch.Generator().manual_seed(seed)
    for name in target_layers(model, lora):
        parent, _, own = name.rpartition(".")
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        setattr(model.get_submodule(parent), own, LoraLinear(plain, lora.rank, lora.alpha / lora.rank, generator))


def merge_adapters(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights without adapters: each weight plus its adapter's product in float32, rounded once to its own dtype."""
    plain = {name: weight for name, weight in weights.items() if not name.endswith((f".{DOWN}", f".{UP}"))}
    for name in [name for name in weights if name.endswith(f".{DOWN}")]:
        layer = name.removesuffix(f".{DOWN}")
        down_RI, up_OR, weight_OI = weights[name], weights[f"{layer}.{UP}"], weights[f"{layer}.weight"]
        low_rank_OI = scale * (up_OR.float() @ down_RI.float())
        plain[f"{layer}.weight"] = (weight_OI.float() + low_rank_OI).to(weight_OI.dtype)
    return plain


def name_patterns(names: list[str]) -> list[str]:
    """Layer names with the block's number left out."""
    return sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names})
