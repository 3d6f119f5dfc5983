"""The stream: what Ray Data hands to each worker is what the plan and the shards say, on any number of workers."""

from __future__ import annotations

import copy
import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calumma.platform import storage
from calumma.platform.data.manifest import FileEntry, Manifest
from calumma.platform.data.plan import MicroBatch, Plan
from calumma.platform.data.stream import (
    MicroBatchTensors,
    PlanDataConfig,
    ShardError,
    _read,
    _read_row_group,
    _rows,
    _tensors,
    micro_batches,
)

CONTEXT = 12
SCHEMA = pa.schema(
    [("tokens", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_())), ("segments", pa.list_(pa.int32()))]
)


def write_shards(uri: str, counts: list[int], seed: int, rows: int = 3) -> Manifest:
    """Shards with these numbers of row groups: random tokens, masks on every other row, padding at the ends."""
    random = np.random.default_rng(seed)
    files = []
    for number, groups in enumerate(counts):
        table = []
        for row in range((groups - 1) * rows + 1):  # the last row group holds one row
            padding = int(random.integers(0, 4))
            segments = np.sort(random.integers(0, 3, CONTEXT + 1 - padding)).tolist() + [-1] * padding
            mask = random.integers(0, 2, CONTEXT + 1).astype(bool).tolist() if row % 2 else None
            tokens = random.integers(0, 1000, CONTEXT + 1).tolist()
            table.append({"tokens": tokens, "loss_mask": mask, "segments": segments})
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(table, SCHEMA), sink, row_group_size=rows, compression="zstd")
        entry = FileEntry.of(
            f"part-{number}.parquet",
            sink.getvalue(),
            rows=len(table),
            row_groups=groups,
            sequences_per_row_group=rows,
        )
        storage.write_bytes(storage.join(uri, entry.path), sink.getvalue())
        files.append(entry)
    manifest = Manifest(kind="tokens", files=files, specification={"context": CONTEXT})
    manifest.write(uri)
    return manifest


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, Manifest]:
    """Two directories of token shards."""
    pages, pairs = str(tmp_path / "pages"), str(tmp_path / "pairs")
    return {pages: write_shards(pages, [4, 3], 1), pairs: write_shards(pairs, [5], 2)}


def config(shards: dict[str, Manifest], micro_batches: int = 5, first: Any = 3, last: int = 40) -> PlanDataConfig:
    weights = dict(zip(sorted(shards), (0.7, 0.3), strict=True))
    return PlanDataConfig(7, weights, shards, micro_batches, first, last)


def expected(micro_batch: MicroBatch | None) -> MicroBatchTensors:
    """The micro-batch, read the slow and plain way."""
    if micro_batch is None:
        none = torch.zeros(0, CONTEXT + 1, dtype=torch.long)
        return MicroBatchTensors(none, none.bool(), none)
    rows = (
        pq.ParquetFile(io.BytesIO(storage.read_bytes(micro_batch.shard)))
        .read_row_group(micro_batch.row_group)
        .to_pylist()
    )
    segments = torch.tensor([row["segments"] for row in rows])
    masks = torch.tensor([row["loss_mask"] or [True] * (CONTEXT + 1) for row in rows])
    tokens = torch.tensor([row["tokens"] for row in rows])
    return MicroBatchTensors(tokens, masks & (segments != -1), segments, micro_batch.source)


def same(a: MicroBatchTensors, b: MicroBatchTensors) -> bool:
    pairs = [(a.tokens, b.tokens), (a.mask, b.mask), (a.segments, b.segments)]
    return a.source == b.source and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.cluster
@pytest.mark.parametrize("world", [1, 3, 7])
def test_workers_read_what_the_plan_says(ray_cluster: None, shards: dict[str, Manifest], world: int) -> None:
    data = copy.deepcopy(config(shards))  # as Ray Train does
    shares = data.configure({}, world, None, None)
    assert len(shares) == world
    for rank in {0, world - 1}:
        steps = list(micro_batches(shares[rank]["train"], rank, world))
        assert [step for step, _ in steps] == list(range(3, 40))
        for step, group in steps:
            wanted = [expected(found) for found in data.plan.worker(step, rank, world)]
            assert len(group) == len(wanted)
            assert all(map(same, group, wanted))
    if world == 7:
        assert all(group[0].tokens.shape == (0, CONTEXT + 1) for _, group in steps), "five micro-batches for seven"


@pytest.mark.cluster
def test_a_resumed_group_of_another_size_goes_on_where_the_first_stopped(
    ray_cluster: None, shards: dict[str, Manifest]
) -> None:
    checkpoint = {"step": 0}
    data = config(shards, micro_batches=4, first=lambda: checkpoint["step"], last=8)
    seen: list[tuple[int, torch.Tensor]] = []
    (share,) = data.configure({}, 1, None, None)
    for step, group in islice(micro_batches(share["train"], 0, 1), 5):
        seen += [(step, batch.tokens) for batch in group]
    checkpoint["step"] = 5
    halves = [list(micro_batches(s["train"], rank, 2)) for rank, s in enumerate(data.configure({}, 2, None, None))]
    for (step, even), (other, odd) in zip(*halves, strict=True):
        assert step == other
        seen += [(step, batch.tokens) for pair in zip(even, odd, strict=True) for batch in pair]
    planned = [(step, expected(found).tokens) for step in range(8) for found in data.plan.step(step)]
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
        (share,) = config(shards, last=6).configure({}, 1, None, None)
        assert [step for step, _ in micro_batches(share["train"], 0, 1)] == [3, 4, 5]
    finally:
        remove_placement_group(group)


@pytest.mark.cluster
def test_a_worker_given_the_data_of_another_stops(ray_cluster: None, shards: dict[str, Manifest]) -> None:
    shares = config(shards, last=4).configure({}, 2, None, None)
    with pytest.raises(RuntimeError, match="worker 0 of 2 was given the data of worker 1 of 2"):
        next(micro_batches(shares[1]["train"], 0, 2))


@pytest.mark.cluster
def test_a_shard_that_changed_stops_training_by_name(ray_cluster: None, shards: dict[str, Manifest]) -> None:
    damaged = next(iter(shards)) + "/part-0.parquet"
    Path(damaged).write_bytes(Path(damaged).read_bytes()[:-1])
    (share,) = config(shards).configure({}, 1, None, None)
    with pytest.raises(ShardError, match=f"^{damaged} has .* bytes, where its manifest says"):
        list(micro_batches(share["train"], 0, 1))


def test_nothing_to_read_is_said(shards: dict[str, Manifest]) -> None:
    with pytest.raises(ValueError, match="the first step is 9, the end 9"):
        config(shards, first=9, last=9).configure({}, 1, None, None)


def test_shards_are_read_from_s3(s3: str) -> None:
    uri = storage.join(s3, "tokens")
    plan = Plan(1, {uri: 1.0}, {uri: write_shards(uri, [3, 2], 4)}, 3)
    (block,) = _read(pa.table({"first": [2], "last": [6]}), plan, 0, 2).to_batches()
    rows = list(_rows(pa.Table.from_batches([block])))
    assert [(row["step"], row["error"]) for row in rows] == [(step, "") for step in (2, 2, 3, 3, 4, 4, 5, 5)]
    planned = [found for step in range(2, 6) for found in plan.worker(step, 0, 2)]
    assert all(same(_tensors(row), expected(found)) for row, found in zip(rows, planned, strict=True))


def row_group(shards: dict[str, Manifest], **changes: Any) -> MicroBatch:
    uri, manifest = next(iter(shards.items()))
    file = manifest.files[0]
    fields = {"source": uri, "shard": f"{uri}/{file.path}", "row_group": 0, "sequences": 3, "shard_bytes": file.bytes}
    return MicroBatch(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "context", "said"),
    [
        ({"shard_bytes": 5}, CONTEXT, "bytes, where its manifest says 5"),
        ({"sequences": 2}, CONTEXT, r"holds 3 sequences of \[13\] tokens, where the manifest says 2 of 13"),
        ({}, CONTEXT + 1, r"holds 3 sequences of \[13\] tokens, where the manifest says 3 of 14"),
    ],
)
def test_row_groups_are_held_against_the_manifest(
    shards: dict[str, Manifest], changes: dict[str, int], context: int, said: str
) -> None:
    with pytest.raises(ShardError, match=said):
        _read_row_group(row_group(shards, **changes), context)


def test_damaged_and_missing_shards_are_named(shards: dict[str, Manifest]) -> None:
    found = row_group(shards)
    path = Path(found.shard)
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ShardError, match=f"{path}: row group 0 cannot be read"):
        _read_row_group(found, CONTEXT)
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(ShardError, match=f"{path}: row group 0 cannot be read"):
        _read_row_group(found, CONTEXT)
    pq.write_table(pa.table({"tokens": [[1] * (CONTEXT + 1)] * 3}), path)
    other = row_group(shards, shard_bytes=path.stat().st_size)
    with pytest.raises(ShardError, match=f"{path} has no columns .* not a token shard"):
        _read_row_group(other, CONTEXT)
    path.unlink()
    with pytest.raises(storage.NotFound, match=str(path)):
        _read_row_group(found, CONTEXT)
