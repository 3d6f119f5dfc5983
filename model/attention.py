"""What the Transformer's attention is made of: rotary positions, the cache of keys and values, masks, kernels.

Shape suffixes: B batch, T tokens, L keys, N heads, K key-value heads, H head size, P pairs of a head (H/2), S cache
slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from calumma.model.config import ModelConfig

# None: causal. BoolTensor [B, 1, T, L]: true where a token attends. BlockMask: the same for FlexAttention.
Mask = Tensor | BlockMask | None
Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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


class CacheView:
    """Where one forward pass writes in a KVCache and what it reads: the first `length` positions of some slots. Without
    a length it is read off the positions, for which the host waits for the device."""

    def __init__(self, cache: KVCache, slots_B: Tensor, positions_BT: Tensor, length: int | None) -> None:
        self.cache, self.slots_B, self.positions_BT = cache, slots_B, positions_BT
        self.length = int(positions_BT.max()) + 1 if length is None else length
        if self.length > cache.length:
            raise ValueError(f"position {self.length - 1} is beyond the cache's {cache.length} positions")
        key_positions_L = torch.arange(self.length, device=positions_BT.device)
        self.mask_B1TL = (key_positions_L <= positions_BT[:, :, None])[:, None]

    def at(self, layer: int) -> Update:
        """What a layer does with its keys and values [B, K, T, H]: keep them, and go on with all [B, K, length, H]."""
        return partial(self._update, layer)

    def _update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
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
    if not torch.compiler.is_compiling():  # a complex product is one pass over memory, but not for the compiler
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope_BTP2)[:, :, None]
        return torch.view_as_real(turned).flatten(-2).type_as(x_BTNH)
    cos, sin = rope_BTP2[:, :, None, :, 0], rope_BTP2[:, :, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BTNH)


def attend(q_BNTH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask: Mask) -> Tensor:
    """FloatTensor [B, N, T, H]."""
    grouped = q_BNTH.shape[1] != k_BKLH.shape[1]
    if isinstance(mask, BlockMask):
        flex = _compiled() if q_BNTH.is_cuda and not torch.compiler.is_compiling() else flex_attention
        return flex(q_BNTH, k_BKLH, v_BKLH, block_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def document_mask(segments_BT: Tensor, flex: bool | None = None) -> Tensor | BlockMask:
    """Causal attention within documents, from each token's document number, LongTensor [B, T].

    FlexAttention (arXiv 2412.05496) skips the blocks in which no token sees another, which a dense mask cannot, and
    needs no [T, T] memory: taken on CUDA. Elsewhere, and with `flex` false, a dense mask for the fused kernel.
    """
    if flex is None:
        flex = segments_BT.is_cuda
    B, T = segments_BT.shape
    if not flex:
        same = segments_BT[:, :, None] == segments_BT[:, None, :]
        return (same & torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril())[:, None]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments_BT[b, query] == segments_BT[b, key])

    return create_block_mask(sees, B, None, T, T, device=segments_BT.device)


@cache
def _compiled() -> Any:
    """FlexAttention is a fused kernel only when compiled."""
    return torch.compile(flex_attention, dynamic=False)
