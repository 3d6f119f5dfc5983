"""The plan: the same steps on any number of workers, every micro-batch once an epoch, shares as the weights say."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from calumma.platform.data.manifest import FileEntry, Manifest
from calumma.platform.data.plan import MAX_PERIOD, MicroBatch, Plan, PlanError, permuted

weights = st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.65, 1.0, 2.0, 3.0, 7.5])
seeds = st.integers(0, 2**64)


def token_shards(name: str, groups: list[int], rows: int = 2, **specification: Any) -> Manifest:
    """Shards with these numbers of row groups, `rows` sequences each but one in the last."""
    files = [
        FileEntry.of(
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
    return Plan(draw(seeds), mixture, manifests, draw(st.integers(1, 7)))


def all_of(manifest: Manifest, uri: str) -> list[tuple[str, int]]:
    return [(f"{uri}/{file.path}", group) for file in manifest.files for group in range(file.row_groups)]


@given(plans(), st.integers(0, 10**7), st.integers(1, 9))
def test_the_global_batch_is_the_same_on_any_number_of_workers(plan: Plan, step: int, world: int) -> None:
    shares = [plan.worker(step, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {plan.slots(world)}, "no worker takes more turns than another"
    in_turn = [shares[rank][slot] for slot in range(plan.slots(world)) for rank in range(world)]
    expected = plan.step(step)
    assert len(expected) == plan.micro_batches
    assert in_turn[: len(expected)] == expected
    assert in_turn[len(expected) :] == [None] * (len(in_turn) - len(expected)), "only the ends are empty"


@given(st.data())
def test_every_micro_batch_is_visited_once_an_epoch(data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    seed, start = data.draw(seeds), data.draw(st.integers(0, 50))
    manifest = token_shards("a", groups)
    plan = Plan(seed, {"s3://b/a": 1.0}, {"s3://b/a": manifest}, 1)
    total = sum(groups)
    epoch = [plan.micro_batch(start * total + place) for place in range(total)]
    assert sorted((found.shard, found.row_group) for found in epoch) == all_of(manifest, "s3://b/a")
    assert sum(found.sequences for found in epoch) == manifest.rows
    assert plan.epochs(start * total) == {"s3://b/a": float(start)}


@given(plans(), st.integers(0, 10**6), st.integers(1, 200))
def test_shares_follow_the_weights_in_every_prefix_and_window(plan: Plan, start: int, length: int) -> None:
    period = len(plan._choice)
    share = {source.uri: Fraction(part, period) for source, part in zip(plan.sources, plan._parts, strict=True)}
    counts: Counter[str] = Counter()
    for index in range(min(length, 3 * period)):
        counts[plan.micro_batch(index).source] += 1
        assert all(abs(counts[uri] - share[uri] * (index + 1)) < 1 for uri in share)
    window = Counter(plan.micro_batch(index).source for index in range(start, start + length))
    assert all(abs(window[uri] - share[uri] * length) < 2 for uri in share), "two prefixes apart"


@given(st.lists(st.decimals("0.001", "100", places=3).map(float), min_size=1, max_size=6))
def test_shares_are_the_weights_that_were_written(given_weights: list[float]) -> None:
    names = [f"s3://b/{number}" for number in range(len(given_weights))]
    manifests = {name: token_shards(name, [1]) for name in names}
    plan = Plan(0, dict(zip(names, given_weights, strict=True)), manifests, 1)
    period = len(plan._choice)
    exact = [Fraction(str(weight)) for weight in given_weights]
    for part, weight in zip(plan._parts, exact, strict=True):
        error = abs(Fraction(part, sum(plan._parts)) - weight / sum(exact))
        assert error == 0 if period < MAX_PERIOD else error <= Fraction(len(exact), MAX_PERIOD)


@given(plans(), st.integers(0, 10**9))
def test_epochs_say_how_far_each_source_is(plan: Plan, step: int) -> None:
    assume(step < 300 or plan.micro_batches * step > 10**6)
    before = plan.epochs(step)
    counts = Counter(found.source for found in plan.step(step))
    for source in plan.sources:
        gained = (plan.epochs(step + 1)[source.uri] - before[source.uri]) * source.total
        assert gained == pytest.approx(counts[source.uri], abs=1e-3)
    if step < 300:
        so_far = Counter(found.source for n in range(step) for found in plan.step(n))
        assert before == {source.uri: so_far[source.uri] / source.total for source in plan.sources}


@given(st.integers(1, 400), st.binary(min_size=1, max_size=40))
def test_permutations_permute(size: int, key: bytes) -> None:
    assert sorted(permuted(value, size, key) for value in range(size)) == list(range(size))


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


def test_every_place_is_reached_from_everywhere() -> None:
    landed = Counter(permuted(3, 10, key.to_bytes(4, "little")) for key in range(5000))
    assert set(landed) == set(range(10))
    # 500 expected each, standard deviation 21: chi-squared with 9 degrees of freedom, 99.9 % below 27.9
    assert sum((count - 500) ** 2 / 500 for count in landed.values()) < 27.9


def test_the_order_does_not_depend_on_where_the_shards_are_nor_how_they_are_listed() -> None:
    a, b = token_shards("a", [5, 6]), token_shards("b", [7])
    here = Plan(3, {"s3://x/a": 0.3, "s3://x/b": 0.7}, {"s3://x/a": a, "s3://x/b": b}, 4)
    turned = a.model_copy(update={"files": a.files[::-1]})
    there = Plan(3, {"/mnt/b": 7, "/mnt/a": 3}, {"/mnt/b": b, "/mnt/a": turned}, 4)
    for n in range(50):
        moved = [found.shard.replace("s3://x", "/mnt") for found in here.step(n)]
        assert [found.shard for found in there.step(n)] == moved
        assert [f.row_group for f in there.step(n)] == [f.row_group for f in here.step(n)]


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
    with pytest.raises(PlanError, match="no worker 2 among 2"):
        plan.worker(0, 2, 2)
