"""Instruments that show a divergence before the loss does: the norms whose growth the paper's stabilizers bound
(section 2.3: query-key norm, z-loss, norm order). Cheap enough to stay on: benchmarks/RESULTS.md has the price.

Everything is measured without gradient, on the device, as 0-dim float32 tensors; nothing waits for the host.
Shape suffixes: B batch, T tokens, N heads, K key-value heads, H head size, R trained tokens, V vocabulary, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Mean norm of a head's query and key after normalization, the largest attention logit, and the root mean square of the
# residual stream after the block.
BLOCK = ("query_norm", "key_norm", "attention_logit_max", "activation_rms")
# Mean norm of a token's logits, mean and largest log Z.
OUTPUT = ("logit_norm", "log_z", "log_z_max")
# Queries of each sequence whose logits with all keys before them are looked at, and trained tokens whose output is.
QUERIES, TOKENS = 16, 64


@torch.no_grad()
def attention(q_BNTH: Tensor, k_BKTH: Tensor) -> Tensor:
    """FloatTensor [3]: the first three of BLOCK. The maximum is over QUERIES evenly spaced queries, the last among
    them, and all keys up to theirs."""
    B, N, T, H = q_BNTH.shape
    K = k_BKTH.shape[1]
    at_Q = _spaced(T, QUERIES, q_BNTH.device)
    q_BKQH = q_BNTH[:, :, at_Q].reshape(B, K, N // K * len(at_Q), H)
    logits_BKGQT = (q_BKQH @ k_BKTH.transpose(-1, -2)).unflatten(2, (N // K, -1))
    ahead_QT = torch.arange(T, device=at_Q.device) > at_Q[:, None]
    top = logits_BKGQT.masked_fill(ahead_QT, -torch.inf).amax() * H**-0.5
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).mean() for x in (q_BNTH, k_BKTH)]
    return torch.stack([*norms, top.float()])


@torch.no_grad()
def block(attention_3: Tensor, x_BTD: Tensor) -> Tensor:
    """FloatTensor [4]: BLOCK, from what `attention` gave and the block's result."""
    rms = torch.linalg.vector_norm(x_BTD, dtype=torch.float32) / x_BTD.numel() ** 0.5
    return torch.cat([attention_3, rms[None]])


@torch.no_grad()
def output(x_MD: Tensor, rows_R: Tensor, weight_VD: Tensor) -> Tensor:
    """FloatTensor [3]: OUTPUT, over TOKENS evenly spaced rows of those trained; zeros when there are none."""
    if not len(rows_R):
        return x_MD.new_zeros(3, dtype=torch.float32)
    x_tD = x_MD[rows_R[_spaced(len(rows_R), TOKENS, x_MD.device)]]
    logits_tV = (x_tD @ weight_VD.T).float()
    log_z_t = logits_tV.logsumexp(-1)
    return torch.stack([torch.linalg.vector_norm(logits_tV, dim=-1).mean(), log_z_t.mean(), log_z_t.max()])


def by_name(blocks: list[Tensor], output_3: Tensor | None) -> dict[str, Tensor]:
    """What was measured by name: `layer_00/query_norm`, ..., `logit_norm`, ...; empty when nothing was."""
    found = {
        f"layer_{layer:02d}/{name}": value
        for layer, values in enumerate(blocks)
        for name, value in zip(BLOCK, values, strict=True)
    }
    if output_3 is not None:
        found |= dict(zip(OUTPUT, output_3, strict=True))
    return found


def _spaced(length: int, number: int, device: torch.device) -> Tensor:
    """Up to `number` evenly spaced indices of `length`, the last among them: LongTensor."""
    number = min(number, length)
    return torch.arange(1, number + 1, device=device) * length // number - 1
