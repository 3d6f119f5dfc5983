"""The plan: the same steps on any number of workers, every micro-batch once an epoch, shares as the weights say."""

from __future__ import annotations

import dataclasses
import pickle
import tracemalloc
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calumma.platform.shards.row_groups import MicroBatch, all_micro_batches
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.streaming.plan import MAX_PERIOD, ROUNDS, Plan, PlanError, Share, permuted

weights = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.65, 1.0, 2.0, 3.0, 7.5])
seeds = st.integers(0, 2**64)


def token_shards(name: str, groups: list[int], rows: int = 2, **specification: Any) -> Manifest:
    """Shards with these numbers of row groups, `rows` sequences each but one in the last."""
    files = [
        FileEntry.from_bytes(
            f"{number}.parquet",
            f"{name} {number}".encode(),
            rows=(count - 1) * rows + 1,
            row_groups=count,
            sequences_per_row_group=rows,
        )
        for number, count in enumerate(groups)
    ]
    return Manifest(kind="tokens", files=files, specification=specification)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = [f"s3://b/{name}" for name in "cab"[: draw(st.integers(1, 3))]]
    manifests = {name: token_shards(name, draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))) for name in names}
    mixture = {name: draw(weights) for name in names}
    rows = draw(st.one_of(st.none(), st.integers(1, 5)))
    return Plan(draw(seeds), mixture, manifests, draw(st.integers(1, 7)), rows, draw(st.booleans()))


def all_of(manifest: Manifest, uri: str) -> list[tuple[str, int]]:
    return [(f"{uri}/{file.path}", group) for file in manifest.files for group in range(file.row_groups)]


def first_micro_batches(plan: Plan, start: int, count: int) -> list[MicroBatch]:
    """Micro-batches by their number among all ever."""
    m = plan.micro_batches
    return plan.to_micro_batches(plan.steps(start // m, (start + count) // m + 1))[start % m :][:count]


Row = tuple[MicroBatch, int]  # a sequence: a micro-batch, and which of its rows


def rows_of(plan: Plan, step: int) -> list[Row]:
    """All sequences of a step, in order."""
    return [(found, row) for found in plan.step(step) for row in range(found.sequences)]


def taken(share: Share) -> list[Row]:
    return [(piece.micro_batch, row) for piece in share.pieces for row in range(piece.begin, piece.end)]


@given(plans(), st.integers(0, 10**7), st.integers(1, 16))
def test_the_global_batch_is_the_same_on_any_number_of_workers(plan: Plan, step: int, world: int) -> None:
    shares = [plan.shares(step, step + 1, rank, world)[0] for rank in range(world)]
    expected, so_far = rows_of(plan, step), 0
    assert len(plan.step(step)) == plan.micro_batches
    for share in shares:
        found = taken(share)
        assert len(share.passes) == plan.division.passes(world), "no worker takes more passes than another"
        assert sum(share.passes) == len(found)
        assert max(share.passes) <= plan.division.rows
        assert not found or share.first == so_far
        assert found == expected[so_far : so_far + len(found)]
        so_far += len(found)
    assert so_far == len(expected)
    counts = [sum(share.passes) for share in shares]
    assert counts[0] == max(counts), "the first worker never has nothing"
    if not plan.division.whole:
        assert max(counts) - min(counts) <= 1


@given(plans(), st.integers(0, 10**7), st.integers(1, 16), st.integers(1, 16))
def test_whole_passes_are_the_same_on_any_number_of_workers(plan: Plan, step: int, one: int, other: int) -> None:
    """Dropout is drawn by the number of a pass's first sequence: it too is then the same."""
    whole = dataclasses.replace(plan.division, whole=True)
    plan.division = whole

    def passes(world: int) -> list[tuple[int, int]]:
        found = []
        for rank in range(world):
            (share,) = plan.shares(step, step + 1, rank, world)
            first = share.first
            for rows in share.passes:
                found += [(first, rows)] if rows else []
                first += rows
        return found

    assert passes(one) == passes(other)
    assert all(first % whole.rows == 0 for first, _ in passes(one))


@given(
    plans(),
    st.integers(0, 10**9),
    st.lists(st.tuples(st.integers(1, 16), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=6),
)
def test_no_sequence_of_resizes_and_resumptions_skips_or_repeats_anything(
    plan: Plan, start: int, runs: list[tuple[int, int, int]]
) -> None:
    """Each run has some workers, goes some steps on, and dies: the last few of them are in no checkpoint."""
    trained: dict[int, Counter[Row]] = {}
    step = start
    for world, steps, lost in runs:
        for rank in range(world):
            for share in plan.shares(step, step + steps, rank, world):
                trained.setdefault(share.step, Counter())
                if share.step < step + steps - lost:
                    trained[share.step].update(taken(share))
        step += max(steps - lost, 0)
    undisturbed = {n: Counter(rows_of(plan, n)) for n in range(start, step)}
    assert {n: trained[n] for n in undisturbed} == undisturbed


@given(plans(), st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 5))
def test_many_steps_at_once_are_those_steps(plan: Plan, first: int, before: int, after: int) -> None:
    last = first + before + after
    every = plan.to_micro_batches(plan.steps(first, last))
    assert every == [found for n in range(first, last) for found in plan.step(n)]
    assert plan.shares(first, last, 0, 2) == [s for n in range(first, last) for s in plan.shares(n, n + 1, 0, 2)]


@given(plans(), st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 5)), max_size=8))
def test_a_step_is_the_same_whatever_was_asked_for_before(plan: Plan, runs: list[tuple[int, int]]) -> None:
    asked = [first + n for first, steps in runs for n in range(steps)]
    assert [plan.step(n) for n in asked] == [plan.to_micro_batches(plan.steps(n, n + 1)) for n in asked]


@given(st.data())
def test_every_micro_batch_is_visited_once_an_epoch(data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    seed, start = data.draw(seeds), data.draw(st.integers(0, 50))
    manifest = token_shards("a", groups)
    plan = Plan(seed, {"s3://b/a": 1.0}, {"s3://b/a": manifest}, 1)
    total = sum(groups)
    assert plan.totals == {"s3://b/a": total}
    epoch = first_micro_batches(plan, start * total, total)
    assert sorted((found.shard, found.row_group) for found in epoch) == all_of(manifest, "s3://b/a")
    assert sum(found.sequences for found in epoch) == manifest.rows
    assert plan.epochs(start * total) == {"s3://b/a": float(start)}


@given(plans())
def test_of_a_mixture_too_every_source_passes_through_its_micro_batches_in_turn(plan: Plan) -> None:
    seen: dict[str, list[MicroBatch]] = {uri: [] for uri in plan.sources}
    for found in first_micro_batches(plan, 0, 300):
        seen[found.source].append(found)
    for uri, total in plan.totals.items():
        epochs = [seen[uri][begin : begin + total] for begin in range(0, len(seen[uri]) - total + 1, total)]
        assert all(len(set(epoch)) == total for epoch in epochs)


@given(plans(), st.integers(0, 10**6), st.integers(1, 200))
def test_shares_follow_the_weights_in_every_prefix_and_window(plan: Plan, start: int, length: int) -> None:
    period, count = len(plan.choice), len(plan.sources)
    prefix = 1 - Fraction(1, 2 * count - 2) if count > 1 else Fraction(0)
    share = {uri: Fraction(int(part), period) for uri, part in zip(plan.sources, plan.period_counts, strict=True)}
    counts: Counter[str] = Counter()
    for number, found in enumerate(first_micro_batches(plan, 0, min(length, 3 * period)), 1):
        counts[found.source] += 1
        assert all(abs(counts[uri] - share[uri] * number) <= prefix for uri in share)
    window = Counter(found.source for found in first_micro_batches(plan, start, length))
    assert all(abs(window[uri] - share[uri] * length) <= 2 * prefix for uri in share)


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6))
def test_no_window_is_further_off_than_the_bound(parts: list[int]) -> None:
    names = [f"s3://b/{number}" for number in range(len(parts))]
    plan = Plan(0, dict(zip(names, parts, strict=True)), {name: token_shards(name, [1]) for name in names}, 1)
    period = len(plan.choice)
    bound = 2 - Fraction(1, len(parts) - 1)  # one micro-batch for two sources
    for number, part in enumerate(plan.period_counts):
        ahead = np.cumsum(period * (plan.choice == number) - part)  # of its share, in units of 1 / period
        assert ahead[-1] == 0, "so the windows that go around the period are no different"
        assert Fraction(int(ahead.max() - ahead.min()), period) <= bound


@settings(max_examples=30)  # unlike weights have long periods
@given(st.lists(st.decimals("0.001", "100", places=3).map(float), min_size=1, max_size=6))
def test_shares_are_the_weights_that_were_written(given_weights: list[float]) -> None:
    names = [f"s3://b/{number}" for number in range(len(given_weights))]
    manifests = {name: token_shards(name, [1]) for name in names}
    plan = Plan(0, dict(zip(names, given_weights, strict=True)), manifests, 1)
    period = len(plan.choice)
    exact = [Fraction(str(weight)) for weight in given_weights]
    for part, weight in zip(plan.period_counts.tolist(), exact, strict=True):
        error = abs(Fraction(part, period) - weight / sum(exact))
        assert error == 0 if period < MAX_PERIOD else error <= Fraction(len(exact), MAX_PERIOD)


@given(plans(), st.integers(0, 10**9))
def test_epochs_say_how_far_each_source_is(plan: Plan, step: int) -> None:
    assume(step < 300 or plan.micro_batches * step > 10**6)
    before = plan.epochs(step)
    counts = Counter(found.source for found in plan.step(step))
    for uri, total in plan.totals.items():
        gained = (plan.epochs(step + 1)[uri] - before[uri]) * total
        assert gained == pytest.approx(counts[uri], abs=1e-3)
    if step < 300:
        so_far = Counter(found.source for n in range(step) for found in plan.step(n))
        assert before == {uri: so_far[uri] / total for uri, total in plan.totals.items()}


def keys(seed: int, count: int) -> Any:
    return np.random.default_rng(seed).integers(0, 2**64, (count, ROUNDS), np.uint64)


@given(st.integers(1, 400) | st.integers(10**4, 10**5), st.integers(0, 2**32))
def test_permutations_permute(size: int, seed: int) -> None:
    every = np.arange(size)
    found = permuted(every, np.full(size, size), np.broadcast_to(keys(seed, 1), (size, ROUNDS)))
    assert np.array_equal(np.sort(found), every)


@given(st.lists(st.integers(1, 2**60), min_size=1, max_size=20), st.integers(0, 2**32))
def test_permutations_of_any_size_stay_inside_and_take_no_notice_of_each_other(sizes: list[int], seed: int) -> None:
    values, own = np.array(sizes) - 1, keys(seed, len(sizes))
    together = permuted(values, np.array(sizes), own)
    assert ((0 <= together) & (together < sizes)).all()
    for n in range(len(sizes)):
        assert permuted(values[n : n + 1], np.array(sizes[n : n + 1]), own[n : n + 1]) == together[n]


def test_orders_differ_by_seed_and_epoch() -> None:
    manifest = token_shards("a", [40, 60])

    def order(seed: int, epoch: int) -> list[MicroBatch]:
        plan = Plan(seed, {"x": 1.0}, {"x": manifest}, 100)
        return plan.step(epoch)

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert order(0, 1) == orders[1]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            same = sum(a == b for a, b in zip(one, other, strict=True))
            assert same < 12, "of 100; one is expected by chance"


# Chi-squared where 99.9 % of good permutations stay below, by degrees of freedom (size - 1).
@pytest.mark.parametrize(("size", "limit"), [(2, 10.8), (3, 13.8), (5, 18.5), (10, 27.9), (37, 68.0)])
def test_every_place_is_reached_from_everywhere_alike(size: int, limit: float) -> None:
    count = 20_000
    for start in (0, size - 1):
        landed = permuted(np.full(count, start), np.full(count, size), keys(1, count))
        expected = count / size
        assert ((np.bincount(landed, minlength=size) - expected) ** 2 / expected).sum() < limit


def test_neighbours_are_torn_apart() -> None:
    plan = Plan(0, {"x": 1.0}, {"x": token_shards("a", [1000, 1000])}, 2000)
    order = np.array([found.row_group + 1000 * found.shard.endswith("1.parquet") for found in plan.step(0)])
    places = np.arange(2000)
    assert abs(np.corrcoef(order, places)[0, 1]) < 0.1  # standard deviation 0.022
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1


def test_memory_does_not_grow_with_the_number_of_micro_batches_or_the_step() -> None:
    def peak(row_groups: int, step: int) -> int:
        plan = Plan(0, {"x": 1.0}, {"x": token_shards("a", [row_groups])}, 32)
        plan.step(0)
        tracemalloc.start()
        plan.step(step)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(10**9, 10**8) < 2 * peak(10**3, 100)


def test_the_order_does_not_depend_on_where_the_shards_are_nor_how_they_are_listed() -> None:
    a, b = token_shards("a", [5, 6]), token_shards("b", [7])
    here = Plan(3, {"s3://x/a": 0.3, "s3://x/b": 0.7}, {"s3://x/a": a, "s3://x/b": b}, 4)
    turned = a.model_copy(update={"files": a.files[::-1]})
    there = Plan(3, {"/mnt/b": 7, "/mnt/a": 3}, {"/mnt/b": b, "/mnt/a": turned}, 4)
    for n in range(50):
        moved = [found.shard.replace("s3://x", "/mnt") for found in here.step(n)]
        assert [found.shard for found in there.step(n)] == moved
        assert [f.row_group for f in there.step(n)] == [f.row_group for f in here.step(n)]


def test_footers_of_the_manifest_are_known_to_the_micro_batches() -> None:
    digests = ["00" * 31 + "ab", "ab" + "00" * 31]
    files = [
        FileEntry.from_bytes(f"{n}", b"%d" % n, rows=1, row_groups=1, footer={"bytes": 12 + n, "sha256": digest})
        for n, digest in enumerate(digests)
    ]
    files.append(FileEntry.from_bytes("old", b"old", rows=1, row_groups=1))
    manifest = Manifest(kind="tokens", files=files)
    plan = Plan(0, {"x": 1.0}, {"x": manifest}, 3)
    assert sorted(plan.step(0)) == sorted(all_micro_batches("x", manifest))  # what held-out losses are read by
    found = {batch.shard: (batch.footer_bytes, batch.footer_sha256.hex()) for batch in plan.step(0)}
    assert found == {"x/0": (12, digests[0]), "x/1": (13, digests[1]), "x/old": (0, "00" * 32)}


def test_plans_travel_to_reading_tasks() -> None:
    plan = Plan(3, {"a": 0.3, "b": 0.7}, {"a": token_shards("a", [5, 6]), "b": token_shards("b", [7])}, 4)
    assert pickle.loads(pickle.dumps(plan)).step(10**6) == plan.step(10**6)


def test_a_small_source_beside_a_huge_one_is_not_forgotten() -> None:
    manifests = {"big": token_shards("big", [3]), "small": token_shards("small", [3])}
    plan = Plan(0, {"big": 1.0, "small": 1e-9}, manifests, 1)
    assert plan.epochs(MAX_PERIOD + 1)["small"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batches": 0}, "at least one micro-batch"),
        ({"mixture": {}}, "mixture is empty"),
        ({"mixture": {"a": 0.0}}, "above 0, found 0"),
        ({"mixture": {"a": float("nan")}}, "above 0, found nan"),
        ({"mixture": {"a": 1.0, "b": 1.0}}, "b: no manifest"),
        ({"manifests": {"a": Manifest(kind="tokens")}}, "a: these token shards hold no row groups"),
        (
            {
                "mixture": {"a": 1.0, "b": 1.0},
                "manifests": {"a": token_shards("a", [1], context=8), "b": token_shards("b", [1], context=9)},
            },
            "different contexts cannot be mixed .a: 8, b: 9",
        ),
    ],
)
def test_impossible_mixtures_are_explained(changes: dict[str, Any], said: str) -> None:
    arguments = {"seed": 0, "mixture": {"a": 1.0}, "manifests": {"a": token_shards("a", [1])}, "micro_batches": 1}
    with pytest.raises(PlanError, match=said):
        Plan(**{**arguments, **changes})


def test_steps_and_ranks_outside_are_refused() -> None:
    plan = Plan(0, {"a": 1.0}, {"a": token_shards("a", [1])}, 2)
    with pytest.raises(PlanError, match="from 0"):
        plan.step(-1)
    with pytest.raises(PlanError, match="from 0"):
        plan.shares(-1, 3, 0, 1)
    with pytest.raises(PlanError, match="no worker 2 among 2"):
        plan.shares(0, 1, 2, 2)
