"""One id of each row of weights at a uniform random number, exactly or by rejection.

Shape suffixes: R requests (rows), C columns of the vocabulary, B runs of columns, X random numbers of an id.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.model.generation.request import LIKELY
from calumma.model.generation.sampling.filters import thresholds

RUN = 256  # columns that are summed up, or looked through for the largest, at once
TRIES = 4  # ids that are proposed for a nucleus before it is made out


def draw_by_rejection(weights_RC: Tensor, filters_3R: Tensor | None, uniform_RX: Tensor) -> Tensor:
    """LongTensor [R, 1]: ids distributed as those of `draw`, from weights that need not sum to 1; overwritten.

    An id drawn from all lies in the nucleus where the ids more likely than itself do not reach top_p. If so it is the
    one, else the next is tried: no row is sorted, which for a flat one costs more than the model. Rows with other
    filters, or none of whose tries lies inside, are drawn from exactly; so are all where the host would have to wait
    for the device to know.
    """
    if filters_3R is None:
        return inverse_cdf(weights_RC, uniform_RX[:, 0])
    if weights_RC.is_cuda:
        return draw(weights_RC.div_(weights_RC.sum(-1, keepdim=True)), filters_3R, uniform_RX[:, -1])
    top_p_R, min_p_R, top_k_R = filters_3R
    tried_R = (top_p_R >= LIKELY) & (min_p_R <= 0) & (top_k_R <= 0)
    ids_R1 = torch.full((len(weights_RC), 1), -1)
    rows = tried_R.nonzero()[:, 0]
    for attempt in range(TRIES):
        if not rows.numel():
            break
        own_RC = weights_RC if len(rows) == len(weights_RC) else weights_RC[rows]
        found_R1 = inverse_cdf(own_RC, uniform_RX[rows, attempt])
        # with a plain number for each row this is one vectorized pass
        limits = own_RC.gather(1, found_R1)[:, 0].tolist()
        above_R = torch.stack([F.threshold(row, limit, 0).sum() for row, limit in zip(own_RC, limits, strict=True)])
        inside_R = (above_R < top_p_R[rows] * own_RC.sum(-1)) | (top_p_R[rows] >= 1)
        ids_R1[rows[inside_R]] = found_R1[inside_R]
        rows = rows[~inside_R]
    rows = (ids_R1[:, 0] < 0).nonzero()[:, 0]
    if rows.numel():
        own_RC = weights_RC[rows]
        own_RC /= own_RC.sum(-1, keepdim=True)
        ids_R1[rows] = draw(own_RC, filters_3R[:, rows], uniform_RX[rows, -1])
    return ids_R1


def draw(probabilities_RC: Tensor, filters_3R: Tensor | None, uniform_R: Tensor) -> Tensor:
    """LongTensor [R, 1]: one id of each row, at a uniform number of 0..1.

    filters_3R: top_p, min_p and top_k of each row. `probabilities_RC` is overwritten.
    """
    if filters_3R is not None:
        threshold_R = thresholds(probabilities_RC, *filters_3R)
        probabilities_RC.masked_fill_(probabilities_RC < threshold_R[:, None], 0)
    return inverse_cdf(probabilities_RC, uniform_R)


def inverse_cdf(weights_RC: Tensor, uniform_R: Tensor) -> Tensor:
    """LongTensor [R, 1]: the id at which the cumulative sum, in order of ids, passes a share of the whole. First the
    run of columns in which it does is looked for, then the place in it: only sums of runs are needed of all."""
    runs_RBC = _runs(weights_RC, 0.0)
    sums_RB = runs_RBC.sum(-1)
    run_R1, rest_R1 = _passed(sums_RB, uniform_R[:, None] * sums_RB.sum(-1, keepdim=True))
    inside_RC = runs_RBC[torch.arange(len(run_R1), device=run_R1.device), run_R1[:, 0]]
    place_R1, _ = _passed(inside_RC, rest_R1)
    return (run_R1 * runs_RBC.shape[-1] + place_R1).clamp_(max=weights_RC.shape[1] - 1)  # only NaN gets beyond


def _passed(weights_RC: Tensor, target_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place at which the cumulative sum passes a number, and what is left of that at the place."""
    cumulative_RC = weights_RC.cumsum(-1)
    total_R1 = cumulative_RC[:, -1:]
    # below the total even where rounding would not have it so: then the place at which it is passed has some mass
    target_R1 = torch.minimum(target_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1))).clamp_(min=0)
    place_R1 = torch.searchsorted(cumulative_RC, target_R1, right=True).clamp_(max=weights_RC.shape[1] - 1)
    return place_R1, target_R1 - (cumulative_RC - weights_RC).gather(1, place_R1)


def largest(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """`values_RC.max(-1, keepdim=True)`, the first of equal ones. A CPU is faster by runs: maxima are vectorized, the
    search for their places is not."""
    if values_RC.is_cuda:
        top = values_RC.max(-1, keepdim=True)
        return top.values, top.indices
    runs_RBC = _runs(values_RC, float("-inf"))
    top_R1, run_R1 = runs_RBC.amax(-1).max(-1, keepdim=True)
    inside_RC = runs_RBC[torch.arange(len(run_R1)), run_R1[:, 0]]
    return top_R1, run_R1 * runs_RBC.shape[-1] + inside_RC.max(-1, keepdim=True).indices


def _runs(values_RC: Tensor, filler: float) -> Tensor:
    """[R, B, RUN] of [R, C], filled up where C is no multiple."""
    missing = -values_RC.shape[1] % RUN
    return (F.pad(values_RC, (0, missing), value=filler) if missing else values_RC).unflatten(1, (-1, RUN))
