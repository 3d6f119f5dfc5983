"""Every figure equals a public library's, and what is known of simulated raters is found again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.study.statistics.agreement import agreement, alpha, fleiss_kappa, table
from calumma.platform.study.statistics.guessing import reliability
from calumma.platform.study.statistics.strength import fit, strengths
from calumma.platform.study.statistics.votes import duel, majority, mean_share, share

VALUES = ("first", "same", "second")


def simulated(reliabilities: list[float], items: int, seed: int = 0) -> list[list[str]]:
    """What raters say who know the truth of an item with their reliability, and guess evenly otherwise."""
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, 3, items)
    said = np.empty((items, len(reliabilities)), dtype=int)
    for rater, knows in enumerate(reliabilities):
        guess = chance.integers(0, 3, items)
        said[:, rater] = np.where(chance.random(items) < knows, truth, guess)
    return [[VALUES[value] for value in row] for row in said]


@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.6, 0.8, 1.0])
def test_raters_of_known_reliability_have_the_alpha_that_follows(wanted: float) -> None:
    """Two who know with probability r agree with r² + (1 - r²) / 3, by chance with 1/3: alpha is r²."""
    found = agreement(simulated([math.sqrt(wanted)] * 3, 12_000), VALUES)
    assert found.alpha_nominal == pytest.approx(wanted, abs=0.02)
    assert found.kappa == pytest.approx(wanted, abs=0.02)
    uneven = [0.9, 0.7, 0.4]
    pairs = [0.63, 0.36, 0.28]
    assert agreement(simulated(uneven, 12_000), VALUES).alpha_nominal == pytest.approx(np.mean(pairs), abs=0.02)


def test_alpha_is_that_of_the_published_example() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section D: four observers, missing values."""
    observers = (
        "1,2,3,3,2,1,4,1,2,-,-,-",
        "1,2,3,3,2,2,4,1,2,5,-,3",
        "-,3,3,3,2,3,4,2,2,5,1,-",
        "1,2,3,3,2,4,4,1,2,5,1,-",
    )
    rows = [row.split(",") for row in observers]
    votes = [[row[unit] for row in rows if row[unit] != "-"] for unit in range(12)]
    found = agreement(votes, ("1", "2", "3", "4", "5"))
    assert found.alpha_nominal == pytest.approx(0.743, abs=5e-4)
    assert found.alpha_ordinal == pytest.approx(0.815, abs=5e-4)


@given(st.lists(st.lists(st.sampled_from(VALUES), min_size=3, max_size=3), min_size=2, max_size=30))
def test_fleiss_kappa_is_that_of_statsmodels(votes: list[list[str]]) -> None:
    from statsmodels.stats.inter_rater import fleiss_kappa as theirs

    counts = table(votes, VALUES)
    ours = fleiss_kappa(counts)
    if ours is None:  # everybody says the same of everything
        assert (counts.sum(axis=0) > 0).sum() == 1
    else:
        assert ours == pytest.approx(theirs(counts), abs=1e-12)


@given(st.lists(st.lists(st.sampled_from(VALUES), min_size=0, max_size=4), min_size=2, max_size=30))
def test_alpha_of_the_counts_is_that_of_the_table_of_raters(votes: list[list[str]]) -> None:
    import krippendorff

    counts = table(votes, VALUES)
    ours = alpha(counts, "ordinal")
    judged = counts[counts.sum(axis=1) > 1]
    if ours is None:
        assert not len(judged) or (judged.sum(axis=0) > 0).sum() == 1
        return
    raters = np.full((4, len(votes)), np.nan)
    for item, said in enumerate(votes):
        for rater, value in enumerate(said):
            raters[rater, item] = VALUES.index(value)
    theirs = krippendorff.alpha(reliability_data=raters, level_of_measurement="ordinal", value_domain=[0, 1, 2])
    assert ours == pytest.approx(theirs, abs=1e-9)


def games(systems: int, number: int, seed: int) -> list[tuple[str, str, float]]:
    chance = np.random.default_rng(seed)
    true = chance.normal(0, 1, systems)
    played = []
    for _ in range(number):
        a, b = chance.choice(systems, 2, replace=False)
        odds = 1 / (1 + math.exp(true[b] - true[a]))
        score = 0.5 if chance.random() < 0.2 else float(chance.random() < odds)
        played.append((f"s{a}", f"s{b}", score))
    return played


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_choix(seed: int) -> None:
    import choix

    names = [f"s{n}" for n in range(5)]
    played = games(5, 120, seed)
    place = {name: number for number, name in enumerate(names)}
    twice: list[tuple[int, int]] = []  # every win counts two, a tie one for both
    for a, b, score in played:
        twice += [(place[a], place[b])] * round(2 * score) + [(place[b], place[a])] * round(2 - 2 * score)
    theirs = choix.opt_pairwise(5, twice, alpha=2e-4, tol=1e-10)
    wins = np.zeros((5, 5))
    for winner, loser in twice:
        wins[winner, loser] += 0.5
    np.testing.assert_allclose(fit(wins, 1e-4), theirs - theirs.mean(), atol=1e-5)
    likeliest = choix.ilsr_pairwise(5, twice, alpha=0)
    np.testing.assert_allclose(fit(wins, 1e-9), likeliest - likeliest.mean(), atol=1e-4)
    found = {one.system: one for one in strengths(names, played)}
    for name in names:
        assert found[name].value == pytest.approx(fit(wins)[place[name]], abs=1e-9)
        assert found[name].low <= found[name].value <= found[name].high


# Of arena-rank 0.1.1, which wants versions of its own of numpy and JAX: run once on the same games.
ARENA_RANK = [
    {"s0": -0.0047539, "s1": -0.3678415, "s2": 0.9227179, "s3": -0.0134925, "s4": -0.53663},
    {"s0": 0.2641322, "s1": 0.7064246, "s2": -0.4563275, "s3": -1.0464483, "s4": 0.532219},
    {"s0": 0.2916991, "s1": 0.1551369, "s2": -0.4571426, "s3": -1.2714009, "s4": 1.2817075},
]


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_arena_rank(seed: int) -> None:
    found = strengths([f"s{n}" for n in range(5)], games(5, 120, seed))
    assert {one.system: one.value for one in found} == pytest.approx(ARENA_RANK[seed], abs=1e-4)


def test_a_system_that_always_wins_has_a_finite_strength() -> None:
    found = strengths(["a", "b", "c"], [("a", "b", 1.0), ("a", "c", 1.0), ("b", "c", 0.5)] * 10)
    assert found[0].system == "a"
    assert all(math.isfinite(one.value) for one in found)
    assert strengths(["a", "b"], []) == []


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (441, 1048), (10, 10)])
def test_intervals_of_shares_are_those_of_statsmodels(count: int, total: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    found = share(count, total)
    assert (found.low, found.high) == pytest.approx(proportion_confint(count, total, method="wilson"), abs=1e-9)


def test_majorities_ties_and_losses_are_counted_as_the_paper_does() -> None:
    assert majority(["a", "a", "b"]) == "a"
    assert majority(["a", "b", "c"]) is None
    assert majority(["a", "b"]) is None
    votes: list[list[Any]] = [["x", "x", "y"], ["x", None, "y"], [None, None, "x"], ["y", "y", "y"], ["x", "x", None]]
    found = duel("x", "y", votes)
    assert (found.wins, found.ties, found.losses, found.undecided) == (2, 2, 1, 1)
    assert found.rate.value == pytest.approx(0.6)
    assert found.rate.low < 0.6 < found.rate.high
    assert mean_share([1.0] * 20).low == pytest.approx(share(20, 20).low)
    assert mean_share([]).total == 0


def test_the_interval_of_a_rate_covers_it_about_as_often_as_it_says() -> None:
    chance = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        drawn = chance.choice([1.0, 0.5, 0.0], 150, p=[0.45, 0.25, 0.3])
        found = mean_share(list(drawn))
        covered += found.low <= 0.575 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_who_guesses_is_flagged_and_who_does_not_is_not() -> None:
    said = simulated([0.8, 0.75, 0.7, 0.0], 60, seed=3)
    votes = {
        name: {f"i{n}": row[rater] for n, row in enumerate(said)}
        for rater, name in enumerate(("ann", "ben", "cleo", "guesser"))
    }
    votes["lazy"] = {f"i{n}": "same" for n in range(60)}
    votes["new"] = {f"i{n}": "first" for n in range(5)}
    seconds = {"ann": [20.0] * 60, "guesser": [1.5] * 60}
    found = {one.annotator: one for one in reliability(votes, VALUES, seconds)}
    assert {name for name, one in found.items() if one.flags} == {"guesser", "lazy"}
    assert found["guesser"].flags == (
        "takes 1.5 s for a judgement",
        "agrees with the others no better than by chance",
    )
    assert any("says 'same' of 100%" in flag for flag in found["lazy"].flags)
    assert found["ann"].agrees is not None
    assert found["ann"].by_chance is not None
    assert found["ann"].agrees > found["ann"].by_chance + 0.1


def test_shares_of_agreement_count_all_two_and_none() -> None:
    votes = [["first"] * 3, ["first", "first", "same"], list(VALUES), ["second"] * 3, ["same"]]
    found = agreement(votes, VALUES)
    assert (found.items, found.votes) == (5, 3)
    assert found.shares == {3: 0.5, 2: 0.25, 1: 0.25}
    nobody = agreement([["first"], ["same"]], VALUES)
    assert (nobody.alpha_nominal, nobody.kappa, nobody.shares) == (None, None, {})
