"""Cross-entropy and z-loss as sums and counts by modality, so that any number of workers normalizes them globally.

z-loss is log(Z)^2, Z the output softmax's partition function; it bounds the growth of the logits (paper section 2.3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossSums(NamedTuple):
    """0-dim float32 tensors over the trained tokens of a micro-batch."""

    text_nll: Tensor
    text_count: Tensor
    image_nll: Tensor
    image_count: Tensor
    z_sum: Tensor


def sums(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor, image_mask_V: Tensor) -> LossSums:
    """Negative log-likelihoods (nats) of `targets_BT` where `mask_BT`, split by whether the target is an image code.

    logits FloatTensor [B, T, V]; targets LongTensor [B, T]; mask BoolTensor [B, T]; image_mask BoolTensor [V].
    """
    log_z_BT = torch.logsumexp(logits_BTV, dim=-1)
    nll_BT = log_z_BT - logits_BTV.gather(-1, targets_BT[..., None])[..., 0]
    image_BT = image_mask_V[targets_BT] & mask_BT
    text_BT = mask_BT & ~image_BT
    return LossSums(
        text_nll=(nll_BT * text_BT).sum(),
        text_count=text_BT.sum().float(),
        image_nll=(nll_BT * image_BT).sum(),
        image_count=image_BT.sum().float(),
        z_sum=(log_z_BT.square() * mask_BT).sum(),
    )
