"""A decoder whose weights come when they are needed, layer by layer, and are not kept: those of a model in training,
which its workers may hold in parts. All of them take every pass together, and each gets all results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from calumma.model.config import ModelConfig
from calumma.model.generation.passes.decoder import Decoder, LayerWeights
from calumma.model.generation.tensor_parallel import Shard
from calumma.model.ops.rope import rope_table
from calumma.model.transformer import Transformer, TransformerBlock

# Prefix of names -> the weights of a plain Transformer that begin so, whole, for the time of the context.
WeightsWhenNeeded = Callable[[str], AbstractContextManager[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Lockstep(Shard):
    """Processes that each compute all of the model, and take what the first of them draws. Every one makes the same
    engine, adds the same requests and takes every step."""

    def broadcast(self, values: Tensor) -> Tensor:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(values, src=0)
        return values

    def broadcast_object(self, message: Any) -> Any:
        if dist.is_initialized() and dist.get_world_size() > 1:
            box = [message]
            dist.broadcast_object_list(box, src=0)
            return box[0]
        return message


class StreamedDecoder(Decoder):
    """Every process of torch.distributed's group calls it alike: `weights` may be a collective operation."""

    def __init__(self, config: ModelConfig, weights: WeightsWhenNeeded, device: torch.device) -> None:
        with torch.device("meta"):
            self.transformer = Transformer(config)
            self._block = TransformerBlock(config)
        self.shard, self._weights = Lockstep(), weights
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        self.swin = config.norm_order == "swin"
        self._copied, self.head, self.adapters = False, None, None
        with weights("norm.") as found:
            norm = found["norm.weight"].detach().to(device, copy=True)
        self.transformer.norm.weight = nn.Parameter(norm, requires_grad=False)
        self.embedding = torch.empty(0, dtype=norm.dtype, device=device)  # what else there is has no place of its own
        self.rope_LP2 = rope_table(config.head_size, config.context, config.rope_theta, device, config.rope_scaling)
        self.operations = self._operations(self.embedding)
        self._head_name = "embedding.weight" if config.tied else "output.weight"
        self.layers = _Layers(self, config.layers)  # type: ignore[assignment]

    def logits(self, x_RD: Tensor, columns: slice | None = None) -> Tensor:
        with self._weights(f"{self._head_name.partition('.')[0]}.") as found:
            weight_VD = found[self._head_name]
            return F.linear(x_RD, weight_VD if columns is None else weight_VD[columns]).float()

    def _embed(self, tokens_T: Tensor) -> Tensor:
        with self._weights("embedding.") as found:
            return F.embedding(tokens_T, found["embedding.weight"])

    def read_layers(self, count: int) -> Iterator[LayerWeights]:
        for number in range(count):
            prefix = f"blocks.{number}"
            with self._weights(f"{prefix}.") as found:
                own = {name.removeprefix(f"{prefix}."): weight for name, weight in found.items()}
                self._block.load_state_dict(own, assign=True)
                yield self._layer(prefix, self._block)


class _Layers:
    """The layers of a decoder, one after the other, each time that they are asked for."""

    def __init__(self, decoder: StreamedDecoder, count: int) -> None:
        self._decoder, self._count = decoder, count

    def __iter__(self) -> Iterator[LayerWeights]:
        return self._decoder.read_layers(self._count)
