"""Reading single row groups: what the shard holds, or an error that names what is damaged; never anything else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calumma.platform import storage
from calumma.platform.shards import row_groups
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.row_groups import MicroBatch, RowGroupReader, ShardError
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.storage.manifest import FooterDigest

CONTEXT, ROWS, GROUPS = 20, 3, 4


def rows(seed: int, masked: list[bool]) -> list[PackedRow]:
    random = np.random.default_rng(seed)
    length = CONTEXT + 1
    return [
        PackedRow(
            random.integers(0, 1 << 17, length).astype(np.int32),
            random.integers(0, 2, length).astype(bool) if has_mask else None,
            np.array([0] * 9 + [1] * 8 + [-1] * 4, np.int32),
        )
        for has_mask in masked
    ]


ALL = rows(1, [False] * 3 + [True] * 3 + [True, False, True] + [False])


@pytest.fixture
def shard(tmp_path: Path) -> str:
    path = tmp_path / "shard.parquet"
    path.write_bytes(token_shards.to_parquet(ALL, ROWS))
    return str(path)


@pytest.fixture(autouse=True)
def no_footers_of_other_tests() -> None:
    row_groups._footer_cache.cache_clear()


def micro_batch(shard: str, row_group: int = 0, digests: bool = True, **changes: Any) -> MicroBatch:
    data = Path(shard).read_bytes()
    found = token_shards.footer_digest(data)
    known = (found.bytes, bytes.fromhex(found.sha256)) if digests else (0, b"")
    sequences = ROWS if row_group < GROUPS - 1 else 1
    return MicroBatch("source", shard, row_group, sequences, len(data), *known)._replace(**changes)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("group", range(GROUPS))
def test_row_groups_are_read_as_they_were_written(shard: str, group: int, digests: bool, verify: bool) -> None:
    found = RowGroupReader(CONTEXT, verify).read(micro_batch(shard, group, digests))
    wanted = ALL[group * ROWS : group * ROWS + ROWS]
    assert found.tokens.dtype == found.segments.dtype == np.int32
    assert np.array_equal(found.tokens, [row.tokens for row in wanted])
    assert np.array_equal(found.segments, [row.segments for row in wanted])
    masks = [np.ones(CONTEXT + 1, bool) if row.loss_mask is None else row.loss_mask for row in wanted]
    assert np.array_equal(found.mask, masks & (found.segments >= 0)), "padding is never trained"


def test_readers_travel(shard: str) -> None:
    reader = pickle.loads(pickle.dumps(RowGroupReader(CONTEXT)))
    assert np.array_equal(reader.read(micro_batch(shard)).tokens[1], ALL[1].tokens)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_goes_unnoticed(shard: str, place: float, bit: int, cut: bool) -> None:
    """A bit flipped anywhere, or the end cut off: every row group reads as it was, or is an error that names it."""
    path = Path(shard)
    whole = path.read_bytes()
    known = [micro_batch(shard, group) for group in range(GROUPS)]
    wanted = [RowGroupReader(CONTEXT).read(found) for found in known]
    row_groups._footer_cache.cache_clear()
    damaged = bytearray(whole)
    at = int(place * len(whole))
    damaged[at] ^= 1 << bit
    path.write_bytes(whole[:at] if cut else damaged)
    try:
        errors = []
        for found, before in zip(known, wanted, strict=True):
            try:
                read = RowGroupReader(CONTEXT).read(found)
            except ShardError as error:
                errors.append(str(error))
            else:
                assert np.array_equal(read.tokens, before.tokens)
                assert np.array_equal(read.mask, before.mask)
        assert errors or at < 4, "only the file's first four bytes are nobody's"
        assert all(shard in said for said in errors)
    finally:
        path.write_bytes(whole)
        row_groups._footer_cache.cache_clear()


def test_damage_is_told_by_shard_and_row_group(shard: str) -> None:
    found = micro_batch(shard, 2)
    path, whole = Path(shard), Path(shard).read_bytes()
    offset = RowGroupReader(CONTEXT)._footer(found).range_of(2)[0]
    path.write_bytes(whole[: offset + 5] + bytes([whole[offset + 5] ^ 1]) + whole[offset + 6 :])
    with pytest.raises(ShardError, match=f"{shard}: row group 2 has checksum .* on record.* write the shard again"):
        RowGroupReader(CONTEXT).read(found)
    assert len(RowGroupReader(CONTEXT).read(found._replace(row_group=1)).tokens) == ROWS


def test_another_shard_under_the_same_name_is_noticed(shard: str) -> None:
    found = micro_batch(shard)
    whole = Path(shard).read_bytes()
    (offset, length, was), *_ = json.loads(pq.read_metadata(shard).metadata[token_shards.ROW_GROUPS_KEY])
    other = whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]
    Path(shard).write_bytes(
        other.replace(was.encode(), token_shards.row_group_digest(other[offset : offset + length]).encode())
    )
    with pytest.raises(ShardError, match=f"{shard}: the footer has checksum"):
        RowGroupReader(CONTEXT).read(found)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    ("changes", "context", "said"),
    [
        ({"shard_bytes": 5000}, CONTEXT, "bytes, where its manifest says 5000"),
        ({"sequences": 2}, CONTEXT, r"holds 3 sequences of \[21\] tokens, where the manifest says 2 of 21"),
        ({}, CONTEXT + 1, r"holds 3 sequences of \[21\] tokens, where the manifest says 3 of 22"),
        ({"row_group": 4}, CONTEXT, "has 4 row groups, where its manifest names number 4"),
    ],
)
def test_row_groups_are_held_against_the_manifest(
    shard: str, digests: bool, changes: dict[str, int], context: int, said: str
) -> None:
    with pytest.raises(ShardError, match=said):
        RowGroupReader(context).read(micro_batch(shard, digests=digests, **changes))


def test_shards_of_before_there_were_checksums_are_named_when_they_are_damaged(shard: str) -> None:
    path = Path(shard)
    pq.write_table(pq.read_table(shard), shard, row_group_size=ROWS)
    content, found = path.read_bytes(), micro_batch(shard, digests=False)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ShardError, match=f"{shard}: its footer cannot be read"):
        RowGroupReader(CONTEXT).read(found)
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(ShardError, match=f"{shard}: row group 0 cannot be read"):
        RowGroupReader(CONTEXT).read(found)
    row_groups._footer_cache.cache_clear()
    path.write_bytes(content[:-1])
    with pytest.raises(ShardError, match="bytes, where its manifest says"):
        RowGroupReader(CONTEXT).read(found)
    path.unlink()
    with pytest.raises(storage.NotFound, match=shard):
        RowGroupReader(CONTEXT).read(found)


@pytest.mark.parametrize("dictionary", [True, False])
def test_long_footers_and_shards_of_other_writers_are_read(
    tmp_path: Path, dictionary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "_TAIL_BYTES", 100)
    path = tmp_path / "other.parquet"
    table = pa.Table.from_pylist(
        [{"tokens": [n] * 5, "loss_mask": None, "segments": [0] * 5} for n in range(40)],
        token_shards.schema(),
    )
    pq.write_table(table, path, row_group_size=2, use_dictionary=dictionary)
    for group in (0, 7, 19):
        found = MicroBatch("source", str(path), group, 2, path.stat().st_size)
        assert RowGroupReader(4).read(found).tokens.tolist() == [[2 * group] * 5, [2 * group + 1] * 5]


def test_other_parquet_is_no_token_shard(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"tokens": [[1] * (CONTEXT + 1)] * 3}), path)
    with pytest.raises(ShardError, match=f"{path} has no columns .* not a token shard"):
        RowGroupReader(CONTEXT).read(MicroBatch("source", str(path), 0, 3, path.stat().st_size))


def test_a_footer_is_read_once(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = storage.read_range

    def record(uri: str, offset: int, *rest: Any) -> bytes:
        asked.append(offset)
        return original(uri, offset, *rest)

    monkeypatch.setattr(storage, "read_range", record)
    reader = RowGroupReader(CONTEXT)
    for group in range(GROUPS):
        reader.read(micro_batch(shard, group))
    assert len(asked) == len(set(asked)) == GROUPS + 1


def test_footers_are_kept_up_to_a_size(shard: str) -> None:
    kept = row_groups._FooterCache(100)
    footer: Any = FooterDigest(bytes=12, sha256="0" * 64)
    for key in range(5):
        kept.put(key, footer, 40)
        assert kept.get(0) is (footer if key < 5 else None), "the one used last stays"
    assert [key for key in range(5) if kept.get(key)] == [0, 4]
