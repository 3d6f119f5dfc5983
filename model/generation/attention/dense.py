"""The arithmetic of attention over keys and values that lie side by side: the fused kernel of any device, a faster one
on CPUs, and one for the tokens of a prompt that needs no mask.

Shape suffixes: B sequences with T new tokens each, L keys, N heads, K key-value heads, G heads of a key-value head
(N/K), H head size, X key-value heads of all sequences (B*K).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_fused(q_XNH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, bias_B1TL: Tensor) -> Tensor:
    """PyTorch's fused kernel, on any device: queries [B*T, N, H] -> [B*T, N*H]. `bias` is added to the logits."""
    N, H = q_XNH.shape[1:]
    B, K, T = len(k_BKLH), k_BKLH.shape[1], bias_B1TL.shape[2]
    if T == 1:  # the queries that share a key head stand where further tokens would: no key is repeated for them
        q_BKGH = q_XNH.unflatten(1, (K, N // K))
        bias_B1GL = bias_B1TL.expand(-1, -1, N // K, -1)
        return F.scaled_dot_product_attention(q_BKGH, k_BKLH, v_BKLH, attn_mask=bias_B1GL).reshape(B, N * H)
    q_BNTH = q_XNH.unflatten(0, (B, T)).transpose(1, 2)
    if q_XNH.is_cuda and K != N:  # with a mask the kernels that keep no logits take as many key heads as queries
        k_BKLH, v_BKLH = (each.repeat_interleave(N // K, 1) for each in (k_BKLH, v_BKLH))
        K = N
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BKLH, v_BKLH, attn_mask=bias_B1TL, enable_gqa=K != N)
    return out_BNTH.transpose(1, 2).reshape(B * T, N * H)


def attend_by_products(q_BNH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, bias_B11L: Tensor) -> Tensor:
    """The same for one token a sequence, [B, N, H] -> [B, N*H], as two batched products: on a CPU in float32 faster
    than the fused kernel, where keys are contiguous (ContiguousKV)."""
    B, N, H = q_BNH.shape
    K = k_BKLH.shape[1]
    q_XGH, k_XLH, v_XLH = q_BNH.reshape(B * K, N // K, H), k_BKLH.flatten(0, 1), v_BKLH.flatten(0, 1)
    bias_X1L = bias_B11L.expand(-1, K, -1, -1).flatten(0, 1)
    weights_XGL = torch.baddbmm(bias_X1L, q_XGH, k_XLH.transpose(1, 2), alpha=H**-0.5).softmax(-1)
    return torch.bmm(weights_XGL, v_XLH).view(B, N * H)


def attend_causal(q_TNH: Tensor, k_LKH: Tensor, v_LKH: Tensor) -> Tensor:
    """The last T of a sequence's L tokens, each up to its own position, on a CPU: [T, N, H] -> [T, N*H]. Before the
    first of them all is seen and from there on half: two products without a mask, put together by their sums (as
    FlashAttention's parts, arXiv 2205.14135). Heads that share a key head are not repeated."""
    T, L = len(q_TNH), len(k_LKH)
    q, k, v = (each.transpose(0, 1)[None] for each in (q_TNH, k_LKH, v_LKH))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own_1NTH, own_1NT = fused(q, k[:, :, L - T :], v[:, :, L - T :], 0.0, True)
    if T < L:
        before_1NTH, before_1NT = fused(q, k[:, :, : L - T], v[:, :, : L - T], 0.0, False)
        share_1NT1 = torch.sigmoid(own_1NT - before_1NT)[..., None]
        wide = share_1NT1.dtype  # float32 at least
        own_1NTH = torch.lerp(before_1NTH.to(wide), own_1NTH.to(wide), share_1NT1).to(q_TNH.dtype)
    return own_1NTH[0].transpose(0, 1).reshape(T, -1)
