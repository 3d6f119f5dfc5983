"""Losses of pairs: the papers' formulas, a micro-batch of packed pairs as each pair alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.config import ModelConfig
from calumma.model.encoding import EncodedArrays
from calumma.model.transformer import Transformer
from calumma.platform.tokenizing.preferences import EncodedPair, pack_pairs
from calumma.platform.training.preferences.losses import AnswerScores, pair_losses
from calumma.platform.training.preferences.objective import PreferenceObjective
from calumma.platform.training.preferences.reference import ReferenceScores, documents
from calumma.platform.training.sections import Preference
from calumma.platform.training.steps.held_out import HeldOutBatch

SHAPE = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=40, vocabulary_size=40, mask_documents=True
)
IMAGE_V = torch.arange(40) >= 30
KINDS = [
    Preference(),
    Preference(loss="ipo", beta=0.3),
    Preference(loss="orpo", beta=0.5),
    Preference(text_weight=0.5, image_weight=2.0, label_smoothing=0.1, chosen_weight=0.3),
]


def model(seed: int) -> Transformer:
    found = Transformer(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3, generator=generator)
    return found.eval()


POLICY, REFERENCE = model(0), model(1)


def encoded(prompt: list[int], answer: list[int]) -> EncodedArrays:
    import numpy as np

    ids = np.array([1, *prompt, *answer, 2], np.int32)
    trained = np.zeros(len(ids), np.bool_)
    trained[1 + len(prompt) : -1] = True
    return EncodedArrays(ids, trained)


ids = st.lists(st.integers(3, 39), min_size=1, max_size=8)
pairs = st.builds(lambda p, c, r: EncodedPair(encoded(p, c), encoded(p, r)), ids, ids, ids)


def batch(found: list[EncodedPair]) -> HeldOutBatch:
    import numpy as np

    rows = pack_pairs(found, SHAPE.context + 1, pad=0)
    columns = [np.stack([getattr(row, name) for row in rows]) for name in ("tokens", "loss_mask", "segments")]
    tokens, mask, segments = (torch.from_numpy(column) for column in columns)
    return HeldOutBatch(tokens.long(), mask, segments.long())


def objective(preference: Preference, *batches: HeldOutBatch) -> PreferenceObjective:
    found = PreferenceObjective(preference, IMAGE_V)
    if preference.loss != "orpo":
        values = {}
        with torch.no_grad():
            for each in batches:
                scores = found.scores(REFERENCE, each)
                for row, number, key in documents(each):
                    values[key] = (float(scores.text_BK[row, number]), float(scores.image_BK[row, number]))
        found.reference = ReferenceScores(values)
    return found


def logprob(transformer: Transformer, document: EncodedArrays, kind: Preference) -> tuple[float, float]:
    """Of an answer alone: weighted sum, and the sum of weights."""
    tokens = torch.from_numpy(document.ids).long()[None]
    with torch.no_grad():
        logprobs = transformer(tokens[:, :-1]).double().log_softmax(-1)[0]
    targets = tokens[0, 1:]
    own = logprobs[torch.arange(len(targets)), targets]
    weights = torch.where(IMAGE_V[targets], kind.image_weight, kind.text_weight).double()
    weights = weights * torch.from_numpy(document.trained[1:])
    return float((own * weights).sum()), float(weights.sum())


def expected(pair: EncodedPair, kind: Preference) -> float:
    (c, nc), (r, nr) = (logprob(POLICY, side, kind) for side in (pair.chosen, pair.rejected))
    (rc, _), (rr, _) = (logprob(REFERENCE, side, kind) for side in (pair.chosen, pair.rejected))

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    if kind.loss == "dpo":
        h = kind.beta * ((c - rc) - (r - rr))
        s = kind.label_smoothing
        return -(1 - s) * log_sigmoid(h) - s * log_sigmoid(-h) - kind.chosen_weight * c / nc
    if kind.loss == "ipo":
        return ((c - rc) / nc - (r - rr) / nr - 1 / (2 * kind.beta)) ** 2
    odds = [x - math.log1p(-math.exp(x)) for x in (c / nc, r / nr)]
    return -c / nc - kind.beta * log_sigmoid(odds[0] - odds[1])


@settings(max_examples=12, deadline=None)
@given(found=st.lists(pairs, min_size=1, max_size=5), kind=st.sampled_from(KINDS))
def test_packed_pairs_cost_what_each_costs_alone(found: list[EncodedPair], kind: Preference) -> None:
    packed = batch(found)
    own = objective(kind, packed)
    with torch.no_grad():
        loss = own.losses(POLICY, packed, IMAGE_V, normalizer=2.0)
    assert float(loss.total) * 2 == pytest.approx(sum(expected(pair, kind) for pair in found), rel=1e-4, abs=1e-4)
    assert int(loss.sums.text_count) == len(found) == int(own.count([packed], torch.device("cpu")).text)


def test_what_starts_at_the_reference_has_no_margin_and_the_gradient_parts_the_two() -> None:
    policy = model(1)
    packed = batch([EncodedPair(encoded([5, 6], [7, 31, 32]), encoded([5, 6], [8, 33]))])
    own = objective(Preference(), packed)
    before = own.scores(policy, packed)
    loss = own.losses(policy, packed, IMAGE_V)
    assert float(loss.total.detach()) == pytest.approx(math.log(2), abs=1e-6)
    loss.total.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    after = own.scores(policy, packed)
    gained = (after.text_BK + after.image_BK - before.text_BK - before.image_BK).detach()
    assert gained[0, 0] > 0 > gained[1, 0]
    own.metrics()
    own.losses(policy, packed, IMAGE_V)
    assert own.metrics()["preference/accuracy"] == 1.0


def test_a_worker_without_pairs_takes_part_and_weighs_nothing() -> None:
    none = torch.zeros(0, 3, dtype=torch.long)
    loss = objective(Preference()).losses(model(0), HeldOutBatch(none, none.bool(), none), IMAGE_V)
    assert float(loss.total.detach()) == 0
    assert loss.total.requires_grad


def test_chunks_of_logits_change_nothing() -> None:
    from calumma.model.ops.loss import linear_logprobs

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, 8, generator=generator), torch.randn(40, 8, generator=generator)
    targets, rows = torch.randint(40, (2, 9), generator=generator), torch.tensor([0, 3, 4, 9, 17])
    found: list[Any] = []
    for chunk in (1, 2, 100):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        scores = linear_logprobs(a, b, targets, rows, chunk)
        (scores * torch.arange(5)).sum().backward()  # type: ignore[no-untyped-call]
        found.append((scores.detach(), a.grad, b.grad))
    plain = (x.flatten(0, 1)[rows] @ weight.T).log_softmax(-1).gather(1, targets.flatten()[rows][:, None])[:, 0]
    for scores, *gradients in found:
        torch.testing.assert_close(scores, plain, rtol=0, atol=1e-5)
        for mine, first in zip(gradients, found[0][1:], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=1e-5)


def test_weights_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be learned"):
        Preference(text_weight=0, image_weight=0)
    scores = AnswerScores.of(
        torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.ones(2, 3).bool(), torch.zeros(2, 3).bool()
    )
    assert pair_losses(scores, scores, Preference()).margin_P.tolist() == [0.0]
