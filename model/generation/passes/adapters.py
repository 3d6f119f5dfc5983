"""Adapters of several requests in one pass: what each token's own adapter adds to the products of the plain weights.

The adapters of a projection lie side by side: one product with all their `down` matrices, of which each token keeps the
columns of its own, and one with all `up` matrices. The shapes depend on no request, so that a pass can be recorded, and
the work grows with the sum of all ranks: for some tens of adapters of usual ranks that is little beside the weights
themselves. Those that have magnitudes (DoRA) then scale their tokens' outputs.

Shape suffixes: T tokens of a pass, I inputs, O outputs, K ranks of all adapters together, A the plain model and
adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calumma.model.ops.adapter import Adapter
from calumma.model.ops.int8 import Int8Linear
from calumma.model.transformer import Transformer

Group = Literal["query_key_value", "output", "gate_up", "down"]
QUERY_KEY_VALUE: Group = "query_key_value"
OUTPUT: Group = "output"
GATE_UP: Group = "gate_up"
DOWN: Group = "down"
# The layers of a group read the same input, and their outputs may lie side by side.
LAYERS: dict[Group, tuple[str, ...]] = {
    QUERY_KEY_VALUE: ("attention.query", "attention.key", "attention.value"),
    OUTPUT: ("attention.output",),
    GATE_UP: ("feed_forward.gate", "feed_forward.up"),
    DOWN: ("feed_forward.down",),
}


class Adapted(Protocol):
    def __call__(self, block: int, group: Group, x_TI: Tensor, plain: list[Tensor]) -> list[Tensor]:
        """The outputs of a group of layers with what adapters add to them; its input, and what the weights gave."""
        ...


def plain(block: int, group: Group, x_TI: Tensor, plain: list[Tensor]) -> list[Tensor]:
    """Without adapters."""
    return plain


@dataclass(frozen=True)
class LayerBank:
    """All adapters of one linear layer. `owner_K`: the number of the adapter that each rank is of. `scale_AO`: factors
    of the outputs, None where all are 1."""

    down_KI: Tensor
    up_OK: Tensor
    owner_K: Tensor
    scale_AO: Tensor | None


class AdapterBank:
    """Adapters by name, numbered from 1 in their order. Raises ValueError for what cannot be served side by side."""

    def __init__(self, transformer: Transformer, adapters: Mapping[str, Adapter]) -> None:
        shapes = {
            f"{name}.weight": tuple(module.weight.shape)
            for name, module in transformer.named_modules()
            if isinstance(module, nn.Linear | Int8Linear)
        }
        for name, adapter in adapters.items():
            outside = [layer for layer in adapter.layers if not layer.startswith("blocks.")]
            if adapter.whole or outside:
                raise ValueError(
                    f"the adapter {name!r} changes {', '.join([*adapter.whole, *outside])}, which is not served beside "
                    "others: merge it into its model (`calumma export merged`) and serve that"
                )
            adapter.require_fit(shapes, f"the adapter {name!r}")
        self.banks: dict[tuple[int, Group], list[LayerBank | None]] = {}
        self._sizes = {
            group: [shapes[f"blocks.0.{layer}.weight"][0] for layer in layers] for group, layers in LAYERS.items()
        }
        for number in range(len(transformer.blocks)):
            for group, layers in LAYERS.items():
                banks = [_bank(transformer, f"blocks.{number}.{layer}", list(adapters.values())) for layer in layers]
                if any(banks):
                    self.banks[number, group] = banks

    def of(self, adapters_T: Tensor) -> Adapted:
        """What the tokens of a pass with these adapters add."""

        def adapted(block: int, group: Group, x_TI: Tensor, plain: list[Tensor]) -> list[Tensor]:
            banks = self.banks.get((block, group))
            if banks is None:
                return plain
            apart = len(plain) == len(banks)  # or side by side, as one output
            outputs = plain if apart else plain[0].split(self._sizes[group], dim=-1)
            found = [
                output if bank is None else _applied(bank, x_TI, output, adapters_T)
                for bank, output in zip(banks, outputs, strict=True)
            ]
            return found if apart else [torch.cat(found, dim=-1)]

        return adapted


def _applied(bank: LayerBank, x_TI: Tensor, output_TO: Tensor, adapters_T: Tensor) -> Tensor:
    low_TK = F.linear(x_TI, bank.down_KI)
    # Not a product with 0: of others' numbers not even one that is none may count.
    low_TK = low_TK.masked_fill(bank.owner_K != adapters_T[:, None], 0)
    output_TO = output_TO + F.linear(low_TK, bank.up_OK)
    return output_TO if bank.scale_AO is None else output_TO * bank.scale_AO[adapters_T]


def _bank(transformer: Transformer, name: str, adapters: list[Adapter]) -> LayerBank | None:
    layers = [adapter.layers.get(name) for adapter in adapters]
    present = [(number, layer) for number, layer in enumerate(layers, start=1) if layer is not None]
    if not present:
        return None
    module = transformer.get_submodule(name)
    device, dtype = transformer.embedding.weight.device, transformer.embedding.weight.dtype
    down_KI = torch.cat([layer.down_RI.float() for _, layer in present])
    up_OK = torch.cat([layer.scale * layer.up_OR.float() for _, layer in present], dim=1)
    owner_K = torch.cat([torch.full((layer.rank,), number) for number, layer in present])
    scale_AO = None
    if any(layer.magnitude_O is not None for _, layer in present):
        weight_OI = _weight(module)
        scale_AO = torch.ones(1 + len(layers), len(weight_OI), device=device, dtype=dtype)
        for number, layer in present:
            scale_AO[number] = layer.channel_scale(weight_OI).to(dtype)
    return LayerBank(down_KI.to(device, dtype), up_OK.to(device, dtype), owner_K.to(device), scale_AO)


def _weight(module: nn.Module) -> Tensor:
    """FloatTensor [O, I]."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight * module.scale.detach()[:, None] if isinstance(module, Int8Linear) else weight
