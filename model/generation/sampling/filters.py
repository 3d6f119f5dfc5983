"""top-k, min-p and top-p as the least probability that they leave in each row.

Shape suffixes: R requests (rows), C columns of the vocabulary, K most likely ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64  # most likely tokens that are looked at first
MANY = 1 << 14  # tokens that are too many to be sorted
ONE_UPPER = 0x3F80  # the upper 16 bits of 1.0


def thresholds(probabilities_RC: Tensor, top_p_R: Tensor, min_p_R: Tensor, top_k_R: Tensor) -> Tensor:
    """FloatTensor [R]: the least probability that each row's filters leave; see PhaseSampling for their order.

    The most likely few tokens tell, unless a row is so flat that they do not hold its mass. How a row is looked at
    depends on nothing but the row. Where the host would have to wait for the device to know, all are sorted at once.
    """
    C = probabilities_RC.shape[1]
    top_k_R = torch.where(top_k_R > 0, top_k_R, float(C)).clamp(max=C)
    if probabilities_RC.is_cuda or C <= 8 * FEW:
        return _threshold(probabilities_RC.sort(-1, descending=True).values, top_p_R, min_p_R, top_k_R, C)[0]
    threshold_R, known_R = _threshold(probabilities_RC.topk(FEW).values, top_p_R, min_p_R, top_k_R, C)
    large_R = ((top_k_R >= C) & (min_p_R <= 0)) if C >= MANY else torch.zeros_like(known_R)
    for rows, large in (((~known_R & large_R).nonzero()[:, 0], True), ((~known_R & ~large_R).nonzero()[:, 0], False)):
        if rows.numel() and large:
            threshold_R[rows] = nucleus(probabilities_RC[rows], top_p_R[rows])
        elif rows.numel():
            sorted_RC = probabilities_RC[rows].sort(-1, descending=True).values
            threshold_R[rows] = _threshold(sorted_RC, top_p_R[rows], min_p_R[rows], top_k_R[rows], C)[0]
    return threshold_R


def nucleus(probabilities_RC: Tensor, top_p_R: Tensor) -> Tensor:
    """FloatTensor [R]: the least probability of the smallest sets with mass top_p, without sorting all: floats of 0..1
    are ordered as their bits are, so the mass at each value of the upper 16 bits tells where the set ends; only those
    that share them are sorted."""
    upper_RC = (probabilities_RC.view(torch.int32) >> 16).long()
    mass_RX = torch.zeros(len(top_p_R), ONE_UPPER + 1).scatter_add_(1, upper_RC, probabilities_RC)
    reached_RX = mass_RX.flip(1).cumsum_(-1)
    place_R1 = torch.searchsorted(reached_RX, top_p_R[:, None]).clamp(max=ONE_UPPER)
    last_R1 = ONE_UPPER - place_R1
    above_R1 = reached_RX.gather(1, place_R1) - mass_RX.gather(1, last_R1)
    inside_RC = torch.where(upper_RC == last_R1, probabilities_RC, -1.0)
    sorted_RK = inside_RC.topk(int((inside_RC >= 0).sum(-1).max())).values
    needed_RK = above_R1 + sorted_RK.clamp(min=0).cumsum(-1) < top_p_R[:, None]
    count_R1 = (sorted_RK >= 0).sum(-1, keepdim=True)
    return sorted_RK.gather(1, needed_RK.sum(-1, keepdim=True).minimum(count_R1 - 1).clamp(min=0))[:, 0].clamp(min=0)


def _threshold(sorted_RK: Tensor, top_p_R: Tensor, min_p_R: Tensor, top_k_R: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """From the K most likely: the threshold, and whether what is less likely could change nothing."""
    rank_K = torch.arange(sorted_RK.shape[1], device=sorted_RK.device)
    allowed_RK = (rank_K < top_k_R[:, None]) & (sorted_RK >= min_p_R[:, None] * sorted_RK[:, :1])
    open_R = (top_k_R >= C) & (min_p_R <= 0)
    closed_R = ~allowed_RK[:, -1]
    weight_RK = torch.where(allowed_RK, sorted_RK, 0.0)
    cumulative_RK = weight_RK.cumsum(-1)
    mass_R = torch.where(open_R, 1.0, cumulative_RK[:, -1])
    whole_R = top_p_R >= 1
    kept_RK = allowed_RK & (whole_R[:, None] | (cumulative_RK - weight_RK < (top_p_R * mass_R)[:, None]))
    last_R1 = (kept_RK.sum(-1, keepdim=True) - 1).clamp(min=0)  # top_p 0 keeps the most likely one
    threshold_R = sorted_RK.gather(1, last_R1)[:, 0]
    if sorted_RK.shape[1] == C:
        return threshold_R, torch.ones_like(whole_R)
    known_R = closed_R | (open_R & (whole_R | ~kept_RK[:, -1]))
    return torch.where(open_R & whole_R, 0.0, threshold_R), known_R
