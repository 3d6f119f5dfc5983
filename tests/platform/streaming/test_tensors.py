"""The stream: what Ray Data hands to each worker is what the plan and the shards say, on any number of workers."""

from __future__ import annotations

import io
import logging
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calumma.platform import storage
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.row_groups import MicroBatch, RowGroupReader
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.streaming import blocks
from calumma.platform.streaming.plan import Share
from calumma.platform.streaming.tensors import (
    MicroBatchTensors,
    PlanData,
    PlanShard,
    ShardError,
    begun,
    micro_batches,
    plan_callback,
)

CONTEXT = 12
ROWS = 3  # of a micro-batch


def packed(random: np.random.Generator, masked: bool) -> PackedRow:
    padding = int(random.integers(0, 4))
    segments = np.sort(random.integers(0, 3, CONTEXT + 1)).astype(np.int32)
    segments[CONTEXT + 1 - padding :] = -1
    mask = random.integers(0, 2, CONTEXT + 1).astype(bool) if masked else None
    return PackedRow(random.integers(0, 70_000, CONTEXT + 1).astype(np.int32), mask, segments)


def write_shards(uri: str, counts: list[int], seed: int, rows: int = ROWS) -> Manifest:
    """Shards with these numbers of row groups: random tokens, masks on every other row, padding at the ends."""
    random = np.random.default_rng(seed)
    files = []
    for number, groups in enumerate(counts):
        table = [packed(random, row % 2 == 1) for row in range((groups - 1) * rows + 1)]  # the last has one row
        data = token_shards.to_parquet(table, rows)
        entry = FileEntry.from_bytes(
            f"part-{number}.parquet",
            data,
            rows=len(table),
            row_groups=groups,
            sequences_per_row_group=rows,
            footer=token_shards.footer_digest(data),
        )
        storage.write_bytes(storage.join(uri, entry.path), data)
        files.append(entry)
    manifest = Manifest(kind="tokens", files=files, specification={"context": CONTEXT})
    manifest.write(uri)
    return manifest


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, Manifest]:
    """Two directories of token shards."""
    pages, pairs = str(tmp_path / "pages"), str(tmp_path / "pairs")
    return {pages: write_shards(pages, [4, 3], 1), pairs: write_shards(pairs, [5], 2)}


def config(shards: dict[str, Manifest], micro_batches: int = 5, last: int = 40) -> PlanData:
    weights = dict(zip(sorted(shards), (0.7, 0.3), strict=True))
    return PlanData(7, weights, shards, micro_batches, last)


def expected(share: Share) -> list[MicroBatchTensors]:
    """A worker's passes of a step, read the slow and plain way."""
    rows = []
    for micro_batch, begin, end in share.pieces:
        file = pq.ParquetFile(io.BytesIO(storage.read_bytes(micro_batch.shard)))
        rows += file.read_row_group(micro_batch.row_group).to_pylist()[begin:end]
    passes, begin = [], 0
    for count in share.passes:
        part = rows[begin : begin + count]
        shape = (count, CONTEXT + 1)
        tokens, segments = (
            torch.tensor([row[name] for row in part]).long().view(shape) for name in ("tokens", "segments")
        )
        masks = torch.tensor([row["loss_mask"] or [True] * (CONTEXT + 1) for row in part]).bool().view(shape)
        passes.append(MicroBatchTensors(tokens, masks & (segments != -1), segments, (share.first + begin) // ROWS))
        begin += count
    return passes


def all_rows(group: list[MicroBatchTensors]) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in group])


def same(a: MicroBatchTensors, b: MicroBatchTensors) -> bool:
    pairs = [(a.tokens, b.tokens), (a.mask, b.mask), (a.segments, b.segments)]
    return a.number == b.number and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.cluster
@pytest.mark.parametrize("world", [1, 3, 7])
def test_workers_read_what_the_plan_says(ray_cluster: None, shards: dict[str, Manifest], world: int) -> None:
    data = pickle.loads(pickle.dumps(config(shards)))  # as Ray Train does
    shares = data.shards(world)
    assert len(shares) == world
    for rank in {0, world - 1}:
        steps = list(micro_batches(shares[rank].iterator(3), rank, world))
        assert [step for step, _ in steps] == list(range(3, 40))
        for step, group in steps:
            wanted = expected(*data.plan.shares(step, step + 1, rank, world))
            assert len(group) == len(wanted)
            assert all(map(same, group, wanted))


@pytest.mark.cluster
def test_a_resumed_group_of_another_size_goes_on_where_the_first_stopped(
    ray_cluster: None, shards: dict[str, Manifest]
) -> None:
    data = config(shards, micro_batches=4, last=8)
    seen: list[tuple[int, torch.Tensor]] = []
    (share,) = data.shards(1)
    for step, group in islice(micro_batches(share.iterator(0), 0, 1), 5):
        seen.append((step, all_rows(group)))
    halves = [list(micro_batches(s.iterator(5), rank, 2)) for rank, s in enumerate(data.shards(2))]
    for (step, even), (other, odd) in zip(*halves, strict=True):
        assert step == other
        seen.append((step, torch.cat([all_rows(even), all_rows(odd)])))
    planned = [(step, all_rows(expected(*data.plan.shares(step, step + 1, 0, 1)))) for step in range(8)]
    assert [step for step, _ in seen] == [step for step, _ in planned]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, planned, strict=True))


@pytest.mark.cluster
def test_reading_goes_on_in_a_cluster_full_of_workers(ray_cluster: None, shards: dict[str, Manifest]) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    free = ray.available_resources()["CPU"]
    group = placement_group([{"CPU": free}])
    try:
        assert ray.get(group.ready(), timeout=None)
        (share,) = config(shards, last=6).shards(1)
        assert [step for step, _ in micro_batches(share.iterator(3), 0, 1)] == [3, 4, 5]
    finally:
        remove_placement_group(group)


@pytest.mark.cluster
def test_a_worker_given_the_data_of_another_stops(ray_cluster: None, shards: dict[str, Manifest]) -> None:
    shares = config(shards, last=4).shards(2)
    with pytest.raises(RuntimeError, match="worker 0 of 2 was given the data of worker 1 of 2"):
        next(micro_batches(shares[1].iterator(3), 0, 2))


@pytest.mark.cluster
def test_a_shard_that_changed_stops_training_by_name(ray_cluster: None, shards: dict[str, Manifest]) -> None:
    damaged = next(iter(shards)) + "/part-0.parquet"
    Path(damaged).write_bytes(Path(damaged).read_bytes()[:-1])
    (share,) = config(shards).shards(1)
    with pytest.raises(ShardError, match=f"^{damaged} has .* bytes, where its manifest says"):
        list(micro_batches(share.iterator(3), 0, 1))


def test_nothing_to_read_is_said() -> None:
    shard = PlanShard(None, 9, 1, 0, 1)  # type: ignore[arg-type]  # nothing is asked of the plan
    with pytest.raises(ValueError, match="the first step is 9, the end 9"):
        shard.iterator(9)


@pytest.mark.cluster
def test_what_a_worker_is_given_has_nothing_of_the_plan(ray_cluster: None, shards: dict[str, Manifest]) -> None:
    """The controller's callback hands out references: ten times the steps, sources and all, and not a byte more."""
    import ray

    def sizes(data: PlanData) -> set[int]:
        given = plan_callback(data).before_init_train_context([None] * 3)["dataset_shard_provider"]
        assert [(shard.rank, shard.world) for shard in given] == [(0, 3), (1, 3), (2, 3)]
        assert all(shard.get_dataset_shard("train") is shard for shard in given)
        assert len({shard.shared for shard in given}) == 1
        return {len(pickle.dumps(replace(shard, shared=None))) for shard in given}

    few, many = config(shards, last=40), config(shards, last=60)
    assert sizes(few) == sizes(many)
    assert max(sizes(many)) < 500 < len(pickle.dumps(many))
    plan, _ = ray.get(many.shards(1)[0].shared)
    assert plan.step(59) == many.plan.step(59)


class Blocks:
    """What a worker is given, without Ray between: the blocks of the reading task."""

    def __init__(self, data: PlanData, first: int, last: int, rank: int, world: int) -> None:
        self.blocks = list(blocks.read_blocks(first, last, data.plan, data.reader, rank, world))

    def iter_batches(self, **settings: Any) -> list[pa.Table]:
        return self.blocks


def test_shards_are_read_from_s3(s3: str) -> None:
    uri = storage.join(s3, "tokens")
    data = PlanData(1, {uri: 1.0}, {uri: write_shards(uri, [3, 2], 4)}, 3, 6)
    read: Any = Blocks(data, 2, 6, 0, 2)
    for step, group in micro_batches(read, 0, 2):
        assert all(map(same, group, expected(*data.plan.shares(step, step + 1, 0, 2))))
    assert step == 5


@pytest.mark.parametrize("limit", [1, 500, 2000, 1 << 20])
def test_blocks_grow_from_one_step_to_their_limit(
    shards: dict[str, Manifest], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", limit)
    data = config(shards, micro_batches=2)
    read: Any = Blocks(data, 0, 40, 0, 1)
    sizes = [len(table["steps"][0]) for table in read.blocks]
    assert sum(sizes) == 40
    assert sizes[0] == 1, "a step"
    most = max(1, limit // (2 * 3 * 7 * (CONTEXT + 1)))  # steps of two micro-batches of three rows
    for before, size in pairwise(sizes[:-1]):
        assert size == min(2 * before, most)
    steps = list(micro_batches(read, 0, 1))
    assert [step for step, _ in steps] == list(range(40))
    assert all(len(group) == 2 for _, group in steps)


def test_an_error_comes_in_its_turn(shards: dict[str, Manifest]) -> None:
    data = config(shards, micro_batches=2)
    planned = [found for step in range(20) for found in data.plan.step(step)]
    broken = planned[9].shard
    Path(broken).unlink()
    first = next(number for number, found in enumerate(planned) if found.shard == broken) // 2
    read: Any = Blocks(data, 0, 20, 0, 1)
    seen: list[int] = []

    def train() -> None:
        for step, _ in micro_batches(read, 0, 1):
            seen.append(step)

    with pytest.raises(ShardError, match=broken):
        train()
    assert seen == list(range(first))


def test_shards_without_checksums_are_read_and_pointed_out(
    shards: dict[str, Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    old = {
        uri: manifest.model_copy(update={"files": [f.model_copy(update={"footer": None}) for f in manifest.files]})
        for uri, manifest in shards.items()
    }
    with caplog.at_level(logging.WARNING):
        data = config(old)
    assert [record.args for record in caplog.records] == [(uri, len(old[uri].files)) for uri in sorted(old)]
    stream: Any = Blocks(data, 0, 9, 0, 1)
    read = [batch for _, group in micro_batches(stream, 0, 1) for batch in group]
    wanted = [batch for share in data.plan.shares(0, 9, 0, 1) for batch in expected(share)]
    assert all(map(same, read, wanted))


def test_the_working_memory_of_a_task_is_a_few_blocks(shards: dict[str, Manifest], monkeypatch: Any) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    opened: list[MicroBatch] = []

    def read(self: RowGroupReader, micro_batch: MicroBatch) -> Any:
        opened.append(micro_batch)
        return original(self, micro_batch)

    original = RowGroupReader.read
    monkeypatch.setattr(RowGroupReader, "read", read)
    data = config(shards, micro_batches=1)
    reading = blocks.read_blocks(0, 10_000, data.plan, data.reader, 0, 1)
    taken = [next(reading) for _ in range(5)]
    reading.close()
    assert len(opened) <= sum(len(table["steps"][0]) for table in taken) + 5, "the taken ones and the next"


# -- beginning ahead --


def test_the_first_item_is_made_ahead_the_others_when_they_are_wanted() -> None:
    made: list[tuple[int, threading.Thread]] = []
    first = threading.Event()

    def make() -> Iterator[int]:
        for number in range(3):
            made.append((number, threading.current_thread()))
            first.set()
            yield number

    items = begun(make, torch.device("cpu"))
    assert first.wait(60), "nothing was made before somebody asked"
    assert list(items) == [0, 1, 2]
    assert [number for number, _ in made] == [0, 1, 2]
    assert [thread is threading.current_thread() for _, thread in made] == [False, True, True]


def test_what_fails_ahead_is_told_where_the_first_item_is_wanted() -> None:
    def make() -> Iterator[int]:
        raise ShardError("a shard is damaged")
        yield 0

    items = begun(make, torch.device("cpu"))
    with pytest.raises(ShardError, match="damaged"):
        next(items)
    assert not list(begun(lambda: iter(()), torch.device("cpu")))
