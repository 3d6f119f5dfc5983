"""One corpus in every layout and compression gives the same documents."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.document import Document, Segment, without_layout
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.reading import read_source, require_files
from calumma.platform.sources.specification import Source

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# Without NUL and surrogates, which are no text anywhere, and without what CSV and Python's text files end lines with.
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029\x85\ufeff"), min_size=1)
CAPTION = WORDS.map(str.strip).filter(bool)
Corpus = list[tuple[int, str]]  # shade of the image, caption
Write = Callable[[Path, Corpus], None]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("L", (2, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def images_in(folder: Path, corpus: Corpus) -> None:
    folder.mkdir(exist_ok=True)
    for number, (shade, _) in enumerate(corpus):
        (folder / f"{number:04d}.png").write_bytes(png(shade))


def rows_of(corpus: Corpus, image: Callable[[int, int], Any]) -> list[dict[str, Any]]:
    return [{"image": image(number, shade), "caption": words} for number, (shade, words) in enumerate(corpus)]


def by_path(number: int, _: int) -> str:
    return f"{number:04d}.png"


def inside(_: int, shade: int) -> dict[str, Any]:
    return {"bytes": png(shade), "path": None}


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def archive(corpus: Corpus, caption: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, (shade, words) in enumerate(corpus):
            text = json.dumps({"caption": words}) if caption == "json" else words
            for suffix, content in (("png", png(shade)), (caption, text.encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def arrow_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def layouts() -> Iterator[tuple[str, str, Write]]:
    """(name, format, how it is written)."""

    def packed_file(name: str, content: Callable[[Corpus], bytes], pack: Callable[[bytes], bytes]) -> Write:
        def write(folder: Path, corpus: Corpus) -> None:
            images_in(folder, corpus)
            (folder / name).write_bytes(pack(content(corpus)))

        return write

    named = {
        "data.jsonl": lambda corpus: json_lines(rows_of(corpus, by_path)),
        "data.json": lambda corpus: json.dumps(rows_of(corpus, by_path)).encode(),
        "data.csv": lambda corpus: csv_table(rows_of(corpus, by_path), ","),
        "data.tsv": lambda corpus: csv_table(rows_of(corpus, by_path), "\t"),
    }
    for suffix, pack in PACKED.items():
        for name, content in named.items():
            yield f"{name}{suffix}", "pairs", packed_file(f"{name}{suffix}", content, pack)
        for caption in ("txt", "json", "caption"):
            tar = lambda corpus, caption=caption: archive(corpus, caption)  # noqa: E731
            yield f"tar of .{caption}{suffix}", "webdataset", packed_file(f"data.tar{suffix}", tar, pack)

    schema = pa.schema([("image", IMAGE), ("caption", pa.string())])

    def parquet(folder: Path, corpus: Corpus) -> None:
        folder.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(rows_of(corpus, inside), schema)
        pq.write_table(table, folder / "data.parquet", row_group_size=2)

    def arrow(folder: Path, corpus: Corpus) -> None:
        folder.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(rows_of(corpus, inside), schema)
        (folder / "data-00000-of-00001.arrow").write_bytes(arrow_stream(table))

    def sidecars(folder: Path, corpus: Corpus) -> None:
        images_in(folder, corpus)
        for number, (_, words) in enumerate(corpus):
            (folder / f"{number:04d}.txt").write_bytes(words.encode())

    def described(form: str) -> Write:
        def write(folder: Path, corpus: Corpus) -> None:
            images_in(folder, corpus)
            rows = [{"file_name": f"{n:04d}.png", "text": words} for n, (_, words) in enumerate(corpus)]
            (folder / f"metadata.{form}").write_bytes(csv_table(rows, ",") if form == "csv" else json_lines(rows))

        return write

    def coco(folder: Path, corpus: Corpus) -> None:
        (folder / "annotations").mkdir(parents=True)
        images_in(folder / "train2017", corpus)
        images = [{"id": n, "file_name": f"{n:04d}.png"} for n in range(len(corpus))]
        annotations = [{"id": n, "image_id": n, "caption": words} for n, (_, words) in enumerate(corpus)]
        content = {"images": images, "annotations": annotations}
        (folder / "annotations/captions_train2017.json").write_text(json.dumps(content))

    def flickr(folder: Path, corpus: Corpus) -> None:
        images_in(folder, corpus)
        lines = [f"{n:04d}.png#0\t{words}\n" for n, (_, words) in enumerate(corpus)]
        (folder / "results.token").write_bytes("".join(lines).encode())

    yield "parquet", "pairs", parquet
    yield "arrow", "pairs", arrow
    yield "files", "image_files", sidecars
    yield "metadata.csv", "imagefolder", described("csv")
    yield "metadata.jsonl", "imagefolder", described("jsonl")
    yield "coco", "coco_captions", coco
    yield "flickr30k", "flickr30k", flickr


def documents(format: str, folder: Path) -> list[tuple[Segment, ...]]:
    source = Source(name="s", format=format, location=str(folder))
    found = [item for uri in require_files(source)[0] for item in read_source(source, uri)]
    assert not [item for item in found if isinstance(item, BadInput)], found
    return [without_layout(item.segments) for item in found if isinstance(item, Document)]


@settings(max_examples=4)
@given(st.lists(st.tuples(st.integers(0, 255), CAPTION), min_size=1, max_size=5))
def test_one_corpus_of_pairs_is_the_same_in_every_layout_and_compression(corpus: Corpus) -> None:
    with tempfile.TemporaryDirectory() as root:
        first: list[tuple[Segment, ...]] | None = None
        for number, (name, format, write) in enumerate(layouts()):
            folder = Path(root, str(number))
            write(folder, corpus)
            found = documents(format, folder)
            assert len(found) == len(corpus), name
            first = first or found
            assert found == first, name


TURNS = st.lists(st.tuples(CAPTION, CAPTION), min_size=1, max_size=3)


@settings(max_examples=6)
@given(st.lists(TURNS, min_size=1, max_size=4))
def test_one_corpus_of_conversations_is_the_same_whatever_carries_it(corpus: list[list[tuple[str, str]]]) -> None:
    def turns(pairs: list[tuple[str, str]], who: str, said: str, roles: tuple[str, str]) -> list[dict[str, str]]:
        return [{who: role, said: words} for pair in pairs for role, words in zip(roles, pair, strict=True)]

    llava = [{"conversations": turns(pairs, "from", "value", ("human", "gpt"))} for pairs in corpus]
    openai = [{"messages": turns(pairs, "role", "content", ("user", "assistant"))} for pairs in corpus]
    alpaca = [
        {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1], "history": [list(p) for p in pairs[:-1]]}
        for pairs in corpus
    ]
    with tempfile.TemporaryDirectory() as root:
        first: list[tuple[Segment, ...]] | None = None
        for number, rows in enumerate((llava, openai, alpaca)):
            for suffix, pack in PACKED.items():
                folder = Path(root, f"{number}{suffix}")
                folder.mkdir()
                for name, content in (("a.jsonl", json_lines(rows)), ("b.json", json.dumps(rows).encode())):
                    (folder / f"{name}{suffix}").write_bytes(pack(content))
                pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet")
                (folder / "d.arrow").write_bytes(arrow_stream(pa.Table.from_pylist(rows)))
                found = documents("conversations", folder)
                first = first or found
                assert found == first
        assert first is not None
        assert first == first[: len(corpus)] * 4
        said = [[segment.text for segment in segments] for segments in first[: len(corpus)]]  # type: ignore[union-attr]
        assert said == [[words for pair in pairs for words in pair] for pairs in corpus]
