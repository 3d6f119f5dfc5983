"""Records that public tools and people really write, broken: each costs itself, and is told by name."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calumma.model.document import Document, Image, Text
from calumma.platform.sources.files import BadInput, Malformed
from calumma.platform.sources.formats.records.containers import list_in
from calumma.platform.sources.formats.records.json_values import KeyTwice, parse
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import read_file


def read(path: Path, content: bytes) -> list[str]:
    """Texts of documents and, behind "bad: ", reasons."""
    path.write_bytes(content)
    items = read_file("text", "s", str(path))
    return [f"bad: {item.reason}" if isinstance(item, BadInput) else item.text for item in items]


def talks(folder: Path, *records: Any, notes: Notes | None = None) -> list[Document | BadInput]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_file("conversations", "s", str(path), notes=notes))


def turns(question: dict[str, Any] | None = None, answer: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": "q", **(question or {})}
    return {"messages": [asked, {"role": "assistant", "content": "a", **(answer or {})}], **more}


def trained(item: Document | BadInput) -> list[bool]:
    assert isinstance(item, Document), item
    return [segment.trained for segment in item.segments if segment.role == "assistant"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_with_two_values_makes_its_record_bad(tmp_path: Path, name: str) -> None:
    records = [
        b'{"text": "a", "text": "b"}',
        b'{"text": "c", "n": [{"x": 1, "x": 2}]}',
        b'{"text": "\\":d", "text": "\\":d"}',
        b'{"text"  : "a", "text"\t: "b"}',
    ]
    content = b"\n".join(records) if name.endswith("l") else b"[" + b",".join(records) + b"]"
    twice = "bad: has the key `{}` twice, with different values"
    assert read(tmp_path / name, content) == [twice.format("text"), twice.format("x"), '":d', twice.format("text")]


def test_a_key_with_two_values_does_not_hide_that_its_line_is_broken(tmp_path: Path) -> None:
    content = b'{"text": "a"}\n{"text": "b", "text": "c", {"text": "d"}\n{"text": "e"}\n'
    first, broken, rescued, last = read(tmp_path / "a.jsonl", content)
    assert (first, rescued, last) == ("a", "d", "e")
    assert "not a line of JSON" in broken
    with pytest.raises(KeyTwice, match="`x` twice"):
        parse(b'[{"x": 1, "x": 2}]')
    assert parse("\ufeff[1]".encode("utf-8")) == parse("[1]".encode("utf-16")) == [1]


@pytest.mark.parametrize(("weight", "expected"), [("0", [False]), ("False", [False]), ("1", [True]), ("", [True])])
def test_a_weight_of_csv_is_one(tmp_path: Path, weight: str, expected: list[bool]) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"question,answer,weight\nq,a,{weight}\nq,a,0.5\n")
    item, share = read_file("conversations", "s", str(path))
    assert trained(item) == expected
    assert isinstance(share, BadInput)
    assert "`weight` of a record" in share.reason


def test_images_that_csv_lists_are_read(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(name.encode())
    path = tmp_path / "a.csv"
    path.write_text("""question,answer,images\nq,a,"['0.png', '1.png']"\nq,a,"['0.png' '1.png']"\n""")
    item, joined = read_file("conversations", "s", str(path))
    assert isinstance(item, Document)
    assert [image.data for image in item.images] == [b"0.png", b"1.png"]
    assert isinstance(joined, BadInput)
    assert "no commas between them" in joined.reason


@pytest.mark.parametrize("written", ["['a cat' 'a dog']", "['a cat'\n 'a dog']", "['a', ['b' \"c\"]]"])
def test_texts_without_commas_between_them_are_not_joined(tmp_path: Path, written: str) -> None:
    with pytest.raises(Malformed, match="no commas"):
        list_in(written)
    (tmp_path / "0.png").write_bytes(b"0")
    path = tmp_path / "a.csv"
    path.write_text('image,captions\n0.png,"' + written.replace('"', '""') + "\"\n0.png,\"['a', 'b']\"\n")
    bad, *good = read_file("pairs", "s", str(path))
    assert isinstance(bad, BadInput)
    assert [image.caption for item in good if isinstance(item, Document) for image in item.images] == ["a", "b"]


def test_a_document_of_nothing_is_bad(tmp_path: Path) -> None:
    records = [{"texts": [None], "images": ["no.png"]}, {"texts": ["a", None], "images": [None, "no.png"]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record | {"seen": 1}) + "\n" for record in records))
    notes = Notes()
    nothing, item = read_file("interleaved", "s", str(path), options={"other_images": "leave_out"}, notes=notes)
    assert isinstance(nothing, BadInput)
    assert nothing.reason == "has neither text nor image that can be had"
    assert isinstance(item, Document)
    assert notes.unread == {"images": {"that cannot be had": 2}, "fields": {"seen": 2}}


def test_arrays_under_the_name_of_lines_are_read(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "two"}]
    assert read(tmp_path / "a.jsonl", json.dumps(records, indent=1).encode()) == ["one", "two"]
    assert read(tmp_path / "a.jsonl", json.dumps(records).encode()) == ["one", "two"]
    lists = b'[{"text": "one"}]\n[{"text": "two"}]\n'  # lines that are lists are no arrays of records
    assert read(tmp_path / "a.jsonl", lists) == ["bad: holds a list, not an object"] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_what_a_file_is_instead_is_told(tmp_path: Path, name: str) -> None:
    (bad,) = read(tmp_path / name, "text\n".encode("utf-16"))
    assert "convert it" in bad
    (bad,) = read(tmp_path / name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in bad


def test_a_bad_row_of_csv_costs_itself(tmp_path: Path) -> None:
    content = b'text,l\n"a"b,mit\nfirst,mit\ncaf\xe9,mit\nsecond,mit\n"open,mit\nthird,mit\n'
    broken, first, latin, second, endless = read(tmp_path / "a.csv", content)
    assert (first, latin, second) == ("first", "bad: is not UTF-8", "second")
    assert "not a row of the table" in broken
    assert "damaged from here on" in endless
    lost = [item.bytes_lost for item in read_file("text", "s", str(tmp_path / "a.csv")) if isinstance(item, BadInput)]
    assert lost == [0, 0, len('"open,mit\nthird,mit\n')]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_bad_value_of_a_column_costs_its_row(tmp_path: Path, name: str) -> None:
    def columnar(table: Any) -> bytes:
        buffer = io.BytesIO()
        if name == "a.parquet":
            pq.write_table(table, buffer)
        else:
            with pa.ipc.new_stream(buffer, table.schema) as writer:
                writer.write_table(table)
        return buffer.getvalue()

    times = pa.array([{"t": 2**62}, {"t": 1}], pa.struct([("t", pa.timestamp("us"))]))
    table = pa.table({"text": ["a", "b"], "metadata": times})
    assert read(tmp_path / name, columnar(table)) == ["bad: cannot be read: date value out of range", "b"]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    assert read(tmp_path / name, columnar(table)) == ["bad: has the column 'text' more than once"]


@pytest.mark.parametrize(
    "field", ["weight", "train", "training", "trainable", "loss_weight", "loss_scale", "loss_mask"]
)
def test_what_is_not_to_be_trained_is_not(tmp_path: Path, field: str) -> None:
    for item in talks(tmp_path, turns(None, {field: 0}), turns(**{field: False})):
        assert trained(item) == [False]


def test_trl_prompts_are_read_and_not_trained(tmp_path: Path) -> None:
    said = turns()["messages"]
    (item,) = talks(tmp_path, {"prompt": [*said, said[0]], "completion": [said[1]]})
    assert trained(item) == [False, True]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (turns(None, {"train_detail": [{"begin_offset": 0}]}), "`train_detail`, which is not read"),
        (turns({"audio": "a.wav"}), "`audio`, which is not read"),
        (turns({"value": "other"}), "different words in `value` and `content`"),
        (turns(system=["S"]), "`system` is a list"),
        ({"prompt": "p", "completion": "c", "label": False}, "not wanted"),
        ({"messages": [{"speaker": "user", "words": "q"}]}, "it has speaker, words"),
    ],
)
def test_a_conversation_in_doubt_is_bad(tmp_path: Path, record: Any, reason: str) -> None:
    (item,) = talks(tmp_path, record)
    assert isinstance(item, BadInput)
    assert reason in item.reason


def test_fields_beside_the_turns_are_counted(tmp_path: Path) -> None:
    notes = Notes()
    question = {"messages": turns()["messages"][:1]}
    items = talks(tmp_path, turns(instruction="i", conversations=[]), turns(weight=0.7), question, notes=notes)
    assert notes.unread == {"fields": {"instruction": 1}}
    (bad,) = [item.reason for item in items if isinstance(item, BadInput)]
    assert bad == "`weight` of a record is 0.7; allowed: 0, 1, false, true"  # as of a turn
    assert notes.lacking == {"answer": 1}


def test_images_stand_where_their_number_says(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(name.encode())
    parts = [{"type": "image", "index": 1}, {"type": "text", "text": "and"}, {"type": "image", "index": 0}]
    (item,) = talks(tmp_path, turns({"content": parts}, images=["0.png", "1.png"]))
    assert isinstance(item, Document)
    assert [s.text if isinstance(s, Text) else s.data for s in item.segments] == [b"1.png", "and", b"0.png", "a"]


def test_images_in_base64_without_a_head_are_read(tmp_path: Path) -> None:
    data = b"\x89PNG\r\n\x1a\n" + bytes(60)
    (item,) = talks(tmp_path, turns({"content": "<image>q"}, image=base64.b64encode(data).decode()))
    assert isinstance(item, Document)
    assert isinstance(item.segments[0], Image)
    assert item.segments[0].data == data
