"""Drawing from a distribution, filtered or not."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.generation.sampling import categorical
from calumma.model.generation.sampling.categorical import RUN, draw, draw_by_rejection, inverse_cdf, largest


def filters(rows: int, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0) -> Tensor:
    return torch.tensor([[top_p], [min_p], [float(top_k)]]).expand(3, rows)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({"top_p": 1.0}, [4, 0, 3, 6, 2]),
        ({"top_p": 0.8}, [4, 0, 3, 6, 0]),
        ({"top_p": 0.6}, [4, 0, 0, 6, 0]),
        ({"top_p": 0.66}, [4, 0, 0, 6, 0]),  # two thirds are reached
        ({"top_p": 0.673}, [4, 0, 3, 6, 0]),
        ({"top_p": 0.86}, [4, 0, 3, 6, 0]),
        ({"top_p": 0.873}, [4, 0, 3, 6, 2]),
        ({"top_p": 0.0}, [0, 0, 0, 1, 0]),
        ({"top_k": 3}, [4, 0, 3, 6, 0]),
        ({"top_k": 1}, [0, 0, 0, 1, 0]),
        ({"min_p": 0.5}, [4, 0, 3, 6, 0]),
        ({"min_p": 0.34}, [4, 0, 3, 6, 0]),
        ({"min_p": 0.3}, [4, 0, 3, 6, 2]),
        ({"top_k": 3, "top_p": 0.75}, [4, 0, 0, 6, 0]),  # of the mass that top_k leaves
        ({"top_k": 4, "min_p": 0.6, "top_p": 0.5}, [0, 0, 0, 6, 0]),
    ],
)
def test_filters_leave_ids_in_proportion(given: dict[str, float], weights: list[int]) -> None:
    grid = 4500
    probabilities_RC = torch.tensor([[4.0, 0, 3, 6, 2]]).expand(grid, -1) / 15
    uniform_R = (torch.arange(grid) + 0.5) / grid
    drawn_R1 = draw(probabilities_RC.clone(), filters(grid, **cast(Any, given)), uniform_R)
    counts = drawn_R1.flatten().bincount(minlength=5).tolist()
    assert counts == pytest.approx([grid * weight / sum(weights) for weight in weights], abs=1)


WEIGHTS = [4, 0, 3, 6, 3, 2]  # of 18; two are equally likely
# top_p on both sides of every mass at which the nucleus changes, 6/18, 10/18 and 16/18; the other filters; none
KINDS = [
    *((boundary / 18 * factor, 0.0, 0) for boundary in (6, 10, 16) for factor in (0.98, 1.02)),
    (0.0, 0.0, 0),
    (0.72, 0.0, 0),
    (1.0, 0.0, 0),
    (0.75, 0.0, 3),
    (0.9, 0.34, 0),
]


def nucleus(top_p: float, min_p: float, top_k: int) -> list[int]:
    """The weights that filters leave of WEIGHTS, by the letter of PhaseSampling."""
    ranked = sorted(WEIGHTS, reverse=True)[: top_k or None]
    ranked = [weight for weight in ranked if weight >= min_p * ranked[0]]
    left = next(n for n in range(1, len(ranked) + 1) if n == len(ranked) or sum(ranked[:n]) >= top_p * sum(ranked))
    return [weight if weight >= ranked[left - 1] else 0 for weight in WEIGHTS]


@pytest.mark.parametrize("tries", [1, 2])
def test_ids_drawn_by_rejection_have_exactly_the_filtered_distribution(tries: int) -> None:
    """By enumeration: a random number matters by the id it leads to alone, so one number for each unit of weight stands
    for all. Rows of all kinds side by side."""
    settings, uniform, sizes = [], [], []
    for kind in KINDS:
        total, left = sum(WEIGHTS), sum(nucleus(*kind))
        places = [*itertools.product(range(total), repeat=tries)]
        cells = [[*((p + 0.5) / total for p in place), (k + 0.5) / left] for place in places for k in range(left)]
        settings += [kind] * len(cells)
        uniform += cells
        sizes.append(len(cells))
    weights_RC = torch.tensor([WEIGHTS] * len(uniform), dtype=torch.float)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(categorical, "TRIES", tries)
        drawn_R1 = draw_by_rejection(weights_RC, torch.tensor(settings).T, torch.tensor(uniform))
    for kind, size, drawn in zip(KINDS, sizes, drawn_R1.flatten().split(sizes), strict=True):
        left = nucleus(*kind)
        assert drawn.bincount(minlength=len(left)).tolist() == [size * weight // sum(left) for weight in left], kind


def test_a_row_gets_the_same_id_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    weights_RC = torch.rand(12, 700, generator=generator) ** 8
    filters_3R = torch.tensor([[0.9], [0.0], [0.0]]).repeat(1, 12)
    filters_3R[0, 3], filters_3R[2, 5] = 0.2, 10
    uniform_RX = torch.rand(12, 5, generator=generator)
    together_R1 = draw_by_rejection(weights_RC.clone(), filters_3R, uniform_RX)
    for row in range(12):
        own = slice(row, row + 1)
        assert torch.equal(
            draw_by_rejection(weights_RC[own].clone(), filters_3R[:, own], uniform_RX[own]), together_R1[own]
        )


@given(
    columns=st.sampled_from([1, 5, RUN - 1, RUN, RUN + 1, 5 * RUN]),
    number=st.floats(0, 1, exclude_max=True, width=32),
    seed=st.integers(0, 999),
)
def test_runs_find_what_a_plain_search_finds(columns: int, number: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights_RC = torch.randint(0, 4, (2, columns), generator=generator).float()  # sums of them are exact; many are 0
    weights_RC[:, -1] += 1
    for row, found in zip(
        weights_RC.tolist(), inverse_cdf(weights_RC, torch.tensor([number] * 2)).tolist(), strict=True
    ):
        left, plain = float(torch.tensor(number) * torch.tensor(sum(row))), 0
        while left >= row[plain]:
            left -= row[plain]
            plain += 1
        assert found == [plain]
    values_RC = torch.randint(-3, 3, (2, columns), generator=generator).float()
    top_R1, first_R1 = largest(values_RC)
    assert top_R1.flatten().tolist() == [max(row) for row in values_RC.tolist()]
    assert first_R1.flatten().tolist() == [row.index(max(row)) for row in values_RC.tolist()]


def test_the_largest_uniform_number_stays_among_the_possible() -> None:
    probabilities_RC = torch.zeros(1, 5000)
    probabilities_RC[0, :4999] = 1 / 4999
    largest_R = torch.tensor([1 - 2**-24])
    assert int(draw(probabilities_RC, None, largest_R)) == 4998
    assert int(draw(torch.tensor([[0.0, 0.5, 0.5]]), None, torch.zeros(1))) == 1
