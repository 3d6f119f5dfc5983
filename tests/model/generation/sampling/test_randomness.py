"""Random numbers by counter, against the known answers of Random123 (its kat_vectors, philox4x64 with 10 rounds)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.generation import SamplingParams, nth_seed
from calumma.model.generation.sampling.jacobi import JacobiDraft
from calumma.model.generation.sampling.randomness import BLOCK, FILLED, SeatNumbers, exponential, uniform

ZERO = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)  # key and counter 0
seeds = st.integers(-(2**63), 2**64 - 1)


def words(numbers: torch.Tensor) -> list[int]:
    """The upper 24 bits of each 32, from numbers of 0..1."""
    return (numbers.double() * 2**24).long().tolist()


def test_a_block_is_random123s() -> None:
    """Low halves first."""
    expected = [half >> 8 for word in ZERO for half in (word & 0xFFFFFFFF, word >> 32)]
    assert words(uniform(0, 0, 1, BLOCK)[0]) == expected


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Philox4x64-10 by the paper's letter."""
    for _ in range(10):
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second % 2**64,
            (first >> 64) ^ counter[3] ^ key[1],
            first % 2**64,
        ]
        key = ((key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64)
    return counter


def test_the_letter_of_the_paper_gives_random123s_answers() -> None:
    pi = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
    answer = [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6]
    assert philox((0x452821E638D01377, 0xBE5466CF34E90C6C), pi) == answer
    full = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert philox((2**64 - 1, 2**64 - 1), [2**64 - 1] * 4) == full


@given(seed=seeds, first=st.integers(0, 2**40), stream=st.integers(0, 2**30))
def test_numbers_are_those_of_seed_draw_and_stream(seed: int, first: int, stream: int) -> None:
    raw = philox((seed % 2**64, 0), [first, stream, 0, 0])
    expected = [half >> 8 for word in raw for half in (word & 0xFFFFFFFF, word >> 32)]
    assert words(uniform(seed, first, 1, BLOCK, stream)[0]) == expected


@given(seed=seeds, first=st.integers(0, 500), count=st.integers(1, 40), width=st.integers(1, 20))
def test_a_draw_is_the_same_wherever_one_begins(seed: int, first: int, count: int, width: int) -> None:
    whole = uniform(seed, 0, first + count, width)
    assert torch.equal(uniform(seed, first, count, width), whole[first:])
    assert whole.shape == (first + count, width)
    assert bool(((whole >= 0) & (whole < 1)).all())


@given(
    begins=st.lists(st.tuples(st.integers(0, 1), seeds, st.integers(0, 2**20)), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, FILLED), max_size=12),
)
def test_a_seat_has_the_numbers_of_the_draws_it_is_at(begins: list[tuple[int, int, int]], steps: list[int]) -> None:
    """However far it looks ahead, tried twice or not, and whatever it held before."""
    numbers = SeatNumbers(2, 5, torch.device("cpu"))
    for seat, seed, first in begins:
        numbers.seat(seat, seed, first)
        for count in steps:
            numbers.reserve(seat, first + count)
            numbers.reserve(seat, first + 1)
            drawn = torch.arange(first, first + count)
            assert torch.equal(numbers.of(torch.full((count,), seat), drawn), uniform(seed, first, count, 5))
            first += count
    assert numbers.table_SNX.shape == (2, 2 * FILLED, 5), "as large for answers of any length"


def test_all_64_bits_of_a_seed_count_and_it_wraps() -> None:
    several = [5, 5 + 2**32, 5 + 2**63, -5, 2**64 - 1, 0]
    assert len({tuple(uniform(seed, 3, 2, 5).flatten().tolist()) for seed in several}) == len(several)
    assert torch.equal(uniform(-5, 0, 4, 5), uniform(2**64 - 5, 0, 4, 5))


def test_numbers_are_spread_evenly() -> None:
    """100 classes of 50,000 numbers: beyond 149 one in 1,000 good generators."""
    counts = (uniform(1, 0, 10_000, 5).flatten() * 100).long().bincount(minlength=100).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 149


def test_drafts_of_several_places_have_numbers_of_their_own() -> None:
    """And none of them those of the draws."""
    flat = torch.full((1, 64), 1 / 64)
    codes = {JacobiDraft(1, 0).verify(flat, place, 9)[0] for place in range(20)}
    assert len(codes) > 10
    again = [JacobiDraft(1, 0).verify(flat, 7, 9) for _ in range(2)]
    assert again[0] == again[1]


def test_exponential_numbers_win_races_as_often_as_they_should() -> None:
    """A million draws from unequal weights: beyond 29.9 one in 10,000 exact samplers with 8 codes; and their tail."""
    p = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.0299, 0.0001])
    numbers = torch.stack([exponential(3, place, 8 * 1000, 1) for place in range(1000)]).view(-1, 8)
    counts = (p / numbers).argmax(-1).bincount(minlength=8).double()
    assert float(((counts - 1e6 * p) ** 2 / (1e6 * p)).sum()) < 29.9
    assert bool((numbers > 0).all())
    for least in (1.0, 5.0):
        assert float((numbers > least).double().mean()) == pytest.approx(math.exp(-least), rel=0.01)
    several = [exponential(seed, place, 8, stream) for seed in (0, 2**40) for place in (0, 1) for stream in (1, 2)]
    assert len({tuple(one.tolist()) for one in several}) == 8


def test_seeds_of_several_answers_follow_each_other_and_wrap() -> None:
    assert [nth_seed(5, number) for number in range(3)] == [5, 6, 7]
    assert nth_seed(2**64 - 1, 1) == 0
    assert nth_seed(2**63 - 1, 1) == 2**63
    assert nth_seed(-2, 1) == 2**64 - 1  # -1 would be random
    assert nth_seed(None, 3) is nth_seed(-1, 3) is None
    assert all(SamplingParams(seed=seed).random for seed in (None, -1))
    assert not any(SamplingParams(seed=seed).random for seed in (0, 2**64 - 1, -(2**63)))
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            SamplingParams(seed=seed)
