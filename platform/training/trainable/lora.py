"""Low-rank adapters on linear layers (LoRA, arXiv 2106.09685), in names that the plain model's weights keep.

A layer `blocks.0.attention.query` still holds its `weight`, now frozen, and gets `lora_down` and `lora_up` beside it
(and `lora_magnitude`), so that ZeRO 3 gathers all of them together. `merge_adapters` turns them into the plain weight
again.

Shape suffixes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calumma.model.ops.adapter import Adapter, LayerAdapter
from calumma.platform.specification import SpecificationError
from calumma.platform.training.sections import Lora
from calumma.platform.training.trainable import quantized

DOWN, UP, MAGNITUDE = "lora_down", "lora_up", "lora_magnitude"


class LoraLinear(nn.Linear):
    """A linear layer with frozen weight plus scale * up @ down. It starts out as the layer that it replaces.

    With a magnitude each output channel is brought to a length of its own (DoRA): the length that it has without one
    counts as a constant when gradients are taken (arXiv 2402.09353, section 4.3). Dropout is of the adapter's input.
    With `lora.quantize` the frozen weight is `quantized`, and no parameter any more (trainable/quantized.py).
    """

    quantized: quantized.QuantizedWeight | None

    def __init__(self, plain: nn.Linear, lora: Lora, generator: torch.Generator) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(plain.weight.detach(), requires_grad=False)
        self.bias = plain.bias  # trained or not as it was
        self.scale, self.dropout = lora.scale, lora.dropout
        down_RI = torch.empty(lora.rank, plain.in_features).uniform_(-1, 1, generator=generator)
        self.lora_down = nn.Parameter(
            down_RI * plain.in_features**-0.5
        )  # the paper's code: kaiming_uniform_(a=5 ** 0.5)
        self.lora_up = nn.Parameter(torch.zeros(plain.out_features, lora.rank))
        self.lora_magnitude = nn.Parameter(plain.weight.detach().norm(dim=1)) if lora.dora else None
        self.quantized = None
        if lora.quantize is not None:
            self.quantized = quantized.QuantizedWeight(lora.quantize, (self.out_features, self.in_features))
            self.register_parameter("weight", None)
            self._product = quantized.product_outside_compiler()

    def forward(self, input: Tensor) -> Tensor:
        dropped = F.dropout(input, self.dropout, self.training) if self.dropout else input
        low_rank = F.linear(F.linear(dropped, self.lora_down), self.lora_up)
        if self.lora_magnitude is None:
            return self._plain(input, self.bias) + self.scale * low_rank
        output = (self._plain(input, None) + self.scale * low_rank) * (self.lora_magnitude / self._lengths())
        return output if self.bias is None else output + self.bias

    def _plain(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if self.quantized is None:
            return F.linear(input, self.weight, bias)
        return self._product(input, self.quantized, bias)

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """FloatTensor [O] of the weight with the adapter in it."""
        plain_OI = self.weight if self.quantized is None else self.quantized.dequantized(self.lora_up.dtype)
        return (plain_OI + self.scale * (self.lora_up @ self.lora_down)).norm(dim=1)


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
    """Put adapters, a function of the seed, on the targets in place; with `lora.quantize` every frozen linear layer of
    the blocks is quantized. Raises SpecificationError as `target_layers`, and for what cannot be quantized."""
    generator = torch.Generator().manual_seed(seed)
    for name in target_layers(model, lora):
        parent, _, own = name.rpartition(".")
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        setattr(model.get_submodule(parent), own, LoraLinear(plain, lora, generator))
    if lora.quantize is None:
        return
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not module.weight.requires_grad:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, quantized.QuantizedLinear(module, lora.quantize))


def adapter_of(weights: Mapping[str, Tensor], scale: float) -> Adapter:
    """The adapters among the weights of a model in training."""
    layers = {}
    for name in [name for name in weights if name.endswith(f".{DOWN}")]:
        layer = name.removesuffix(f".{DOWN}")
        magnitude_O = weights.get(f"{layer}.{MAGNITUDE}")
        layers[layer] = LayerAdapter(weights[name], weights[f"{layer}.{UP}"], scale, magnitude_O)
    return Adapter(layers)


def merge_adapters(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights without adapters: each weight with its adapter in float32, rounded once to its own dtype."""
    plain = {name: weight for name, weight in weights.items() if not is_part(name)}
    return adapter_of(weights, scale).merged(plain)


def is_part(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in (DOWN, UP, MAGNITUDE)


def name_patterns(names: list[str]) -> list[str]:
    """Layer names with the block's number left out."""
    return sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names})
