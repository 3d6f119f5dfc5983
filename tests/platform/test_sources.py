"""Raw formats: what becomes a document, and how damage is named without losing what is whole."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.data.sources import BadInput, list_source, name_of, read_file


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(count: int) -> list[tuple[str, bytes]]:
    license = json.dumps({"license": "CC0", "url": "https://x.test"}).encode()
    parts = (("png", png), ("txt", lambda n: f"caption {n}\n".encode()), ("json", lambda n: license))
    return [(f"dir/{n:03d}.{extension}", make(n)) for n in range(count) for extension, make in parts]


def read(format: str, path: Path, content: bytes) -> list[Document | BadInput]:
    path.write_bytes(content)
    return list(read_file(format, "source", str(path)))


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def bad(items: list[Document | BadInput]) -> list[BadInput]:
    return [item for item in items if isinstance(item, BadInput)]


def good(items: list[Document | BadInput]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


# -- WebDataset


def test_a_webdataset_sample_is_an_image_with_its_caption(tmp_path: Path) -> None:
    items = read("webdataset", tmp_path / "a.tar", tar(samples(2)))
    assert items == [
        Document((Image(png(n), f"caption {n}"),), source="source", license="CC0", url="https://x.test")
        for n in range(2)
    ]
    assert name_of(good(items)[1]) == f"{tmp_path}/a.tar: dir/001.png"


@given(st.data())
def test_a_truncated_tar_keeps_every_sample_before_the_damage(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = 3
    whole = tar(samples(count))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        members = archive.getmembers()
    # Everything from the archive's end mark on is padding: cuts before it are damage.
    end = max(m.offset_data + -(-m.size // 512) * 512 for m in members)
    cut = data.draw(st.integers(0, end))
    folder = tmp_path_factory.mktemp("cut")
    items = read("webdataset", folder / "a.tar", whole[:cut])

    samples_whole = sum(all(m.offset_data + m.size <= cut for m in members[3 * n : 3 * n + 3]) for n in range(count))
    kept = [document.images[0].caption for document in good(items)]
    assert kept == [f"caption {n}" for n in range(len(kept))]
    # A first sample without a predecessor may be whole and not known to be.
    assert len(kept) in ({samples_whole} if samples_whole > 1 else {0, samples_whole})
    assert len(bad(items)) == 1
    assert bad(items)[0].name.startswith(f"{folder}/a.tar")


@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=20))
def test_no_damage_to_a_tar_stops_the_reader(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(tar(samples(3)))
    for position, value in changes:
        content[position] = value
    items = read("webdataset", tmp_path_factory.mktemp("damaged") / "a.tar", bytes(content))
    assert len(good(items)) + len(bad(items)) > 0


def test_damage_inside_a_tar_counts_the_bytes_that_are_lost(tmp_path: Path) -> None:
    content = bytearray(tar(samples(4)))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        header = archive.getmember("dir/002.png").offset
    content[header : header + 512] = b"\xff" * 512
    items = read("webdataset", tmp_path / "a.tar", bytes(content))
    assert [d.images[0].caption for d in good(items)] == ["caption 0", "caption 1"]
    assert bad(items)[0].bytes_lost == len(content) - header
    assert "damaged from byte" in bad(items)[0].reason


def test_a_file_that_is_no_tar_is_lost_whole(tmp_path: Path) -> None:
    items = read("webdataset", tmp_path / "a.tar", b"this is no archive" * 100)
    assert [(b.name, b.bytes_lost) for b in bad(items)] == [(f"{tmp_path}/a.tar", 1800)]
    assert not good(items)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("1.txt", b"words")], "no image"),
        ([("1.png", png()), ("1.jpg", png())], "2 images"),
        ([("1.png", png()), ("1.txt", b"\xff\xfe")], "caption"),
        ([("1.png", png()), ("1.json", b"{")], "metadata"),
        ([("1.png", png()), ("1.json", b"[]")], "not an object"),
    ],
)
def test_a_sample_that_is_no_pair_is_named(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    items = read("webdataset", tmp_path / "a.tar", tar([*members, ("2.png", png()), ("2.txt", b"fine")]))
    assert [d.images[0].caption for d in good(items)] == ["fine"]
    assert bad(items)[0].name == f"{tmp_path}/a.tar: 1"
    assert said in bad(items)[0].reason


# -- JSON lines


def test_jsonl_reads_text_license_and_url(tmp_path: Path) -> None:
    items = read("jsonl", tmp_path / "a.jsonl", lines({"text": "one <image>", "license": "MIT"}, {"text": "two"}))
    assert items == [
        Document((Text("one <image>"),), source="source", license="MIT"),
        Document((Text("two"),), source="source"),
    ]


def test_broken_lines_are_named_by_their_number_and_the_rest_is_read(tmp_path: Path) -> None:
    content = (
        lines({"text": "one"})
        + b"\n{broken\n"
        + lines([1], {"words": 1}, {"text": 5}, {"text": "last"})
        + b"[" * 100_000
        + b"\n"
        + b"1" * 9999
        + b"\n"
    )
    items = read("jsonl", tmp_path / "a.jsonl", content + b'{"text": "cut o')
    assert [d.text for d in good(items)] == ["one", "last"]
    assert [b.name.rpartition("line ")[2] for b in bad(items)] == ["3", "4", "5", "6", "8", "9", "10"]
    assert "a list, not an object" in bad(items)[1].reason
    assert "it has words" in bad(items)[2].reason


# -- conversations


def chat(images: list[Any], *turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": f, "value": v} for f, v in turns], "images": images, **more}


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_the_kth_mark_of_a_conversation_is_its_kth_image(tmp_path: Path) -> None:
    row = chat(
        [url(png(1)), url(png(2))],
        ("human", "Which? <image> This?"),
        ("gpt", "One, like <image>"),
        captions=["one", None],
    )
    (document,) = good(read("conversations", tmp_path / "a.jsonl", lines(row)))
    assert document.segments == (
        Text("Which? ", "user"),
        Image(png(1), "one", "user"),
        Text(" This?", "user"),
        Text("One, like ", "assistant"),
        Image(png(2), None, "assistant"),
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (chat([], ("human", "<image>")), "1 <image> marks and 0 images"),
        (chat([url(b"x")], ("human", "hello")), "0 <image> marks and 1 images"),
        (chat(["https://x.test/a.png"], ("human", "<image>")), "no data URL"),
        (chat(["data:image/png;base64,%%%"], ("human", "<image>")), "not valid base64"),
        (chat([], ("robot", "hello")), "from 'robot'; allowed: human"),
        (chat([url(b"x")], ("human", "<image>"), captions=[]), None),
        (chat([url(b"x")], ("human", "<image>"), captions=["a", "b"]), "as long as"),
        ({"conversations": []}, "no list `conversations`"),
        ({"conversations": ["hi"]}, "a turn must be"),
    ],
)
def test_a_malformed_conversation_says_what_is_wrong(tmp_path: Path, row: Any, said: str | None) -> None:
    items = read("conversations", tmp_path / "a.jsonl", lines(row))
    if said is None:
        assert good(items)
    else:
        assert said in bad(items)[0].reason
        assert bad(items)[0].name == f"{tmp_path}/a.jsonl: line 1"


# -- interleaved pages


def parquet(rows: list[dict[str, Any]], group: int = 100) -> bytes:
    columns = {
        "texts": pa.list_(pa.string()),
        "images": pa.list_(pa.binary()),
        "captions": pa.list_(pa.string()),
        "license": pa.string(),
    }
    schema = pa.schema([(name, kind) for name, kind in columns.items() if any(name in row for row in rows)])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, row_group_size=group, compression="none")
    return buffer.getvalue()


def test_a_page_keeps_the_order_of_its_texts_and_images(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"texts": ["a", None, "b"], "images": [None, png(), None], "captions": [None, "x", None], "license": "MIT"},
        {"texts": ["both"], "images": [png()]},
        {"texts": [None], "images": [None]},
        {"texts": ["a"], "images": [None, png()]},
    ]
    items = read("interleaved", tmp_path / "a.parquet", parquet(rows))
    assert good(items) == [Document((Text("a"), Image(png(), "x"), Text("b")), source="source", license="MIT")]
    assert [b.name.rpartition("row ")[2] for b in bad(items)] == ["1", "2", "3"]
    assert "both a text and an image at index 0" in bad(items)[0].reason
    assert "neither" in bad(items)[1].reason


def test_a_damaged_row_group_leaves_the_others(tmp_path: Path) -> None:
    content = bytearray(parquet([{"texts": [f"text {n} " * 50], "images": [None]} for n in range(4)], group=1))
    metadata = pq.ParquetFile(io.BytesIO(content)).metadata
    column = metadata.row_group(1).column(0)
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    items = read("interleaved", tmp_path / "a.parquet", bytes(content))
    assert [d.text[:6] for d in good(items)] == ["text 0", "text 2", "text 3"]
    assert bad(items)[0].name == f"{tmp_path}/a.parquet: row group 1"
    assert bad(items)[0].bytes_lost == round(len(content) / 4)


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_truncated_parquet_file_is_lost_whole(tmp_path: Path, keep: int) -> None:
    content = parquet([{"texts": ["a"], "images": [None]}])[:keep]
    (item,) = read("interleaved", tmp_path / "a.parquet", content)
    assert isinstance(item, BadInput)
    assert item.bytes_lost == keep


def test_a_parquet_file_without_the_columns_says_which(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"texts": [["a"]], "other": [1]}), buffer)
    (item,) = read("interleaved", tmp_path / "a.parquet", buffer.getvalue())
    assert isinstance(item, BadInput)
    assert "no column images; it has texts, other" in item.reason


# -- listing


def test_a_folder_lists_files_of_the_format_and_a_file_lists_itself(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "notes.txt", "deep/c.TAR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    files, others = list_source("webdataset", str(tmp_path))
    assert files == {f"{tmp_path}/{name}": 5 for name in ("a.tar", "b.tar", "deep/c.TAR")}
    assert others == [f"{tmp_path}/notes.txt"]
    assert list_source("webdataset", f"{tmp_path}/notes.txt") == ({f"{tmp_path}/notes.txt": 5}, [])
    assert list_source("webdataset", f"file://{tmp_path}/notes.txt") == ({f"{tmp_path}/notes.txt": 5}, [])
    assert list_source("webdataset", f"{tmp_path}/nowhere") == ({}, [])
