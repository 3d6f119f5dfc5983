"""Speculative Jacobi decoding: the same distribution, the same tokens where nothing is left to chance, fewer passes."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams, Statistics
from calumma.model.generation.sampling.jacobi import JacobiDraft
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 3  # codes of an image
CODES = 3
V = Vocabulary(size=16, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=[7, 8, 9])
PROMPT = [V.bos, 12, 11]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    config = ModelConfig(vocabulary_size=V.size, layers=1, width=16, heads=2, kv_heads=1, ffn_width=24, context=64)
    made, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5, generator=generator)
    return made.eval()


def images(
    transformer: Transformer, count: int, image: PhaseSampling, length: int = N, **options: Any
) -> tuple[list[tuple[int, ...]], Statistics]:
    engine = Engine(transformer, V, length, max_sequences=250, **options)
    found: dict[str, list[int]] = {str(number): [] for number in range(count)}
    for id in found:
        engine.add(Request(id, PROMPT, SamplingParams(mode="image", image=image, guidance_text=2.0, seed=int(id))))
    while engine.has_work:
        for event in engine.step():
            found[event.request_id] += event.tokens
    return [tuple(tokens[1:-1]) for tokens in found.values()], engine.statistics


def chi_squared(observed: Counter[Any], expected: dict[Any, float], total: int) -> float:
    return sum((observed[key] - total * p) ** 2 / (total * p) for key, p in expected.items() if p > 0)


@torch.no_grad()
def exactly(transformer: Transformer, image: PhaseSampling) -> dict[tuple[int, ...], float]:
    """The probability of every image, by plain passes."""

    def following(codes: tuple[int, ...]) -> list[float]:
        full, nothing = (
            transformer(torch.tensor([[*context, V.begin_image, *codes]]))[0, -1, V.image_ids]
            for context in (PROMPT, [V.bos])
        )
        p = ((nothing + 2.0 * (full - nothing)) / image.temperature).softmax(-1)
        if image.top_k:
            p = torch.where(p >= p.topk(image.top_k).values[-1], p, 0.0)
        return (p / p.sum()).tolist()

    found = {}
    for codes in itertools.product(range(CODES), repeat=N):
        chance = 1.0
        for place, code in enumerate(codes):
            chance *= following(tuple(V.image_ids[c] for c in codes[:place]))[code]
        found[tuple(V.image_ids[c] for c in codes)] = chance
    return found


# 27 images: 26 degrees of freedom, or 7 with two codes at each place; beyond these values one in 10,000 exact samplers
@pytest.mark.parametrize(
    ("window", "image", "limit"),
    [
        (0, PhaseSampling(1.0, 1.0), 60.1),
        (1, PhaseSampling(1.0, 1.0), 60.1),
        (2, PhaseSampling(1.0, 1.0), 60.1),
        (2, PhaseSampling(1.5, 1.0, top_k=2), 29.9),
    ],
)
def test_images_come_with_exactly_their_probability(
    transformer: Transformer, window: int, image: PhaseSampling, limit: float
) -> None:
    expected, count = exactly(transformer, image), 6000
    drawn, statistics = images(transformer, count, image, jacobi_window=window)
    observed = Counter(drawn)
    assert set(observed) <= {key for key, p in expected.items() if p > 0}
    assert chi_squared(observed, expected, count) < limit
    if window:
        assert 0.1 < statistics.acceptance < 1


def test_a_sampler_that_is_not_exact_would_be_found_out(transformer: Transformer) -> None:
    """The statistics can tell: accepting every draft fails by far."""
    image = PhaseSampling(1.0, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JacobiDraft, "verify", _credulous)
        drawn, _ = images(transformer, 6000, image, jacobi_window=2)
    assert chi_squared(Counter(drawn), exactly(transformer, image), 6000) > 100


verify = JacobiDraft.verify


def _credulous(self: JacobiDraft, p_XC: torch.Tensor, left: int) -> list[int]:
    p_XC = p_XC.clone()
    for place, code in enumerate(self.codes):
        p_XC[place] = torch.nn.functional.one_hot(torch.tensor(code), p_XC.shape[1])
    return verify(self, p_XC, left)


def test_greedy_images_are_the_same_in_fewer_passes(transformer: Transformer) -> None:
    greedy = PhaseSampling(temperature=0)
    plain, one_by_one = images(transformer, 3, greedy, length=24, image_burst=1)
    found, drafted = images(transformer, 3, greedy, length=24, jacobi_window=6)
    assert found == plain
    assert drafted.counters.steps < one_by_one.counters.steps
    assert drafted.acceptance > 0


def test_a_seed_gives_the_same_image_in_any_company(transformer: Transformer) -> None:
    image = PhaseSampling(1.2, 0.95)
    alone = [images(transformer, n + 1, image, length=12, jacobi_window=4)[0][n] for n in range(4)]
    options = {"block_size": 4, "cache_tokens": 56, "prefill_tokens": 2}
    crowded, statistics = images(transformer, 4, image, length=12, jacobi_window=4, **options)
    assert crowded == alone
    assert statistics.counters.preemptions > 0
    assert statistics.blocks_used == 0
