"""The Transformer's forward pass over a paged cache, without gradients.

The same arithmetic as transformer.py, written out: at a token a sequence, calls cost more than arithmetic, so there are
no calls of modules, and projections of the same input are one product where a copy of their weights is affordable.
Weights are read when the decoder is made.

Shape suffixes: T tokens of a pass, D width, N heads, K key-value heads, Q both, H head size, P pairs of a head (H/2), C
columns of the vocabulary, F feed-forward width, X outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.model.generation.attention.paged import PagedAttention
from calumma.model.generation.passes.adapters import (
    DOWN,
    GATE_UP,
    OUTPUT,
    QUERY_KEY_VALUE,
    Adapted,
    AdapterBank,
    plain,
)
from calumma.model.generation.passes.head import Head
from calumma.model.generation.tensor_parallel import Shard
from calumma.model.ops.adapter import Adapter
from calumma.model.ops.fused import Kernels, Operations
from calumma.model.ops.int8 import Int8Matrix, Matrix, beside
from calumma.model.transformer import Transformer, TransformerBlock

# Most bytes of projections that are copied to lie side by side.
FUSED_BYTES = 1 << 28
TRIED = 8  # layers with which products are measured
FusedProjection = tuple[Matrix, ...]  # that read the same input; one, where they lie side by side


@dataclass(frozen=True)
class LayerWeights:
    """A block's weights, or this shard's slices of them."""

    attention_norm: Tensor
    feed_forward_norm: Tensor
    query_key_value: FusedProjection
    query_key_value_bias: tuple[Tensor, ...] | None  # one for each of the projection's parts
    norm: tuple[Tensor, Tensor | None] | None  # weight and bias of queries and keys [Q, H]; without one: RMSNorm
    output: Matrix
    output_bias: Tensor | None
    gate_up: FusedProjection
    gate_up_bias: tuple[Tensor, ...] | None
    down: Matrix
    down_bias: Tensor | None


class Decoder:
    """`shard`: what of every matrix this process has; all of it by default. `adapters`: by name, that some tokens may
    be computed with; not in a group. `kernels`: see `Operations`."""

    def __init__(
        self,
        transformer: Transformer,
        shard: Shard | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        config = transformer.config
        self.transformer, self.shard = transformer, shard or Shard()
        heads, kv_heads = self.shard.heads(config)
        self.heads, self.kv_heads = heads.stop - heads.start, kv_heads.stop - kv_heads.start
        self.embedding = self._slice("embedding.weight", transformer.embedding.weight)
        self.head_size, self.swin = config.head_size, config.norm_order == "swin"
        self.operations = self._operations(self.embedding, kernels)
        total = sum(p.numel() * p.element_size() for p in transformer.blocks.parameters())
        self._copied = total // self.shard.count <= FUSED_BYTES
        blocks = enumerate(cast(Iterable[TransformerBlock], transformer.blocks))
        self.layers = [self._layer(f"blocks.{number}", block) for number, block in blocks]
        down = [layer.down for layer in self.layers if isinstance(layer.down, Tensor)]
        if down:
            self.operations.measure(down[:TRIED])
        self.adapters = AdapterBank(transformer, adapters) if adapters else None
        self.head = self._head() if self.shard.count > 1 else None
        self.products = Head(transformer.output, self.operations)
        self.rope_LP2 = transformer.rope

    def hidden(self, tokens_T: Tensor, paged: PagedAttention, adapters_T: Tensor | None = None) -> Tensor:
        """LongTensor [T] -> FloatTensor [T, D], what the output projection reads; keys and values go into the cache.
        adapters: LongTensor [T], the number of each token's adapter; None where all are 0."""
        adapted = self.adapters.of(adapters_T) if self.adapters and adapters_T is not None else plain
        x_TD, operations = self._embed(tokens_T), self.operations
        more_TD: Tensor | None = None  # what the next norm adds to the residual stream first
        for number, layer in enumerate(self.layers):
            if self.swin:
                a_TD = self._attention(x_TD, number, layer, paged, adapted)
                x_TD = x_TD + operations.norm(a_TD, layer.attention_norm)
                f_TD = self._feed_forward(x_TD, number, layer, adapted)
                x_TD = x_TD + operations.norm(f_TD, layer.feed_forward_norm)
            else:
                x_TD, normal_TD = operations.add_norm(x_TD, more_TD, layer.attention_norm)
                more_TD = self._attention(normal_TD, number, layer, paged, adapted)
                x_TD, normal_TD = operations.add_norm(x_TD, more_TD, layer.feed_forward_norm)
                more_TD = self._feed_forward(normal_TD, number, layer, adapted)
        return operations.add_norm(x_TD, more_TD, self.transformer.norm.weight)[1]

    def logits(self, x_RD: Tensor, columns: slice | None = None) -> Tensor:
        """FloatTensor [R, C] of some states, all columns of the vocabulary or some; the caller's own to change."""
        columns = columns or slice(0, self.transformer.config.vocabulary_size)
        if self.head is not None:
            logits_RV = self.shard.gather(F.linear(x_RD, self.head).float())
            return logits_RV[:, columns].contiguous()
        return self.products.logits(x_RD, columns)

    def _embed(self, tokens_T: Tensor) -> Tensor:
        if self.shard.count == 1:
            return F.embedding(tokens_T, self.embedding)
        own_T = tokens_T - self.shard.vocabulary(self.transformer.config).start
        elsewhere_T = (own_T < 0) | (own_T >= len(self.embedding))
        if not len(self.embedding):
            return self.shard.sum(self.embedding.new_zeros(len(tokens_T), self.transformer.config.width))
        x_TD = F.embedding(own_T.masked_fill(elsewhere_T, 0), self.embedding)
        return self.shard.sum(x_TD.masked_fill_(elsewhere_T[:, None], 0))

    def _head(self) -> Tensor:
        """As many rows as the first shard has."""
        own_CD = self._slice("output.weight", self.transformer.output.weight)
        missing = -(-self.transformer.config.vocabulary_size // self.shard.count) - len(own_CD)
        return F.pad(own_CD, (0, 0, 0, missing)) if missing else own_CD

    def _slice(self, name: str, weight: Tensor) -> Tensor:
        """This shard's slice of a weight, of which that may be all there is (`read_shard`)."""
        own = weight.detach()
        where = self.shard.slices(name, self.transformer.config)[: own.dim()]  # a scale has rows alone
        if self.shard.count == 1 or all(o.stop - o.start == size for o, size in zip(where, own.shape, strict=False)):
            return own
        return own[where].clone()

    def _attention(
        self, x_TD: Tensor, number: int, layer: LayerWeights, paged: PagedAttention, adapted: Adapted
    ) -> Tensor:
        products = [self.operations.product(x_TD, weight) for weight in layer.query_key_value]
        projected = _with_bias(adapted(number, QUERY_KEY_VALUE, x_TD, products), layer.query_key_value_bias)
        q_TNH = self.operations.norm_rotate(
            projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1),
            layer.norm,
            self.rope_LP2,
            paged.positions_T,
            paged.slots_T,
            *paged.cache.by_position[number],
            self.heads,
        )
        out_TX = paged.attend(number, q_TNH)
        [out_TD] = adapted(number, OUTPUT, out_TX, [self.operations.product(out_TX, layer.output)])
        out_TD = self.shard.sum(out_TD)
        return out_TD if layer.output_bias is None else out_TD + layer.output_bias

    def _feed_forward(self, x_TD: Tensor, number: int, layer: LayerWeights, adapted: Adapted) -> Tensor:
        products = [self.operations.product(x_TD, weight) for weight in layer.gate_up]
        projected = _with_bias(adapted(number, GATE_UP, x_TD, products), layer.gate_up_bias)
        hidden_TF = self.operations.gate(projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1))
        [down_TD] = adapted(number, DOWN, hidden_TF, [self.operations.product(hidden_TF, layer.down)])
        down_TD = self.shard.sum(down_TD)
        return down_TD if layer.down_bias is None else down_TD + layer.down_bias

    def _operations(self, sample: Tensor, kernels: Kernels = "auto") -> Operations:
        config = self.transformer.config
        ffn = self.shard.slices("blocks.0.feed_forward.up.weight", config)[0]
        multiple = gcd(config.width, self.head_size, ffn.stop - ffn.start)
        return Operations(sample, multiple, self.head_size, config.norm_eps, kernels)

    def _layer(self, prefix: str, block: TransformerBlock) -> LayerWeights:
        own = {name: self._slice(f"{prefix}.{name}", weight) for name, weight in block.named_parameters()}
        norm: tuple[Tensor, Tensor | None] | None = None
        both = ("attention.query_norm", "attention.key_norm")
        if self.transformer.config.query_key_norm == "rms":
            heads = zip(both, (self.heads, self.kv_heads), strict=True)
            norm = torch.cat([own[f"{each}.weight"].expand(number, -1) for each, number in heads]), None
        elif block.attention.normalize:
            norm = (
                torch.cat([own[f"{each}.weight"] for each in both]),
                torch.cat([own[f"{each}.bias"] for each in both]),
            )

        def biases(weights: FusedProjection, *names: str) -> tuple[Tensor, ...] | None:
            found = tuple(own[f"{name}.bias"] for name in names if f"{name}.bias" in own)
            return (torch.cat(found),) if found and len(weights) == 1 else found or None

        def matrix(name: str) -> Matrix:
            scale = own.get(f"{name}.scale")
            return own[f"{name}.weight"] if scale is None else Int8Matrix(own[f"{name}.weight"], scale)

        projections = (
            [matrix(f"attention.{each}") for each in ("query", "key", "value")],
            [matrix(f"feed_forward.{each}") for each in ("gate", "up")],
        )
        query_key_value, gate_up = (self._beside(weights) for weights in projections)
        return LayerWeights(
            own["attention_norm.weight"],
            own["feed_forward_norm.weight"],
            query_key_value,
            biases(query_key_value, "attention.query", "attention.key", "attention.value"),
            norm,
            self._beside([matrix("attention.output")])[0],
            own.get("attention.output.bias"),
            gate_up,
            biases(gate_up, "feed_forward.gate", "feed_forward.up"),
            self._beside([matrix("feed_forward.down")])[0],
            own.get("feed_forward.down.bias"),
        )

    def _beside(self, weights: list[Matrix]) -> FusedProjection:
        """One weight, copied as its product with a few tokens reads it fastest; or what is too large to be copied."""
        if not self._copied:
            return tuple(weights)
        if quantized := [weight for weight in weights if isinstance(weight, Int8Matrix)]:
            return (beside(quantized),)
        floats = [weight for weight in weights if isinstance(weight, Tensor)]
        whole = torch.cat(floats) if len(floats) > 1 else floats[0]
        return (whole if whole.is_cuda or self.operations.native is not None else whole.t().contiguous().t(),)


def _with_bias(projected: list[Tensor], biases: tuple[Tensor, ...] | None) -> list[Tensor]:
    if biases is None:
        return projected
    return [output + bias for output, bias in zip(projected, biases, strict=True)]
