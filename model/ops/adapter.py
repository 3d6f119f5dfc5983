"""Low-rank adapters on linear layers: LoRA (arXiv 2106.09685), its rank-stabilized scale (arXiv 2312.03732), and DoRA,
which gives every output channel a magnitude of its own (arXiv 2402.09353).

Shape suffixes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerAdapter:
    """W becomes W + scale * up @ down; with magnitudes, each row of that is brought to its own length."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down_RI)

    def merged(self, weight_OI: Tensor) -> Tensor:
        """The weight with the adapter in it: computed in float32, rounded once to the weight's own dtype."""
        sum_OI = weight_OI.float() + self.scale * (self.up_OR.float() @ self.down_RI.float())
        if self.magnitude_O is not None:
            sum_OI *= (self.magnitude_O.float() / sum_OI.norm(dim=1))[:, None]
        return sum_OI.to(weight_OI.dtype)

    def channel_scale(self, weight_OI: Tensor) -> Tensor:
        """FloatTensor [O]: what magnitudes make of the outputs of weight and adapter together; ones without them."""
        device = weight_OI.device
        if self.magnitude_O is None:
            return torch.ones(len(self.up_OR), device=device)
        sum_OI = weight_OI.float() + self.scale * (self.up_OR.to(device).float() @ self.down_RI.to(device).float())
        return self.magnitude_O.to(device).float() / sum_OI.norm(dim=1)


@dataclass(frozen=True)
class Adapter:
    """Of a whole model. `layers`: by the name of the linear layer, say blocks.0.attention.query. `whole`: weights that
    were trained with it as they are, by name, say output.weight."""

    layers: Mapping[str, LayerAdapter]
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights of a model with the adapter in them."""
        own = {f"{name}.weight": layer for name, layer in self.layers.items()}
        return {
            name: self.whole[name] if name in self.whole else own[name].merged(weight) if name in own else weight
            for name, weight in weights.items()
        }

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises ValueError where it is not one for weights of these shapes, or holds what is no number."""
        for name, layer in self.layers.items():
            shape = shapes.get(f"{name}.weight")
            if shape is None:
                raise ValueError(f"{where}: it adapts {name}, which the model has not")
            found = (len(layer.up_OR), layer.down_RI.shape[1])
            if found != tuple(shape) or layer.up_OR.shape[1] != layer.rank:
                raise ValueError(f"{where}: {name} is {list(shape)} in the model, and the adapter's is {list(found)}")
            parts = [layer.down_RI, layer.up_OR, *([] if layer.magnitude_O is None else [layer.magnitude_O])]
            if not all(bool(part.isfinite().all()) for part in parts):
                raise ValueError(f"{where}: the adapter of {name} has values that are no numbers")
        for name, weight in self.whole.items():
            if shapes.get(name) != tuple(weight.shape):
                raise ValueError(f"{where}: it has a {name} of {list(weight.shape)}, the model {shapes.get(name)}")
