"""The mixed-modal Transformer: Llama-2's shape with query-key normalization (paper section 2.3).

Shape suffixes: B batch, T tokens, L cached positions, D width, N heads, K key-value heads, H head size, F feed-forward
width, V vocabulary, S cache slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calumma.model.config import ModelConfig


class KVCache:
    """Keys and values of S sequences of up to L positions each, for every layer.

    `keys[layer]`, `values[layer]`: FloatTensor [S, K, L, H].
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.slots, self.length = slots, length
        shape = (slots, config.kv_heads, length, config.head_size)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]


class _CacheView:
    """Where one forward pass writes in a KVCache and what it reads: the first `length` positions of some slots."""

    def __init__(self, cache: KVCache, slots_B: Tensor, positions_BT: Tensor) -> None:
        self.cache, self.slots_B, self.positions_BT = cache, slots_B, positions_BT
        self.length = int(positions_BT.max()) + 1
        if self.length > cache.length:
            raise ValueError(f"position {self.length - 1} is beyond the cache's {cache.length} positions")
        key_positions_L = torch.arange(self.length, device=positions_BT.device)
        self.mask_B1TL = (key_positions_L <= positions_BT[:, :, None])[:, None]

    def update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slots_B[:, None], :, self.positions_BT] = k_BKTH.transpose(1, 2)
        values[self.slots_B[:, None], :, self.positions_BT] = v_BKTH.transpose(1, 2)
        return keys[self.slots_B, :, : self.length], values[self.slots_B, :, : self.length]


def rope_table(head_size: int, length: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """FloatTensor [length, head_size/2, 2]: cosine and sine of position x frequency (RoFormer, arXiv 2104.09864)."""
    frequency = theta ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x_BTNH: Tensor, rope_BTP2: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of each head, as Llama's release does; rope is [B or 1, T, H/2, 2]."""
    pairs = x_BTNH.float().unflatten(-1, (-1, 2))
    cos, sin = rope_BTP2[:, :, None, :, 0], rope_BTP2[:, :, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BTNH)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        self.query = nn.Linear(config.width, config.heads * config.head_size, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_size, bias=False)
        self.output = nn.Linear(config.heads * config.head_size, config.width, bias=False)
        self.normalize = config.query_key_norm
        if self.normalize:  # LayerNorm over each head, a weight per head as in the release; bounds the attention logits
            self.query_norm = HeadNorm(config.heads, config.head_size)
            self.key_norm = HeadNorm(config.kv_heads, config.head_size)

    def forward(
        self, x_BTD: Tensor, rope_BTP2: Tensor, mask: Tensor | None, cache: _CacheView | None, layer: int
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTNH = self.query(x_BTD).view(B, T, self.heads, self.head_size)
        k_BTKH = self.key(x_BTD).view(B, T, self.kv_heads, self.head_size)
        v_BKTH = self.value(x_BTD).view(B, T, self.kv_heads, self.head_size).transpose(1, 2)
        if self.normalize:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BNTH = rotate(q_BTNH, rope_BTP2).transpose(1, 2)
        k_BKTH = rotate(k_BTKH, rope_BTP2).transpose(1, 2)
        if cache is not None:
            k_BKTH, v_BKTH = cache.update(layer, k_BKTH, v_BKTH)
        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH,
            k_BKTH,
            v_BKTH,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.output(out_BNTH.transpose(1, 2).reshape(B, T, -1))


class HeadNorm(nn.Module):
    """LayerNorm over the head size with a weight and bias for every head."""

    def __init__(self, heads: int, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_size))
        self.bias = nn.Parameter(torch.zeros(heads, head_size))

    def forward(self, x_BTNH: Tensor) -> Tensor:
        normal = F.layer_norm(x_BTNH, (x_BTNH.shape[-1],), eps=1e-5)
        return normal * self.weight + self.bias


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention and feed-forward; `pre` normalizes their input (Llama), `swin` their output before the residual add."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.dropout = config.dropout
        self.swin = config.norm_order == "swin"

    def forward(
        self, x_BTD: Tensor, rope_BTP2: Tensor, mask: Tensor | None, cache: _CacheView | None, layer: int
    ) -> Tensor:
        if self.swin:
            a_BTD = self.attention_norm(self.attention(x_BTD, rope_BTP2, mask, cache, layer))
        else:
            a_BTD = self.attention(self.attention_norm(x_BTD), rope_BTP2, mask, cache, layer)
        x_BTD = x_BTD + F.dropout(a_BTD, self.dropout, self.training)
        if self.swin:
            f_BTD = self.feed_forward_norm(self.feed_forward(x_BTD))
        else:
            f_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD + F.dropout(f_BTD, self.dropout, self.training)


class Transformer(nn.Module):
    """One decoder over text and image tokens; `config.vocabulary_size` ids in and out, untied."""

    rope: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocabulary_size < 1:
            raise ValueError("the model's vocabulary_size must be set before it is built")
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.output = nn.Linear(config.width, config.vocabulary_size, bias=False)
        self.register_buffer("rope", torch.empty(0), persistent=False)
        self.rebuild_rope(self.embedding.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts of the module; bf16 cannot hold positions beyond 256, so the table is made anew instead."""
        super()._apply(fn, recurse)
        self.rebuild_rope(self.embedding.weight.device)
        return self

    def rebuild_rope(self, device: torch.device | str) -> None:
        """Make the rotary table on a device: it is no weight, and stays float32 whatever the weights are."""
        config = self.config
        self.rope = rope_table(config.head_size, config.context, config.rope_theta, device)

    def initialize(self, seed: int) -> Transformer:
        """Normal(0, 0.02) weights; projections into the residual stream are scaled by 1/sqrt(2 layers) (GPT-2, section
        2.3 of its paper), so that its variance does not grow with depth."""
        generator = torch.Generator(device=self.embedding.weight.device).manual_seed(seed)
        residual = {"attention.output.weight", "feed_forward.down.weight"}
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                scaled = any(name.endswith(suffix) for suffix in residual)
                std = 0.02 / (2 * self.config.layers) ** 0.5 if scaled else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
        return self

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """LongTensor [B, T] -> FloatTensor [B, T, V] logits, float32.

        Without a cache: causal attention over the T tokens, within documents (`segments_BT`, LongTensor [B, T]) if the
        configuration masks documents. With a cache: row b continues cache slot `slots[b]` at position `start[b]`
        (both LongTensor [B]). Raises ValueError when positions go beyond the context or the cache.
        """
        T = tokens_BT.shape[1]
        view, mask = None, None
        if cache is not None:
            if slots is None or start is None:
                raise ValueError("a cache needs slots and start positions")
            positions_BT = start[:, None] + torch.arange(T, device=tokens_BT.device)
            view = _CacheView(cache, slots, positions_BT)
            rope_BTP2, mask = self.rope[positions_BT], view.mask_B1TL
        else:
            if T > self.config.context:
                raise ValueError(f"{T} tokens are more than the model's context of {self.config.context}")
            rope_BTP2 = self.rope[None, :T]
            if segments_BT is not None and self.config.mask_documents:
                same = segments_BT[:, :, None] == segments_BT[:, None, :]
                mask = (same & torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).tril())[:, None]
        x_BTD = self.embedding(tokens_BT)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope_BTP2, mask, view, layer)
        return self.output(self.norm(x_BTD)).float()
