"""Records of JSON, plain and compressed: texts and conversations, and what damage leaves of them."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, File
from calumma.platform.sources.formats.records import rows
from calumma.platform.sources.reading import read_file

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
# Hard to compress, so that there is a line in every part of what they are compressed to.
HARD_TEXTS = [base64.b64encode(random.Random(n).randbytes(200)).decode() for n in range(200)]
PNG = b"\x89PNG\r\n\x1a\n and so on"


def read(format: str, path: Path, content: bytes, **options: Any) -> list[Document | BadInput]:
    path.write_bytes(content)
    return list(read_file(format, "source", str(path), options=options))


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def bad(items: list[Document | BadInput]) -> list[BadInput]:
    return [item for item in items if isinstance(item, BadInput)]


def texts(items: list[Document | BadInput]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


# -- texts


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_texts_and_code_are_read_from_lines_however_they_are_packed(tmp_path: Path, name: str, packed: str) -> None:
    rows = [
        {"text": "one <image>", "license": "MIT", "url": "https://x.test/1"},
        {"content": "print(2)", "max_stars_repo_licenses": ["MIT", "Apache-2.0"]},
        {"text": "drei ä", "meta": {"url": "https://x.test/3"}, "metadata": {"license": "CC0"}},
    ]
    items = read("text", tmp_path / f"{name}{packed}", PACKED[packed](lines(*rows)))
    assert items == [
        Document((Text("one <image>"),), source="source", license="MIT", url="https://x.test/1"),
        Document((Text("print(2)"),), source="source", license="MIT, Apache-2.0"),
        Document((Text("drei ä"),), source="source", license="CC0", url="https://x.test/3"),
    ]


def test_the_field_of_the_text_may_be_told(tmp_path: Path) -> None:
    content = lines({"body": "one", "text": "not this"}, {"text": "no body"})
    items = read("text", tmp_path / "a.jsonl", content, field="body")
    assert texts(items) == ["one"]
    assert bad(items)[0].reason == "has no `body`; it has text; the source's options may name the field: {field: NAME}"


def test_what_is_compressed_is_told_by_the_content_not_the_name(tmp_path: Path) -> None:
    assert texts(read("text", tmp_path / "a.jsonl", gzip.compress(lines({"text": "one"})))) == ["one"]
    (plain,) = read("text", tmp_path / "a.jsonl.gz", lines({"text": "one"}))
    assert isinstance(plain, BadInput)
    assert "damaged from here on" in plain.reason


def test_an_array_of_texts_is_read_too(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf [{"text": "one"}, 5, {"text": "two"}]'
    items = read("text", tmp_path / "a.json", content)
    assert texts(items) == ["one", "two"]
    assert bad(items) == [BadInput(f"{tmp_path}/a.json: item 1", "holds a number, not an object")]


def test_jsonl_reads_text_license_and_url(tmp_path: Path) -> None:
    items = read("jsonl", tmp_path / "a.jsonl", lines({"text": "one <image>", "license": "MIT"}, {"text": "two"}))
    assert items == [
        Document((Text("one <image>"),), source="source", license="MIT"),
        Document((Text("two"),), source="source"),
    ]


@pytest.mark.parametrize("format", ["jsonl", "text"])
def test_broken_lines_are_named_by_their_number_and_the_rest_is_read(tmp_path: Path, format: str) -> None:
    content = (
        lines({"text": "one"})
        + b"\n{broken\n"
        + lines([1], {"words": 1}, {"text": 5}, {"text": "last"})
        + b"[" * 100_000
        + b"\n"
        + b"1" * 9999
        + b"\n"
    )
    items = read(format, tmp_path / "a.jsonl", content + b'{"text": "cut o')
    assert texts(items) == ["one", "last"]
    assert [b.name.rpartition("line ")[2] for b in bad(items)] == ["3", "4", "5", "6", "8", "9", "10"]
    assert "a list, not an object" in bad(items)[1].reason
    assert "it has words" in bad(items)[2].reason


def test_a_line_without_end_is_skipped_and_not_held(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE", 1000)
    content = lines({"text": "one"}) + b"x" * 5_000_000 + b"\n" + lines({"text": "two"})
    (tmp_path / "a.jsonl").write_bytes(content)
    tracemalloc.start()
    items = list(read_file("text", "source", f"{tmp_path}/a.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts(items) == ["one", "two"]
    assert bad(items) == [BadInput(f"{tmp_path}/a.jsonl: line 2", "longer than 1,000 bytes")]
    assert peak < 500_000


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@given(share=st.floats(0, 1))
def test_a_compressed_file_that_is_cut_keeps_the_lines_before(
    tmp_path_factory: pytest.TempPathFactory, packed: str, share: float
) -> None:
    whole = PACKED[packed](lines(*({"text": text} for text in HARD_TEXTS)))
    cut = whole[: 1 + int(share * (len(whole) - 2))]
    path = tmp_path_factory.mktemp("cut") / f"a.jsonl{packed}"
    *before, end = read("text", path, cut)
    assert isinstance(end, BadInput)
    assert texts(before) == HARD_TEXTS[: len(before)]
    assert end.name == f"{path}: line {len(before) + 1}"
    assert "damaged from here on" in end.reason


@pytest.mark.parametrize("packed", PACKED)
@given(changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=10))
def test_no_damage_stops_the_reader_of_lines(
    tmp_path_factory: pytest.TempPathFactory, packed: str, changes: list[tuple[float, int]]
) -> None:
    content = bytearray(PACKED[packed](lines(*({"text": f"text {n}"} for n in range(50)))))
    for share, value in changes:
        content[int(share * len(content))] = value
    items = read("text", tmp_path_factory.mktemp("damaged") / f"a.jsonl{packed}", bytes(content))
    assert items
    assert all(isinstance(item, Document | BadInput) for item in items)


def test_storage_that_fails_in_a_compressed_file_is_not_damage(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x" * 100, 0) * 20_000)

    class Failing:
        def __init__(self, uri: str) -> None:
            self._file = Path(uri).open("rb")  # noqa: SIM115

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def read(self, size: int = -1) -> bytes:
            if self._file.tell() > 100_000:
                raise storage.StorageError("the endpoint does not answer")
            return self._file.read(size)

    monkeypatch.setattr(storage, "open_read", Failing)
    with pytest.raises(storage.StorageError, match="does not answer"):
        list(read_file("text", "source", f"{tmp_path}/a.jsonl.gz"))


# -- how much is held


def counted(monkeypatch: Any) -> list[Any]:
    """The files that are opened from now on."""
    opened: list[Any] = []
    real = storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda uri: opened.append(real(uri)) or opened[-1])
    return opened


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_a_large_file_is_read_a_little_at_a_time(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    row = {"conversations": [{"from": "human", "value": "what? " * 80}, {"from": "gpt", "value": "that. " * 80}]}
    count = 8_000
    content = json.dumps([row] * count).encode() if name == "a.json" else lines(row) * count
    content = PACKED[Path(name).suffix if Path(name).suffix in PACKED else ""](content)
    (tmp_path / name).write_bytes(content)
    assert sum(1 for _ in read_file("conversations", "source", f"{tmp_path}/{name}")) == count
    opened = counted(monkeypatch)
    tracemalloc.start()
    items = read_file("conversations", "source", f"{tmp_path}/{name}")
    assert isinstance(next(items), Document)
    first = opened[0].raw.tell()
    assert all(isinstance(item, Document) for item in items)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first <= (200_000 if len(content) > 1_000_000 else len(content))
    assert peak < 4_000_000 < 8_000_000 < count * len(json.dumps(row))


def test_texts_in_s3_are_read_by_ranges(s3: str, monkeypatch: Any) -> None:
    rows = [{"text": f"{n} " * 100} for n in range(100)]
    storage.write_bytes(f"{s3}/a.jsonl.zst", zstandard.compress(lines(*rows)))
    items = list(read_file("text", "source", f"{s3}/a.jsonl.zst"))
    assert texts(items) == [row["text"] for row in rows]
    real = storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda uri: real(uri, buffer=64 << 10))
    storage.write_bytes(f"{s3}/b.jsonl", lines(*rows) * 100)
    items = list(read_file("text", "source", f"{s3}/b.jsonl"))
    assert texts(items) == [row["text"] for row in rows] * 100


# -- conversations


def chat(images: list[Any], *turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": f, "value": v} for f, v in turns], "images": images, **more}


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def segments(items: list[Document | BadInput]) -> Iterator[tuple[Any, ...]]:
    assert not bad(items)
    return (item.segments for item in items if isinstance(item, Document))


def test_the_kth_mark_of_a_conversation_is_its_kth_image(tmp_path: Path) -> None:
    row = chat(
        [url(PNG), url(b"2")],
        ("human", "Which? <image> This?"),
        ("gpt", "One, like <image>"),
        captions=["one", None],
    )
    (found,) = segments(read("conversations", tmp_path / "a.jsonl", lines(row)))
    assert found == (
        Text("Which? ", "user"),
        Image(PNG, "one", "user"),
        Text(" This?", "user"),
        Text("One, like ", "assistant"),
        Image(b"2", None, "assistant"),
    )


LLAVA = {"id": "1", "image": "coco/1.jpg"} | {
    key: value
    for key, value in chat([], ("human", "<image>\nWhat is it?"), ("gpt", "A cat.")).items()
    if key != "images"
}


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.zst"])
def test_llava_refers_to_images_below_the_file_or_the_given_folder(tmp_path: Path, name: str) -> None:
    for folder, data in (("", b"beside"), ("elsewhere", b"elsewhere")):
        (tmp_path / folder / "coco").mkdir(parents=True)
        (tmp_path / folder / "coco" / "1.jpg").write_bytes(data)
    content = json.dumps([LLAVA], indent=1).encode() if ".json" == Path(name).suffixes[0] else lines(LLAVA)
    items = read("conversations", tmp_path / name, PACKED[name[7:] if ".jsonl" in name else name[6:]](content))
    assert next(segments(items)) == (
        Image(b"beside", None, "user"),
        Text("\nWhat is it?", "user"),
        Text("A cat.", "assistant"),
    )
    items = list(read_file("conversations", "source", f"{tmp_path}/{name}", images=f"{tmp_path}/elsewhere"))
    assert next(segments(items))[0] == Image(b"elsewhere", None, "user")


def test_conversations_and_their_images_may_be_in_s3(s3: str) -> None:
    storage.write_bytes(f"{s3}/data/a.json", json.dumps([LLAVA] * 3).encode())
    storage.write_bytes(f"{s3}/images/coco/1.jpg", PNG)
    items = list(read_file("conversations", "source", f"{s3}/data/a.json", images=f"{s3}/images"))
    assert [item.images[0].data for item in items if isinstance(item, Document)] == [PNG] * 3
    items = list(read_file("conversations", "source", f"{s3}/data/a.json"))
    assert [b.reason for b in bad(items)] == [f"there is no image 'coco/1.jpg' in {s3}/data"] * 3


def test_openai_messages_have_roles_parts_and_a_system(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(PNG)
    parts = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": url(b"2")}},
        {"type": "image"},
        {"type": "image", "image": "1.png"},
    ]
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "Yes."},
        ],
        "images": [{"path": "1.png"}],
    }
    (found,) = segments(read("conversations", tmp_path / "a.jsonl", lines(row)))
    assert found == (
        Text("Be brief.", "user"),
        Text("\n\n", "user"),
        Text("Look:", "user"),
        Image(b"2", None, "user"),
        Image(PNG, None, "user"),
        Image(PNG, None, "user"),
        Text("Yes.", "assistant"),
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (chat([], ("human", "<image>")), "1 <image> marks and 0 images"),
        (chat([url(b"x")], ("human", "hello")), "0 <image> marks and 1 images"),
        (chat(["https://x.test/a.png"], ("human", "<image>")), "download first"),
        (chat(["../a.png"], ("human", "<image>")), "leads out"),
        (chat(["data:image/png;base64,%%%"], ("human", "<image>")), "not valid base64"),
        (chat([5], ("human", "<image>")), "image 0 is a number"),
        ({**chat([], ("human", "x")), "images": 5}, "`images` is a number"),
        (chat([], ("robot", "hello")), "from 'robot'; allowed: human"),
        (chat([url(b"x")], ("human", "<image>"), captions=["a", "b"]), "as long as"),
        ({"conversations": []}, "without turns, not a list of turns"),
        ({"conversations": ["hi"]}, "a turn must be"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of a turn must be"),
        ({"text": "hi"}, "it has text"),
    ],
)
def test_a_malformed_conversation_says_what_is_wrong(tmp_path: Path, row: Any, said: str) -> None:
    items = read("conversations", tmp_path / "a.jsonl", lines(row))
    assert said in bad(items)[0].reason
    assert bad(items)[0].name == f"{tmp_path}/a.jsonl: line 1"


# -- damaged arrays


def test_an_array_keeps_what_stands_around_a_bad_element(tmp_path: Path) -> None:
    one = json.dumps(chat([], ("human", "a" * 1000), ("gpt", "b"))).encode()
    content = (
        b"[" + b",".join([one] * 100) + b', {"conversations": [{"from" "human"}]}, ' + b",".join([one] * 100) + b"]"
    )
    items = read("conversations", tmp_path / "a.json", content)
    assert len(texts(items)) == 200
    assert [b.name for b in bad(items)] == [f"{tmp_path}/a.json: item 100"]


@pytest.mark.parametrize("number", [0, 50, 99])
@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"conv', b"#conv"), (b'"human"', b'"human'), (b"}", b" "), (b"{", b" "), (b"[", b"}"), (b":", b"]")],
)
def test_damage_to_what_holds_an_element_together_costs_that_element(
    tmp_path: Path, number: int, old: bytes, new: bytes
) -> None:
    elements = [json.dumps(chat([], ("human", f"q{n}"), ("gpt", f"a{n}"), id=n)).encode() for n in range(100)]
    elements[number] = elements[number].replace(old, new, 1)
    items = read("conversations", tmp_path / "a.json", b"[" + b", ".join(elements) + b"]")
    assert texts(items) == [f"q{n}a{n}" for n in range(100) if n != number]
    assert bad(items)


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b'[{"a":' * 300_000, b'[{"text": "one"}, ' + b"[" * 1_000_000])
def test_brackets_without_end_are_damage_and_fill_no_memory(tmp_path: Path, content: bytes) -> None:
    tracemalloc.start()
    items = read("text", tmp_path / "a.json", content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more than 1,000 brackets" in bad(items)[-1].reason
    assert texts(items) == ["one"] * (b"one" in content)
    assert peak < 2_000_000


def test_one_object_over_many_lines_is_one_bad_input(tmp_path: Path) -> None:
    (item,) = read("conversations", tmp_path / "a.json", json.dumps({"data": [LLAVA] * 50}, indent=1).encode())
    assert isinstance(item, BadInput)
    assert "neither an array of records nor one record a line" in item.reason
    assert item.bytes_lost == (tmp_path / "a.json").stat().st_size


@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=10), st.floats(0, 1))
def test_no_damage_stops_the_reader_of_arrays(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], share: float
) -> None:
    content = bytearray(json.dumps([chat([], ("human", f"{n}"), ("gpt", "x")) for n in range(20)]).encode())
    for place, value in changes:
        content[int(place * len(content))] = value
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    items = read("conversations", path, bytes(content[: 1 + int(share * len(content))]))
    assert all(isinstance(item, Document | BadInput) for item in items)
    if not changes and len(content) > 1 + int(share * len(content)):
        assert len(bad(items)) == 1
        assert texts(items) == [f"{n}x" for n in range(len(items) - 1)]


ODD = st.sampled_from(['}, {"text": "', '"', "\\", "}, {", "]", "[{", "\u2028é", "\ud800", '{"text":', ","])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | ODD | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD | st.just("text"), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["text", "id", "turns"]), VALUES, min_size=1) | st.integers(), max_size=30
)


@given(records=RECORDS, indent=st.sampled_from([None, 0, 1]), ascii=st.booleans())
def test_an_array_has_the_records_of_its_lines(records: list[Any], indent: int | None, ascii: bool) -> None:
    def file(name: str, text: str) -> File:
        return File(name, io.BytesIO(text.encode("utf-8", "surrogatepass")), "")

    array = file("a.json", json.dumps(records, indent=indent, ensure_ascii=ascii))
    lines = file("a.jsonl", "".join(json.dumps(record, ensure_ascii=ascii) + "\n" for record in records))
    found = [row.reason if isinstance(row, BadInput) else row[1] for row in rows.json_rows(array)]
    assert found == [row.reason if isinstance(row, BadInput) else row[1] for row in rows.json_rows(lines)]
    assert [row for row in found if isinstance(row, dict)] == [record for record in records if isinstance(record, dict)]
