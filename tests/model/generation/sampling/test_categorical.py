"""Drawing from a distribution, and the limits of sampling parameters."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.generation.sampling import categorical
from calumma.model.generation.sampling.categorical import RUN, draw, inverse_cdf, largest, propose


def filters(rows: int, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0) -> Tensor:
    return torch.tensor([[top_p], [min_p], [float(top_k)]]).expand(3, rows)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({"top_p": 1.0}, [4, 0, 3, 6, 2]),
        ({"top_p": 0.8}, [4, 0, 3, 6, 0]),
        ({"top_p": 0.6}, [4, 0, 0, 6, 0]),
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


@pytest.mark.parametrize("tries", [1, 4])
def test_proposed_ids_have_the_distribution_of_the_filtered_ones(tries: int) -> None:
    """Rows of all kinds side by side: a wide nucleus, a narrow one, other filters, none that filters."""
    weights = [4.0, 0, 3, 6, 2]
    kinds = [
        (0.8, 0.0, 0, [4, 0, 3, 6, 0]),
        (0.6, 0.0, 0, [4, 0, 0, 6, 0]),
        (0.3, 0.0, 0, [0, 0, 0, 6, 0]),
        (1.0, 0.0, 0, [4, 0, 3, 6, 2]),
        (0.75, 0.0, 3, [4, 0, 0, 6, 0]),
        (0.9, 0.34, 0, [4, 0, 3, 6, 0]),
    ]
    each = 5000
    filters_3R = torch.tensor([kind[:3] for kind in kinds]).repeat(each, 1).T
    uniform_RX = torch.rand(each * len(kinds), tries + 1, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(categorical, "TRIES", tries)
        drawn_R1 = propose(torch.tensor([weights]).repeat(len(uniform_RX), 1), filters_3R, uniform_RX)
    for number, (*_, left) in enumerate(kinds):
        counts = drawn_R1[number :: len(kinds)].flatten().bincount(minlength=5).tolist()
        expected = [each * weight / sum(left) for weight in left]
        assert [count > 0 for count in counts] == [weight > 0 for weight in left]
        assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e) < 20  # chi-square, 4 degrees


def test_a_row_gets_the_same_id_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    weights_RC = torch.rand(12, 700, generator=generator) ** 8
    filters_3R = torch.tensor([[0.9], [0.0], [0.0]]).repeat(1, 12)
    filters_3R[0, 3], filters_3R[2, 5] = 0.2, 10
    uniform_RX = torch.rand(12, 5, generator=generator)
    together_R1 = propose(weights_RC.clone(), filters_3R, uniform_RX)
    for row in range(12):
        own = slice(row, row + 1)
        assert torch.equal(propose(weights_RC[own].clone(), filters_3R[:, own], uniform_RX[own]), together_R1[own])


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
