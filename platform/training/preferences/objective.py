"""The objective of a stage that learns from preferences, in the place of the loss of tokens: what a micro-batch costs,
how many pairs a global batch has, and what is told of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from calumma.model.ops.loss import Loss, LossSums
from calumma.platform.training.preferences.losses import AnswerScores, pair_losses
from calumma.platform.training.preferences.reference import ReferenceScores
from calumma.platform.training.sections import Preference
from calumma.platform.training.steps.engine import Batch, Counts, sum_over_workers


class PreferenceObjective:
    """`reference` is set before the first step, but for orpo."""

    def __init__(self, preference: Preference, image_mask_V: Tensor) -> None:
        self.preference, self.image_mask_V = preference, image_mask_V
        self.reference: ReferenceScores | None = None
        self._seen = torch.zeros(5, dtype=torch.float64, device=image_mask_V.device)

    def count(self, group: list[Any], device: torch.device) -> Counts:
        """Pairs of a global batch, in the place of text tokens; and all its tokens but padding."""
        local = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in group:
            answered = _answered(batch)
            local += torch.tensor([answered, float((batch.segments[:, 1:] >= 0).sum())], dtype=torch.float64).to(device)
        pairs, tokens = sum_over_workers(local).tolist()
        return Counts(pairs, 0.0, tokens)

    def scores(self, model: Any, batch: Batch) -> AnswerScores:
        """Of a micro-batch, which must not be empty."""
        device = self.image_mask_V.device
        tokens, mask, segments = (each.to(device) for each in (batch.tokens, batch.mask, batch.segments))
        targets, mask = tokens[:, 1:], mask[:, 1:]
        scores_BT = model(
            tokens[:, :-1], segments[:, :-1], targets=targets, mask=mask, image_mask=self.image_mask_V, scores=True
        )
        return AnswerScores.of(scores_BT, segments[:, 1:], mask, self.image_mask_V[targets])

    def losses(self, model: Any, batch: Batch, image_mask_V: Tensor, **settings: Any) -> Loss:
        """As `engine.losses`: the sum over pairs by the normalizer, and that sum in the place of the text's."""
        if not batch.tokens.shape[0]:
            return _nothing(model, image_mask_V.device)
        found = self.scores(model, batch)
        reference = self.reference.of(batch, found) if self.reference is not None else None
        pairs = pair_losses(found, reference, self.preference)
        total = pairs.loss_P.sum()
        with torch.no_grad():
            told = [
                torch.ones_like(pairs.margin_P), pairs.margin_P, (pairs.margin_P > 0).float(),
                pairs.chosen_P, pairs.rejected_P,
            ]  # fmt: skip
            self._seen += torch.stack([each.sum() for each in told]).double()
        zero = total.detach() * 0
        count = torch.tensor(float(len(pairs.loss_P)), device=total.device)
        sums = LossSums(total.detach(), count, zero, zero, zero)
        return Loss(total / settings.get("normalizer", 1.0), sums, {})

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it what is seen is told apart from what was seen before, which goes on afterwards."""
        before, self._seen = self._seen, torch.zeros_like(self._seen)
        try:
            yield
        finally:
            self._seen = before

    def metrics(self) -> dict[str, float]:
        """Means since they were last told, over all workers. Every worker calls it."""
        pairs, margin, right, chosen, rejected = sum_over_workers(self._seen.clone()).tolist()
        self._seen.zero_()
        if not pairs:
            return {}
        means = {"margin": margin, "accuracy": right, "chosen_logprob": chosen, "rejected_logprob": rejected}
        return {f"preference/{name}": value / pairs for name, value in means.items()}


def _answered(batch: Batch) -> float:
    """Pairs that have an answer on both sides."""
    targets = batch.segments[:, 1:]
    if not targets.numel():
        return 0.0
    count_BK = torch.zeros(len(targets), int(targets.max()) + 2)
    count_BK.scatter_add_(1, targets.clamp(min=-1).cpu() + 1, batch.mask[:, 1:].cpu().float())
    return float(((count_BK[0::2, 1:] > 0) & (count_BK[1::2, 1:] > 0)).sum())


def _nothing(model: Any, device: torch.device) -> Loss:
    """Of a short worker: a pass that weighs nothing, for the others wait for its collectives."""
    tokens = torch.zeros(2, 3, dtype=torch.long, device=device)
    mask = torch.ones(2, 2, dtype=torch.bool, device=device)
    image_mask = torch.zeros(1, dtype=torch.bool, device=device)
    scores_BT = model(
        tokens[:, :-1], tokens[:, :-1], targets=tokens[:, 1:], mask=mask, image_mask=image_mask, scores=True
    )
    total = scores_BT.sum() * 0
    zero = total.detach()
    return Loss(total, LossSums(zero, zero, zero, zero, zero), {})
