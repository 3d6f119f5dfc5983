"""A checkpoint is read by ranges: what each worker needs, whole or not at all."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from calumma.platform import storage
from calumma.platform.storage.manifest import FileEntry, Manifest, ManifestError
from calumma.platform.training.checkpoints import layout, ranges
from calumma.platform.training.checkpoints.fragments import Fragment
from calumma.platform.training.checkpoints.layout import Index
from calumma.platform.training.checkpoints.node_local import NodeLocal

STATES = {"fp32": torch.float32, "exp_avg": torch.float32}
Cut = list[list[tuple[str, int, int]]]  # of each worker: parameter, offset, elements


def whole(sizes: dict[str, int]) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters whose elements are all different."""
    numbers = torch.arange(sum(sizes.values()), dtype=torch.float32).split(list(sizes.values()))
    found = dict(zip(sizes, numbers, strict=True))
    return {"fp32": found, "exp_avg": {name: -value for name, value in found.items()}}


def in_a_row(sizes: dict[str, int], world: int) -> Cut:
    """As ZeRO 1 and 2 cut: the parameters one behind the other."""
    total, cut = sum(sizes.values()), []
    for rank in range(world):
        begin, end, before, own = total * rank // world, total * (rank + 1) // world, 0, []
        for name, size in sizes.items():
            low, high = max(begin - before, 0), min(end - before, size)
            if low < high:
                own.append((name, low, high - low))
            before += size
        cut.append(own)
    return cut


def each(sizes: dict[str, int], world: int) -> Cut:
    """As ZeRO 3 cuts: every parameter in equal parts."""
    cut: Cut = [[] for _ in range(world)]
    for name, size in sizes.items():
        part = -(-size // world)
        for rank in range(world):
            if rank * part < size:
                cut[rank].append((name, rank * part, min(part, size - rank * part)))
    return cut


def write(folder: Path, values: dict[str, dict[str, torch.Tensor]], cut: Cut) -> Index:
    names, parts = list(values["fp32"]), []
    for rank, own in enumerate(cut):
        header, part = layout.part_layout(own, STATES, names)
        tensors = [values[state][name][offset : offset + numel] for state in STATES for name, offset, numel in own]
        with Path(folder, layout.part_name(rank)).open("wb") as file:
            entry = layout.write_part(file, layout.part_name(rank), header, part.piece, tensors)
        data = Path(folder, layout.part_name(rank)).read_bytes()
        assert entry == FileEntry(path=entry.path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        parts.append(part)
    return Index(layout.index_bytes(parts, STATES, names))


def read(
    folder: Path | str, index: Index, own: list[tuple[str, int, int]], copies: NodeLocal | None = None
) -> list[Fragment]:
    fragments = [
        Fragment(name, offset, numel, {state: torch.full((numel,), -1.0) for state in STATES})
        for name, offset, numel in own
    ]
    ranges.fill(str(folder), index, fragments, list(STATES), copies_here=copies)
    return fragments


def right(fragments: list[Fragment], values: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(f.states[state], values[state][f.parameter][f.offset : f.offset + f.numel])
        for f in fragments
        for state in STATES
    )


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    before=st.integers(1, 7),
    after=st.integers(1, 7),
    cuts=st.tuples(st.sampled_from([in_a_row, each]), st.sampled_from([in_a_row, each])),
)
def test_any_group_finds_what_it_needs_in_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    before: int,
    after: int,
    cuts: tuple[Callable[[dict[str, int], int], Cut], Callable[[dict[str, int], int], Cut]],
) -> None:
    named = {f"layer.{number}.weight": size for number, size in enumerate(sizes)}
    values, folder = whole(named), tmp_path_factory.mktemp("checkpoint")
    index = write(folder, values, cuts[0](named, before))
    for own in cuts[1](named, after):
        assert right(read(folder, index, own), values)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each range that storage is asked for."""
    lengths: list[int] = []
    usual = storage.read_range

    def counted(uri: str, offset: int, length: int, check: storage.ContentCheck | None = None) -> bytes:
        lengths.append(length)
        return usual(uri, offset, length, check)

    monkeypatch.setattr(storage, "read_range", counted)
    return lengths


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (4, 1), (1, 4), (5, 4)])
@pytest.mark.parametrize("cut", [in_a_row, each])
def test_all_workers_together_read_little_more_than_the_state(
    tmp_path: Path, asked: list[int], before: int, after: int, cut: Callable[[dict[str, int], int], Cut]
) -> None:
    sizes = {f"layer.{number}.weight": 120_000 + 1000 * number for number in range(6)}
    values = whole(sizes)
    index = write(tmp_path, values, cut(sizes, before))
    for own in cut(sizes, after):
        assert right(read(tmp_path, index, own), values)
    assert sum(asked) <= 1.1 * sum(sizes.values()) * 4 * len(STATES)


@pytest.mark.parametrize("harm", ["none", "gone", "short", "flipped"])
def test_a_copy_on_the_hosts_disk_is_read_where_it_is_whole_and_storage_where_not(
    tmp_path: Path, asked: list[int], s3: str, harm: str
) -> None:
    sizes = {"a": 50_000, "b": 30_000}
    values, folder, copies = whole(sizes), f"{s3}/stage/checkpoints/step-00000003/save", NodeLocal(tmp_path / "here")
    index = write(tmp_path, values, in_a_row(sizes, 2))
    for part in tmp_path.glob("part-*"):
        storage.upload(part, f"{folder}/{part.name}")
        with copies.written(f"{folder}/{part.name}") as file:
            file.write(part.read_bytes())
    copy = copies.path(f"{folder}/part-00001.safetensors")
    if harm == "gone":
        copy.unlink()
    elif harm != "none":
        data = bytearray(copy.read_bytes())
        data[len(data) // 2] ^= 1
        copy.write_bytes(data if harm == "flipped" else data[:-50_000])
    assert right(read(folder, index, in_a_row(sizes, 1)[0], copies), values)
    assert (sum(asked) > 10_000) is (harm != "none")


def test_the_newest_two_copies_stay(tmp_path: Path) -> None:
    copies = NodeLocal(tmp_path)
    uris = [f"s3://bucket/{output}/checkpoints/step-0000000{step}/x/p" for output in "ab" for step in range(4)]
    for uri in uris:
        with copies.written(uri) as file:
            file.write(b"state")
    assert [uri for uri in uris if copies.path(uri).exists()] == [uri for uri in uris if uri[-5] in "23"]


def test_a_copy_that_is_not_whole_is_none(tmp_path: Path) -> None:
    copies = NodeLocal(tmp_path)
    with suppress(KeyError), copies.written("s3://bucket/stage/checkpoints/step-00000001/x/p") as file:
        file.write(b"sta")
        raise KeyError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_flipped_bit_is_found_by_whoever_reads_it_and_by_nobody_else(tmp_path: Path) -> None:
    sizes = {"a": 5000, "b": 3000}
    values = whole(sizes)
    index = write(tmp_path, values, in_a_row(sizes, 1))
    (path,) = tmp_path.glob("part-*")
    ((_, position, _, _),) = index.places("b", "exp_avg", 2990, 1)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert right(read(tmp_path, index, [("a", 0, 5000), ("b", 0, 1000)]), values)
    with pytest.raises(storage.Damaged, match=r"part-00000.*not what was written"):
        read(tmp_path, index, [("b", 2000, 1000)])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    sizes = {"a": 50}
    index = write(tmp_path, whole(sizes), [[("a", 0, 20)], [("a", 30, 20)]])
    with pytest.raises(ManifestError, match=r"does not hold elements 20 to 50 of a \(fp32\)"):
        read(tmp_path, index, [("a", 10, 40)])
    with pytest.raises(ManifestError, match="does not hold elements 0 to 1 of other"):
        index.places("other", "fp32", 0, 1)
    with pytest.raises(ManifestError, match="no index"):
        Index(b"something else")


def test_the_files_are_what_their_public_readers_read(tmp_path: Path) -> None:
    sizes = {"a": 500, "b": 300}
    values = whole(sizes)
    write(tmp_path, values, in_a_row(sizes, 2))
    first, second = (load_file(tmp_path / layout.part_name(rank)) for rank in range(2))
    assert torch.equal(torch.cat([first["a[0].exp_avg"], second["a[400].exp_avg"]]), values["exp_avg"]["a"])
    assert second["checksums"].dtype == torch.uint32


def test_the_index_of_a_thousand_workers_is_small(tmp_path: Path) -> None:
    """34 billion parameters, ZeRO 3: every parameter in 1,024 parts."""
    names = [f"blocks.{layer}.attention.query.weight" for layer in range(48)]
    offsets = [np.full(48, rank * 65_536, np.int64) for rank in range(1024)]
    parts = [
        layout.PartLayout(4096, 48 * 65_536 * 8, 16 << 10, np.arange(48, dtype=np.int32), o, np.full(48, 65_536))
        for o in offsets
    ]
    data = layout.index_bytes(parts, STATES, names)
    assert len(data) < 1 << 20
    assert pq.read_table(io.BytesIO(data)).num_rows == 48 * 1024 * 2
    assert Index(data).places(names[7], "exp_avg", 65_530, 10) == [
        ("part-00000.safetensors", 4096 + 48 * 65_536 * 4 + 4 * (7 * 65_536 + 65_530), 0, 6),
        ("part-00001.safetensors", 4096 + 48 * 65_536 * 4 + 4 * 7 * 65_536, 6, 4),
    ]


def test_an_index_that_is_not_the_manifests_is_damaged(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/abc/{layout.INDEX}", b"changed")
    manifest = Manifest(kind="checkpoint", files=[FileEntry.from_bytes(f"abc/{layout.INDEX}", b"written")])
    with pytest.raises(storage.Damaged, match="not what the manifest says"):
        Index.read(str(tmp_path), manifest, "abc")
    with pytest.raises(ManifestError, match="an earlier version"):
        Index.read(str(tmp_path), Manifest(kind="checkpoint"), "abc")
