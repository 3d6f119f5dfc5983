"""Decoding pages without pyarrow: the same row groups as with it, and nothing but what our writer wrote."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calumma.platform.shards import parquet_pages, row_groups
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.row_groups import MicroBatch, RowGroup, RowGroupReader, ShardError, _ShardFooter
from calumma.platform.shards.tokens import PackedRow


@pytest.fixture(autouse=True)
def no_footers_of_other_tests() -> None:
    row_groups._footer_cache.cache_clear()


def packed(random: np.random.Generator, length: int, masked: bool) -> PackedRow:
    segments = np.sort(random.integers(0, 3, length)).astype(np.int32)
    segments[length - int(random.integers(0, length + 1)) :] = -1
    mask = random.integers(0, 2, length).astype(bool) if masked else None
    return PackedRow(random.integers(-(1 << 31), 1 << 31, length).astype(np.int32), mask, segments)


def table(rows: list[PackedRow]) -> pa.Table:
    return pq.read_table(io.BytesIO(token_shards.to_parquet(rows, len(rows))))


def written(path: Path, content: pa.Table, micro_batch: int, **changes: Any) -> list[MicroBatch]:
    """A shard with digests, as token_shards writes it but for the changes."""
    buffer = io.BytesIO()
    groups = []
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False} | changes
    with pq.ParquetWriter(buffer, content.schema, **options) as writer:
        for first in range(0, len(content), micro_batch):
            begin = buffer.tell()
            writer.write_table(content.slice(first, micro_batch), row_group_size=micro_batch)
            data = buffer.getvalue()[begin:]
            groups.append((begin, len(data), token_shards.row_group_digest(data)))
        writer.add_key_value_metadata({token_shards.ROW_GROUPS_KEY.decode(): json.dumps(groups)})
    return published(
        path, buffer.getvalue(), [len(content.slice(n * micro_batch, micro_batch)) for n in range(len(groups))]
    )


def published(path: Path, data: bytes, sequences: list[int]) -> list[MicroBatch]:
    path.write_bytes(data)
    found = token_shards.footer_digest(data)
    known = (len(data), found.bytes, bytes.fromhex(found.sha256))
    return [MicroBatch("source", str(path), number, rows, *known) for number, rows in enumerate(sequences)]


def read(micro_batch: MicroBatch, context: int | None) -> tuple[RowGroup, bool]:
    """A row group, and whether it was decoded without pyarrow."""
    taken: list[bool] = []
    original = _ShardFooter.decode_own_layout

    def watched(footer: _ShardFooter, *given: Any) -> RowGroup | None:
        found = original(footer, *given)
        taken.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ShardFooter, "decode_own_layout", watched)
        return RowGroupReader(context).read(micro_batch), taken == [True]


def same(a: RowGroup, b: RowGroup) -> bool:
    arrays = [(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    length=st.integers(1, 40) | st.sampled_from([257, 1025]),
    masked=st.lists(st.booleans(), min_size=1, max_size=12) | st.lists(st.just(False), min_size=1, max_size=12),
    micro_batch=st.integers(1, 6),
    page=st.sampled_from([1, 64, 700, 1 << 20]),
    batch=st.sampled_from([1, 7, 1024]),
)
def test_row_groups_are_those_that_pyarrow_reads(
    tmp_path: Path, seed: int, length: int, masked: list[bool], micro_batch: int, page: int, batch: int
) -> None:
    """`page` and `batch`: pages end after so many bytes, looked at after so many values."""
    random = np.random.default_rng(seed)
    rows = [packed(random, length, mask) for mask in masked]
    found = written(tmp_path / "x", table(rows), micro_batch, data_page_size=page, write_batch_size=batch)
    for one in found:
        ours, taken = read(one, length - 1)
        assert taken
        assert same(ours, RowGroupReader(length - 1, verify=False).read(one)), "without digests pyarrow decodes"


@given(
    seed=st.integers(0, 1 << 30),
    masked=st.lists(st.booleans(), min_size=1, max_size=9),
    micro_batch=st.integers(1, 5),
    context=st.sampled_from([None, 6]),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_writer_writes_is_read_without_pyarrow(
    tmp_path: Path, seed: int, masked: list[bool], micro_batch: int, context: int | None
) -> None:
    random = np.random.default_rng(seed)
    rows = [packed(random, 7, mask) for mask in masked]
    sequences = [len(rows[first : first + micro_batch]) for first in range(0, len(rows), micro_batch)]
    for one in published(tmp_path / "x", token_shards.to_parquet(rows, micro_batch), sequences):
        wanted = rows[one.row_group * micro_batch :][: one.sequences]
        ours, taken = read(one, context)
        assert taken
        assert np.array_equal(ours.tokens, [row.tokens for row in wanted])
        assert np.array_equal(ours.segments, [row.segments for row in wanted])


def test_masks_that_are_all_null_take_no_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    monkeypatch.delattr(_ShardFooter, "decode")
    for one in written(tmp_path / "x", table([packed(random, 9, False) for _ in range(6)]), 3):
        assert read(one, 8)[1]


ROWS = [[1, 2, 3], [4, 5, 6]]


def lists(tokens: Any = ROWS, loss_mask: Any = (None, None), segments: Any = ROWS) -> pa.Table:
    columns = {"tokens": tokens, "loss_mask": list(loss_mask), "segments": segments}
    return pa.Table.from_pydict(columns, token_shards.schema())


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dictionary": True},
        {"compression": "snappy"},
        {"compression": "none"},
        {"data_page_version": "2.0"},
        {"column_encoding": "DELTA_BINARY_PACKED"},
        {"write_statistics": True},
        {"write_page_checksum": True},
    ],
)
def test_other_layouts_are_read_by_pyarrow(tmp_path: Path, changes: dict[str, Any]) -> None:
    if "column_encoding" in changes:
        changes = {
            "column_encoding": {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ("tokens", "segments")}
        }
    (one,) = written(tmp_path / "x", lists(), 2, **changes)
    found, taken = read(one, 2)
    assert not taken
    assert found.tokens.tolist() == ROWS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lists(tokens=[[1, 2], [3, 4, 5, 6]]), r"holds 2 sequences of \[2, 4\] tokens, where the manifest says 2 of 3"),
        (lists(tokens=[[1, 2], [3, 4]]), r"holds 2 sequences of \[2\] tokens, where the manifest says 2 of 3"),
        (lists(tokens=[[1, 2, 3]] * 3, segments=ROWS[:1] * 3, loss_mask=[None] * 3), "holds 3 sequences"),
        (lists(segments=[[1, 2], [3, 4]]), "its columns are of different lengths"),
        (lists(segments=[[1, 2, 3], None]), "its columns are of different lengths"),
        (lists(loss_mask=[[True] * 2, None]), "its columns are of different lengths"),
        (lists(loss_mask=[[], None]), "its columns are of different lengths"),
        (pa.table({"tokens": ROWS}), "has no columns"),
    ],
)
def test_wrong_contents_are_errors_as_before(tmp_path: Path, content: pa.Table, said: str) -> None:
    one = written(tmp_path / "x", content, 3)[0]._replace(sequences=2)
    for verify in (True, False):
        with pytest.raises(ShardError, match=said):
            RowGroupReader(2, verify).read(one)


def test_only_what_has_its_digest_is_decoded_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = written(tmp_path / "x", lists(), 2)
    monkeypatch.setattr(parquet_pages, "decode_equal_lists", None)
    assert RowGroupReader(2, verify=False).read(one).tokens.tolist() == ROWS
    path = tmp_path / "without"
    pq.write_table(lists(), path, compression="zstd", use_dictionary=False, write_statistics=False)
    plain = MicroBatch("source", str(path), 0, 2, path.stat().st_size)
    assert RowGroupReader(2).read(plain).tokens.tolist() == ROWS


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans(), masks=st.booleans())
def test_damaged_pages_are_never_more_than_an_error(place: float, value: int, cut: bool, masks: bool) -> None:
    """Even with a digest that agrees: it is for pyarrow then, and to say what is wrong."""
    random = np.random.default_rng(1)
    data = token_shards.to_parquet([packed(random, 50, False) for _ in range(4)], 4)
    chunk = parquet_pages.column_chunks(pq.read_metadata(io.BytesIO(data)), 0)[1 if masks else 0]
    part = bytearray(data[chunk.begin : chunk.end])
    at = int(place * len(part))
    part[at] = value
    try:
        if masks:
            parquet_pages.all_null(bytes(part[:at] if cut else part), 4)
        else:
            assert parquet_pages.decode_equal_lists(memoryview(part[:at] if cut else part), chunk.values, 4).shape == (
                4,
                50,
            )
    except (parquet_pages.UnknownLayout, pa.ArrowException, OSError):
        pass


def test_a_row_group_that_is_damaged_under_its_digest_is_told(tmp_path: Path) -> None:
    (one,) = written(tmp_path / "x", lists(), 2)
    data = (tmp_path / "x").read_bytes()
    (begin, length, was), *_ = json.loads(pq.read_metadata(tmp_path / "x").metadata[token_shards.ROW_GROUPS_KEY])
    broken = data[:begin] + bytes(length) + data[begin + length :]
    broken = broken.replace(was.encode(), token_shards.row_group_digest(bytes(length)).encode())
    sha256 = hashlib.sha256(broken[-one.footer_bytes :]).digest()
    (tmp_path / "x").write_bytes(broken)
    with pytest.raises(ShardError, match="row group 0 cannot be read"):
        RowGroupReader(2).read(one._replace(footer_sha256=sha256))
