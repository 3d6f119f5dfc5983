"""Attention over whole sequences, as training runs it: rotary positions, masks, kernels.

Shape suffixes: B batch, T tokens, L keys, N heads, K key-value heads, H head size, P pairs of a head (H/2).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# None: causal. BoolTensor [B, 1, T, L]: true where a token attends. BlockMask: the same for FlexAttention.
Mask = Tensor | BlockMask | None


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
