"""The limits of sampling parameters."""

from __future__ import annotations

from typing import Any, cast

import pytest

from calumma.model.generation import PhaseSampling, SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PhaseSampling(temperature=-1),
        lambda: PhaseSampling(temperature=float("nan")),
        lambda: PhaseSampling(top_p=1.1),
        lambda: PhaseSampling(repetition_penalty=0),
        lambda: PhaseSampling(top_k=-1),
        lambda: PhaseSampling(min_p=1.1),
        lambda: SamplingParams(logprobs=-1),
        lambda: SamplingParams(prompt_logprobs=65),
        lambda: SamplingParams(max_tokens=0),
        lambda: SamplingParams(max_images=-1),
        lambda: SamplingParams(mode=cast(Any, "video")),
        lambda: SamplingParams(guidance_text=float("inf")),
        lambda: SamplingParams(image=PhaseSampling(repetition_penalty=1.2)),
        lambda: SamplingParams(seed=2**64),
    ],
)
def test_parameters_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"-1|nan|1\.1|0|video|inf|image codes|64 bits|65"):
        wrong()
