"""Attention over whole sequences, as training runs it: rotary positions, masks, kernels.

Shape suffixes: B batch, T tokens, L keys, N heads, K key-value heads, H head size, P pairs of a head (H/2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass(frozen=True)
class Runs:
    """Tokens of each document, in order, over all rows one after the other."""

    lengths: tuple[int, ...]


# None: causal. BoolTensor [B, 1, T, L]: true where a token attends. BlockMask: the same for FlexAttention. Runs: causal
# within each.
Mask = Tensor | BlockMask | Runs | None
SHORT = 24  # tokens of documents on average, below which a call for each costs more than it spares


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
    if isinstance(mask, Runs):
        return _attend_runs(q_BNTH, k_BKLH, v_BKLH, mask.lengths)
    if isinstance(mask, BlockMask):
        flex = _compiled() if q_BNTH.is_cuda and not torch.compiler.is_compiling() else flex_attention
        return flex(q_BNTH, k_BKLH, v_BKLH, block_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def _attend_runs(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, lengths: tuple[int, ...]) -> Tensor:
    B, N, T, H = q_BNTH.shape
    runs = [x_BNTH.transpose(1, 2).flatten(0, 1).split(lengths) for x_BNTH in (q_BNTH, k_BKTH, v_BKTH)]
    # split and cat, since a slice's backward pass would fill the whole with zeros for each
    out = []
    for run in zip(*runs, strict=True):
        q_1NLH, k_1KLH, v_1KLH = (x_LNH.transpose(0, 1)[None] for x_LNH in run)
        grouped = k_1KLH.shape[1] != N
        out.append(F.scaled_dot_product_attention(q_1NLH, k_1KLH, v_1KLH, is_causal=True, enable_gqa=grouped))
    return torch.cat([out_1NLH[0].transpose(0, 1) for out_1NLH in out]).view(B, T, N, H).transpose(1, 2)


def document_mask(segments_BT: Tensor, form: Literal["flex", "dense", "runs"] | None = None) -> Mask:
    """Causal attention within documents, from each token's document number, LongTensor [B, T]; a document's tokens are
    neighbours.

    FlexAttention (arXiv 2412.05496) skips the blocks in which no token sees another, which a dense mask cannot, and
    needs no [T, T] memory: taken on CUDA. On a CPU each document is a causal attention of its own, which skips what
    later and other documents' tokens would cost, unless they are `SHORT`; then a dense mask for the fused kernel.
    """
    B, T = segments_BT.shape
    if form is None and segments_BT.is_cuda:
        form = "flex"
    if form in (None, "runs"):
        lengths = _lengths(segments_BT)
        if form == "runs" or segments_BT.numel() >= SHORT * len(lengths):
            return Runs(lengths)
    if form != "flex":
        same = segments_BT[:, :, None] == segments_BT[:, None, :]
        return (same & torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril())[:, None]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments_BT[b, query] == segments_BT[b, key])

    return create_block_mask(sees, B, None, T, T, device=segments_BT.device)


def _lengths(segments_BT: Tensor) -> tuple[int, ...]:
    """Of `Runs`; no document goes on in the next row."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    ends_R = begins_BT.flatten().nonzero()[:, 0].tolist()[1:]
    return tuple(torch.tensor([0, *ends_R, begins_BT.numel()]).diff().tolist())


@cache
def _compiled() -> Any:
    """FlexAttention is a fused kernel only when compiled."""
    return torch.compile(flex_attention, dynamic=False)
