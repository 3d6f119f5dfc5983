"""Speculative Jacobi decoding: the same distribution, the same tokens where nothing is left to chance, fewer passes."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams, Statistics
from calumma.model.generation.sampling import jacobi
from calumma.model.generation.sampling.jacobi import JacobiDraft
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 3  # codes of an image
CODES = 3
V = Vocabulary(size=16, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=[7, 8, 9])
PROMPT = [V.bos, 12, 11]


@pytest.fixture(scope="module")
def transformer(make_transformer: Callable[..., Transformer]) -> Transformer:
    return make_transformer(V.size, std=0.5, layers=1, width=16, heads=2, kv_heads=1, ffn_width=24)


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

    def next_code(codes: tuple[int, ...]) -> list[float]:
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
            chance *= next_code(tuple(V.image_ids[c] for c in codes[:place]))[code]
        found[tuple(V.image_ids[c] for c in codes)] = chance
    return found


# -- the draft alone, by enumeration --

# Rows of a toy model over three codes, in quarters: what a code is distributed as depends on all codes before it.
ROWS = torch.tensor([[2, 1, 1], [1, 2, 1], [1, 1, 2], [3, 1, 0]]) / 4


def following(codes: tuple[int, ...]) -> Tensor:
    return ROWS[(len(codes) + sum((place + 2) * code for place, code in enumerate(codes))) % len(ROWS)]


def cells(*limits: float) -> list[tuple[float, float]]:
    """Numbers that stand for a uniform one that is compared with `limits`, and their chances: two in each interval
    between them, close to its ends, so that a limit that is off by 3 % is noticed."""
    found = []
    for low, high in itertools.pairwise([0.0, *limits, 1.0]):
        found += [(low * 1.02 + 1e-3, (high - low) / 2), (high * 0.98 - 1e-3, (high - low) / 2)]
    return found


ACCEPT = cells(1 / 3, 1 / 2, 2 / 3)  # all quotients of two quarters of ROWS below 1
INVERT = [((place + 0.5) / 4, 1 / 4) for place in range(4)]  # what is drawn from is in quarters, or in halves of those


def outcomes(draft: JacobiDraft, p_XC: Tensor, left: int) -> Iterator[tuple[float, list[int], JacobiDraft]]:
    """Everything `verify` can do, with its chance: the codes it accepts, and the draft afterwards."""
    window, drafted = draft.window, len(draft.codes)
    proposed = max(0, min(window, left - 2))
    axes = [ACCEPT] * drafted + [INVERT] + [INVERT] * proposed
    for numbers in itertools.product(*axes):
        values = [value for value, _ in numbers]
        uniform = torch.full((3, window + 1), 0.5)
        uniform[0, :drafted] = torch.tensor(values[:drafted])
        uniform[1] = values[drafted]
        uniform[2, :proposed] = torch.tensor(values[drafted + 1 :])
        after = copy.copy(draft)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jacobi, "uniform", lambda *_, uniform=uniform, **__: uniform)
            codes = after.verify(p_XC, left)
        yield math.prod(chance for _, chance in numbers), codes, after


@pytest.mark.parametrize(("window", "length"), [(1, 3), (2, 4)])
def test_drafted_images_have_exactly_the_models_distribution(window: int, length: int) -> None:
    """Every way that the random numbers can lead, with its chance: passes verify drafts until the image is whole."""
    found: defaultdict[tuple[int, ...], float] = defaultdict(float)
    states: dict[Any, tuple[float, tuple[int, ...], JacobiDraft]] = {"": (1.0, (), JacobiDraft(0, 0, window))}
    while states:
        reached: dict[Any, tuple[float, tuple[int, ...], JacobiDraft]] = {}
        for chance, image, draft in states.values():
            p_XC = torch.stack([following((*image, *draft.codes[:n])) for n in range(len(draft.codes) + 1)])
            for share, codes, after in outcomes(draft, p_XC, length - len(image)):
                longer = (*image, *codes)
                if len(longer) == length:
                    found[longer] += chance * share
                    continue
                key = (longer, tuple(after.codes), tuple(after._q_WC.flatten().tolist()))
                before = reached[key][0] if key in reached else 0.0
                reached[key] = (before + chance * share, longer, after)
        states = reached
    for image in itertools.product(range(3), repeat=length):
        expected = math.prod(float(following(image[:n])[code]) for n, code in enumerate(image))
        assert found[image] == pytest.approx(expected, abs=1e-6), image


# -- the engine with drafts --


# 27 images: 26 degrees of freedom, or 7 with two codes at each place; beyond these values one in 10,000 exact samplers.
# That the rows of a pass belong to the drafts is what this is for; small errors of the draft itself are found above.
@pytest.mark.parametrize(
    ("window", "image", "limit"),
    [
        (0, PhaseSampling(1.0, 1.0), 60.1),
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
