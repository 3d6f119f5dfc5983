"""Losses of pairs of answers, from the log-probabilities of their tokens.

Rows of a micro-batch stand in twos, and document k of row 2i, a prompt with the chosen answer, belongs to document k of
row 2i + 1, with the rejected one (platform/tokenizing/preferences.py).

Shape suffixes: B rows, T tokens, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.platform.training.sections import Preference


@dataclass(frozen=True)
class AnswerScores:
    """Of every document of a micro-batch, [B, K] with K the most documents of a row: sums of its answer's
    log-probabilities, and how many tokens they are of, by modality. Documents without an answer have counts of 0."""

    text_BK: Tensor
    image_BK: Tensor
    text_count_BK: Tensor
    image_count_BK: Tensor

    @classmethod
    def of(cls, scores_BT: Tensor, segments_BT: Tensor, mask_BT: Tensor, image_BT: Tensor) -> AnswerScores:
        """scores, segments, mask and whether it is an image code: all of the targets."""
        B, K = len(segments_BT), max(1, int(segments_BT.max()) + 1 if segments_BT.numel() else 1)
        place_BT = segments_BT.clamp(min=0)

        def summed(values_BT: Tensor) -> Tensor:
            return values_BT.new_zeros(B, K).scatter_add(1, place_BT, values_BT)

        image_BT, text_BT = (image_BT & mask_BT).float(), (~image_BT & mask_BT).float()
        return cls(summed(scores_BT * text_BT), summed(scores_BT * image_BT), summed(text_BT), summed(image_BT))

    def weighted(self, preference: Preference) -> tuple[Tensor, Tensor]:
        """[B, K]: log-probabilities by the weights of modalities, and by how much to divide them for a mean."""
        text, image = preference.text_weight, preference.image_weight
        total_BK = text * self.text_BK + image * self.image_BK
        return total_BK, (text * self.text_count_BK + image * self.image_count_BK).clamp(min=1e-9)


@dataclass(frozen=True)
class PairLosses:
    """[P] each, of the pairs of a micro-batch: what is minimized; how much more the chosen answer has gained than the
    rejected one, by the loss's own measure; mean log-probability of a token of the chosen answer."""

    loss_P: Tensor
    margin_P: Tensor
    chosen_P: Tensor
    rejected_P: Tensor


def pair_losses(policy: AnswerScores, reference: AnswerScores | None, preference: Preference) -> PairLosses:
    """reference: the same of the reference model; needed but for orpo."""
    count_BK = policy.text_count_BK + policy.image_count_BK
    is_pair = (count_BK[0::2] > 0) & (count_BK[1::2] > 0)
    total_BK, divisor_BK = policy.weighted(preference)

    def sides(values_BK: Tensor) -> tuple[Tensor, Tensor]:
        return values_BK[0::2][is_pair], values_BK[1::2][is_pair]

    chosen_P, rejected_P = sides(total_BK / divisor_BK)
    if preference.loss == "orpo":
        margin_P = _log_odds(chosen_P) - _log_odds(rejected_P)
        loss_P = -chosen_P - preference.beta * F.logsigmoid(margin_P)
        return PairLosses(loss_P, margin_P, chosen_P, rejected_P)
    assert reference is not None
    gained_BK = total_BK - reference.weighted(preference)[0]
    if preference.loss == "ipo":
        gained_BK = gained_BK / divisor_BK
    gained_chosen_P, gained_rejected_P = sides(gained_BK)
    margin_P = gained_chosen_P - gained_rejected_P
    if preference.loss == "ipo":
        loss_P = (margin_P - 1 / (2 * preference.beta)).square()
    else:
        scaled_P, doubt = preference.beta * margin_P, preference.label_smoothing
        loss_P = -(1 - doubt) * F.logsigmoid(scaled_P) - doubt * F.logsigmoid(-scaled_P)
    return PairLosses(loss_P - preference.chosen_weight * chosen_P, margin_P, chosen_P, rejected_P)


def _log_odds(mean_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean); means of next to 0 are kept away from it."""
    mean_P = mean_P.clamp(max=-1e-6)
    return mean_P - torch.log1p(-mean_P.exp())
