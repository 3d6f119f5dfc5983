"""The least probability that top-k, min-p and top-p leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.generation.sampling import filters as filtering
from calumma.model.generation.sampling.filters import thresholds


def plainly(row: list[float], top_p: float, min_p: float, top_k: int) -> float:
    """The least probability kept, by the letter of PhaseSampling."""
    ranked = sorted(row, reverse=True)
    ranked = [p for p in ranked[: top_k or None] if p >= min_p * ranked[0]]
    if top_p >= 1:
        return ranked[-1]
    mass, kept = sum(ranked), ranked[:1]
    while sum(kept) < top_p * mass - 1e-9 and len(kept) < len(ranked):
        kept.append(ranked[len(kept)])
    return kept[-1]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.02, 0.4]), st.integers(0, 12)),
        min_size=1,
        max_size=4,
    ),
    sharpness=st.sampled_from([0.01, 1.0, 4.0]),
    few=st.sampled_from([1, 2, 4, 64]),
    many=st.sampled_from([2, 1000]),
    seed=st.integers(0, 999),
)
def test_thresholds_are_the_same_however_many_are_looked_at(
    rows: list[tuple[float, float, int]], sharpness: float, few: int, many: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities_RC = (torch.randn(len(rows), 40, generator=generator) * sharpness).softmax(-1)
    top_p_R, min_p_R, top_k_R = torch.tensor(rows).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtering, "FEW", few)
        patch.setattr(filtering, "MANY", many)
        found_R = thresholds(probabilities_RC, top_p_R, min_p_R, top_k_R)
    for row, (top_p, min_p, top_k), threshold in zip(probabilities_RC.tolist(), rows, found_R.tolist(), strict=True):
        expected = plainly(row, top_p, min_p, top_k)
        assert [p >= threshold for p in row] == [p >= expected for p in row]


@pytest.mark.parametrize(("few", "many"), [(64, 1000), (1, 1000), (1, 2)], ids=["sorted", "few at first", "by bits"])
def test_the_nucleus_ends_where_its_mass_is_reached(few: int, many: int) -> None:
    """On both sides of every mass at which it changes, whichever way it is looked for."""
    weights = [2, 6, 3, 4, 3, *[0] * 6]
    reached = [(6, 6), (10, 4), (16, 3), (18, 2)]  # of 18, and the least weight that is kept up to there
    rows = [
        (mass / 18 * factor, reached[min(index + (factor > 1), 3)][1])
        for index, (mass, _) in enumerate(reached)
        for factor in (0.97, 1.03)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtering, "FEW", few)
        patch.setattr(filtering, "MANY", many)
        top_p_R = torch.tensor([min(top_p, 0.999) for top_p, _ in rows])
        probabilities_RC = torch.tensor([weights] * len(rows)) / 18
        found_R = thresholds(probabilities_RC, top_p_R, torch.zeros(len(rows)), torch.zeros(len(rows)))
    assert (found_R * 18).tolist() == pytest.approx([least for _, least in rows])
