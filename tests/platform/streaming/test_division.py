"""Dividing a global batch: every sequence once, evenly, and at a steady speed when workers are lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.streaming.division import Division

divisions = st.builds(Division, st.integers(1, 300), st.integers(1, 9), st.booleans())


@given(divisions, st.integers(1, 40), st.data())
def test_every_sequence_is_one_workers_and_in_one_pass(division: Division, world: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(1, division.sequences))
    bounds = [division.bounds(total, rank, world) for rank in range(world)]
    assert [begin for begin, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == total
    for begin, end in bounds:
        rows = division.pass_rows(begin, end, world)
        assert len(rows) == division.passes(world)
        assert sum(rows) == end - begin <= division.most(world)
        assert 0 <= min(rows) <= max(rows) <= division.rows
        assert division.whole or max(rows) - min(rows) <= 1


@given(divisions, st.integers(1, 12), st.integers(1, 4), st.data())
def test_workers_that_share_rows_are_one_to_the_data(
    division: Division, groups: int, sharing: int, data: st.DataObject
) -> None:
    shared, world = replace(division, sharing=sharing), groups * sharing
    total = data.draw(st.integers(1, division.sequences))
    for rank in range(world):
        begin, end = shared.bounds(total, rank, world)
        assert (begin, end) == division.bounds(total, rank // sharing, groups)
        assert shared.pass_rows(begin, end, world) == division.pass_rows(begin, end, groups)
    assert shared.efficiency(world) == division.efficiency(groups)


def test_rows_that_are_shared_divide_more_finely() -> None:
    """Chameleon 7B's batch, when a machine of 8 of 1,024 GPUs is lost."""
    assert Division(2048, rows=1).efficiency(1016) == pytest.approx(0.67, abs=0.01)
    assert Division(2048, rows=1, sharing=8).efficiency(1016) == pytest.approx(0.949, abs=0.001)


# Sequences of a global batch, workers at full size, the least share of proportional speed at every size from half of
# them on. With s sequences a worker it is no less than s / (s + 1): the busiest has one more than the mean at most.
STEADY = [
    (2048, 16, 0.99),  # Chameleon 7B's batch on the H100s of ray_cluster.yaml
    (2048, 64, 0.97),
    (2048, 107, 0.95),  # as many as its batch keeps steady
    (3072, 16, 0.99),  # 34B's
    (3072, 128, 0.96),
    (3072, 161, 0.95),
]


@pytest.mark.parametrize(("sequences", "workers", "least"), STEADY)
def test_any_number_of_workers_from_half_to_all_runs_at_proportional_speed(
    sequences: int, workers: int, least: float
) -> None:
    division = Division(sequences, rows=2)
    speeds = {world: division.efficiency(world) for world in range(workers // 2, workers + 1)}
    assert min(speeds.values()) >= least, min(speeds, key=lambda world: speeds[world])


def test_one_worker_less_no_longer_halves_the_speed() -> None:
    """Micro-batches of two sequences that stay together, as they were tokenized; and their sequences."""
    together, apart = Division(1024, rows=2, whole=True), Division(1024, rows=2)
    assert together.efficiency(512) == apart.efficiency(512) == 1
    assert together.efficiency(511) == pytest.approx(0.5, abs=0.01)
    assert apart.efficiency(511) == pytest.approx(0.67, abs=0.01)
    assert Division(1024, rows=1, whole=True).efficiency(511) == apart.efficiency(511), "with dropout: rows_per_pass 1"


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 and 2"):
        Division(0, 2)
    with pytest.raises(ValueError, match="5 workers are no multiple of the 2 that share their sequences"):
        Division(8, 1, sharing=2).passes(5)
