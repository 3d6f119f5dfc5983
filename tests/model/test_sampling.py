"""Drawing from a distribution, and the limits of sampling parameters."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.model.generation.sampler import Sampler
from calumma.model.generation.sequence import Sequence


@pytest.mark.parametrize(
    ("top_p", "weights"), [(1.0, [6, 4, 3, 3]), (0.8, [6, 4, 3, 0]), (0.6, [6, 4, 0, 0]), (0.0, [1, 0, 0, 0])]
)
def test_top_p_draws_in_proportion_from_the_smallest_sufficient_set(top_p: float, weights: list[int]) -> None:
    grid = 3900
    probabilities_RV = torch.tensor([[0.25, 0.0, 0.1875, 0.375, 0.1875]]).expand(grid, -1)
    uniform_R = (torch.arange(grid) + 0.5) / grid
    drawn_R1 = Sampler._draw(probabilities_RV, torch.full((grid,), top_p), uniform_R)
    counts = drawn_R1.flatten().bincount(minlength=5)[[3, 0, 2, 4, 1]].tolist()
    expected = [grid * weight / sum(weights) for weight in weights]
    assert counts == pytest.approx([*expected, 0], abs=1)


def test_the_largest_uniform_number_stays_among_the_possible() -> None:
    probabilities_RV = torch.zeros(1, 5000)
    probabilities_RV[0, :4999] = 1 / 4999
    largest_R = torch.tensor([1 - 2**-24])
    assert int(Sampler._draw(probabilities_RV, torch.ones(1), largest_R)) == 4998


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PhaseSampling(temperature=-1),
        lambda: PhaseSampling(temperature=float("nan")),
        lambda: PhaseSampling(top_p=1.1),
        lambda: PhaseSampling(repetition_penalty=0),
        lambda: SamplingParams(max_tokens=0),
        lambda: SamplingParams(max_images=-1),
        lambda: SamplingParams(mode=cast(Any, "video")),
        lambda: SamplingParams(guidance_text=float("inf")),
        lambda: SamplingParams(image=PhaseSampling(repetition_penalty=1.2)),
        lambda: SamplingParams(seed=2**64),
    ],
)
def test_parameters_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"-1|nan|1\.1|0|video|inf|image codes|64 bits"):
        wrong()


def test_a_slot_keeps_what_a_new_context_shares_with_it() -> None:
    sequence = Sequence(0, [0, 4, 7, 8, 9], cached=4)
    sequence.become([0, 4, 7, 6, 5])
    assert (sequence.cached, sequence.pending) == (3, 1)
    sequence.become([0, 4])  # the last token is always decoded anew, for its logits
    assert (sequence.cached, sequence.pending) == (1, 0)
    sequence.become([1, 4, 7])
    assert (sequence.cached, sequence.pending) == (0, 2)
