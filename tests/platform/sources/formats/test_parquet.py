"""Parquet: interleaved pages and texts, what damage leaves of them, and how much is held."""

from __future__ import annotations

import base64
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import read_file

PNG = b"\x89PNG\r\n\x1a\n and so on"
LISTS = {"texts": pa.list_(pa.string()), "captions": pa.list_(pa.string())}


def read(format: str, path: Path, content: bytes, **more: Any) -> list[Document | BadInput]:
    path.write_bytes(content)
    return list(read_file(format, "source", str(path), **more))


def bad(items: list[Document | BadInput]) -> list[BadInput]:
    return [item for item in items if isinstance(item, BadInput)]


def good(items: list[Document | BadInput]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def parquet(rows: list[dict[str, Any]], image: pa.DataType | None = None, **writing: Any) -> bytes:
    types = {**LISTS, "images": pa.list_(image or pa.binary())}
    names = list(dict.fromkeys(name for row in rows for name in row))
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, **{"compression": "none", **writing})
    return buffer.getvalue()


def test_a_page_keeps_the_order_of_its_texts_and_images(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"texts": ["a", None, "b"], "images": [None, PNG, None], "captions": [None, "x", None], "license": "MIT"},
        {"texts": ["both"], "images": [PNG]},
        {"texts": [None], "images": [None]},
        {"texts": ["a"], "images": [None, PNG]},
    ]
    items = read("interleaved", tmp_path / "a.parquet", parquet(rows))
    assert good(items) == [Document((Text("a"), Image(PNG, "x"), Text("b")), source="source", license="MIT")]
    assert [b.name.rpartition("row ")[2] for b in bad(items)] == ["1", "2", "3"]
    assert "both a text and an image at index 0" in bad(items)[0].reason
    assert "neither" in bad(items)[1].reason


def test_images_may_be_references_with_obelics_metadata(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(PNG)
    row = {
        "images": ["1.jpg", None, "data:image/png;base64," + base64.b64encode(b"2").decode()],
        "texts": [None, "between", None],
        "metadata": json.dumps([{"alt_text": "one", "src": "https://x.test/1.jpg"}, None, {"alt_text": None}]),
        "general_metadata": json.dumps({"url": "https://x.test/page"}),
    }
    remote = row | {"images": ["https://x.test/1.jpg", None, None], "texts": [None, "a", "b"]}
    broken = row | {"metadata": "[", "general_metadata": "5"}
    content = parquet([row, remote, broken], pa.string())
    items = read("interleaved", tmp_path / "a.parquet", content, images=str(tmp_path / "images"))
    segments = (Image(PNG, "one"), Text("between"), Image(b"2"))
    assert items == [
        Document(segments, source="source", url="https://x.test/page"),
        BadInput(
            f"{tmp_path}/a.parquet: row group 0, row 1",
            "the image 'https://x.test/1.jpg' is remote; download first, e.g. with img2dataset, and refer to the "
            "files by path",
        ),
        Document((Image(PNG), *segments[1:]), source="source"),
    ]


def test_images_may_be_hugging_faces_structs(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"1")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    row = {"images": [{"bytes": PNG, "path": "0.jpg"}, {"bytes": None, "path": "1.jpg"}], "texts": [None, None]}
    nothing = {"images": [{"bytes": None, "path": None}], "texts": [None]}
    items = read("interleaved", tmp_path / "a.parquet", parquet([row, nothing], image))
    assert good(items) == [Document((Image(PNG), Image(b"1")), source="source")]
    assert "neither text nor image at index 0" in bad(items)[0].reason


def test_pages_in_s3_have_their_images_there(s3: str) -> None:
    storage.write_bytes(f"{s3}/pages/images/1.jpg", PNG)
    storage.write_bytes(
        f"{s3}/pages/a.parquet", parquet([{"images": ["images/1.jpg", None], "texts": [None, "a"]}] * 5, pa.string())
    )
    items = list(read_file("interleaved", "source", f"{s3}/pages/a.parquet"))
    assert items == [Document((Image(PNG), Text("a")), source="source")] * 5


def test_texts_are_the_column_text_or_content_or_the_one_told(tmp_path: Path) -> None:
    table = [{"content": "print(1)", "license": "MIT", "other": "x"}, {"content": None, "license": None, "other": "y"}]
    items = read("text", tmp_path / "a.parquet", parquet(table))
    assert good(items) == [Document((Text("print(1)"),), source="source", license="MIT")]
    assert [(b.name, b.reason) for b in bad(items)] == [
        (f"{tmp_path}/a.parquet: row group 0, row 1", "`content` is null, not a string")
    ]
    items = read("text", tmp_path / "a.parquet", parquet(table), options={"field": "other"})
    assert [d.text for d in good(items)] == ["x", "y"]
    (item,) = read("text", tmp_path / "a.parquet", parquet(table), options={"field": "body"})
    assert isinstance(item, BadInput)
    assert "has no `body`; it has content, license, other" in item.reason


# -- damage


def test_a_damaged_row_group_leaves_the_others(tmp_path: Path) -> None:
    rows = [{"texts": [f"text {n} " * 50], "images": [None]} for n in range(4)]
    content = bytearray(parquet(rows, row_group_size=1))
    metadata = pq.ParquetFile(io.BytesIO(content)).metadata
    column = metadata.row_group(1).column(0)
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    items = read("interleaved", tmp_path / "a.parquet", bytes(content))
    assert [d.text[:6] for d in good(items)] == ["text 0", "text 2", "text 3"]
    assert bad(items)[0].name == f"{tmp_path}/a.parquet: row group 1"
    assert bad(items)[0].bytes_lost == round(len(content) / 4)


@pytest.mark.parametrize("format", ["interleaved", "text"])
@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_truncated_parquet_file_is_lost_whole(tmp_path: Path, keep: int, format: str) -> None:
    content = parquet([{"texts": ["a"], "images": [None], "text": "a"}])[:keep]
    (item,) = read(format, tmp_path / "a.parquet", content)
    assert isinstance(item, BadInput)
    assert item.bytes_lost == keep


def test_a_parquet_file_without_the_columns_says_which(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"texts": [["a"]], "other": [1]}), buffer)
    (item,) = read("interleaved", tmp_path / "a.parquet", buffer.getvalue())
    assert isinstance(item, BadInput)
    assert "has no images; it has texts, other" in item.reason


@pytest.mark.parametrize("format", ["interleaved", "text"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
@given(changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=10))
def test_no_damage_to_parquet_stops_the_reader(
    tmp_path_factory: pytest.TempPathFactory, format: str, compression: str, changes: list[tuple[float, int]]
) -> None:
    rows = [{"texts": ["a", None], "images": [None, PNG], "text": f"{n}", "license": "MIT"} for n in range(20)]
    content = bytearray(parquet(rows, row_group_size=10, compression=compression))
    for share, value in changes:
        content[4 + int(share * (len(content) - 4))] = value
    items = read(format, tmp_path_factory.mktemp("damaged") / "a.parquet", bytes(content))
    assert items
    assert all(isinstance(item, Document | BadInput) for item in items)


# -- how much is held


def test_a_row_group_far_larger_than_a_batch_is_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: Any) -> None:
    image = random.Random(0).randbytes(100_000)
    rows = [{"texts": ["a", None], "images": [None, image[n:]]} for n in range(600)]
    # Pages end at a megabyte only where the writer looks for it; by itself it does so every 1024 values.
    content = parquet(rows, row_group_size=600, use_dictionary=False, write_batch_size=8)
    (tmp_path / "a.parquet").write_bytes(content)
    del rows
    opened: list[Any] = []
    real = storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda uri: opened.append(real(uri)) or opened[-1])
    before = pa.total_allocated_bytes()
    held, count = 0, 1
    tracemalloc.start()
    items = read_file("interleaved", "source", f"{tmp_path}/a.parquet")
    assert isinstance(next(items), Document)
    assert opened[0].raw.tell() < len(content) / 2
    for item in items:
        assert isinstance(item, Document)
        count += 1
        held = max(held, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 600
    assert held + peak < 0.8 * len(content)
    assert len(content) > 59_000_000


def test_one_bad_value_costs_its_row(tmp_path: Path) -> None:
    values = [f"text {n}".encode() for n in range(50)]
    values[20] = b"no \xff text"
    valid = pa.array(values, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": valid, "id": list(range(50))}), tmp_path / "a.parquet", row_group_size=30)
    notes = Notes()
    items = list(read_file("text", "source", f"{tmp_path}/a.parquet", notes=notes))
    assert [d.text for d in good(items)] == [f"text {n}" for n in range(50) if n != 20]
    (one,) = bad(items)
    assert one.name == f"{tmp_path}/a.parquet: row group 0, row 20"
    assert "cannot be read" in one.reason
    assert notes.report() == {"unread": {"columns": {"id": 1}}}


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "lz4", "brotli"])
def test_a_damaged_page_costs_its_rows(tmp_path: Path, compression: str, version: str) -> None:
    texts = [f"{n} " + random.Random(n).randbytes(300).hex() for n in range(400)]
    options: dict[str, Any] = {"data_page_size": 4096, "write_batch_size": 10, "use_dictionary": False}
    options |= {
        "compression": compression,
        "data_page_version": version,
        "write_page_checksum": True,
        "write_statistics": False,
    }
    table = pa.table({"text": texts, "url": [f"u{n}" for n in range(400)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=200, **options)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    column = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0)
    content[column.data_page_offset + column.total_compressed_size // 2 + 500] ^= 1  # no header of a page
    items = read("text", tmp_path / "a.parquet", bytes(content))
    kept = [d.text for d in good(items)]
    assert [text for text in texts if text in kept] == kept
    assert all(d.url == f"u{d.text.split()[0]}" for d in good(items))
    (one,) = bad(items)
    assert 0 < 400 - len(kept) <= 20
    first = next(n for n, text in enumerate(texts) if text not in kept)
    assert one.name == f"{tmp_path}/a.parquet: row group 0"
    assert f"{400 - len(kept)} rows cannot be read, from row {first} on" in one.reason
    assert one.bytes_lost > 0
