"""Files that are damaged at random places, in every container and compression: no traceback, no silent loss, and at
most what was damaged is lost where the container allows it.

`pytest tests/platform/sources/test_damage.py --damages 10000` tries that many in all; the suite tries a few hundred.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from calumma.model.document import Document, Image
from calumma.platform.sources.files import BadInput, Item
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import read_file

RECORDS = 60
MEMBER = 12  # records of a member, or a row group, of what has several
TEXTS = [f"record {n} " + random.Random(n).randbytes(40 + 7 * n % 300).hex() for n in range(RECORDS)]
ROWS = [json.dumps({"text": text, "meta": {"id": n}}).encode() for n, text in enumerate(TEXTS)]
Span = tuple[int, int]


@dataclass(frozen=True)
class Container:
    """A file of all records. `spans`: where each record stands, where one can be lost alone; or the members."""

    name: str
    format: str
    content: bytes
    spans: list[Span]
    a_span: int = 1  # records
    checked: bool = False  # what is changed is noticed
    cuttable: bool = True  # what is missing is noticed


def _spans(parts: list[bytes], begin: int = 0) -> list[Span]:
    spans = []
    for part in parts:
        spans.append((begin, begin + len(part)))
        begin += len(part)
    return spans


def _members(parts: list[bytes], pack: Callable[[bytes], bytes], name: str) -> Container:
    packed = [pack(b"".join(parts[n : n + MEMBER])) for n in range(0, len(parts), MEMBER)]
    return Container(name, "text", b"".join(packed), _spans(packed), MEMBER, checked=True)


def _sample(number: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for extension, data in (("jpg", TEXTS[number].encode()), ("txt", f"caption {number}".encode())):
            info = tarfile.TarInfo(f"{number:03d}.{extension}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()[: archive.offset]


def _parquet(compression: str) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"text": TEXTS, "url": [f"u{n}" for n in range(RECORDS)]})
    pq.write_table(table, buffer, compression=compression, row_group_size=MEMBER, write_page_checksum=True)
    return buffer.getvalue()


def _zip(files: dict[str, bytes], a_span: int, name: str, format: str = "text") -> Container:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, content in files.items():
            archive.writestr(each, content)
        begins = [info.header_offset for info in archive.infolist()]
        ends = [*begins[1:], archive.start_dir]
    spans = list(zip(begins, ends, strict=True)) if len(files) > 1 else []
    return Container(name, format, buffer.getvalue(), spans, a_span, checked=True)


def containers() -> list[Container]:
    lines = [row + b"\n" for row in ROWS]
    elements = [b"  " + row + (b",\n" if n < RECORDS - 1 else b"\n") for n, row in enumerate(ROWS)]
    array = b"[\n" + b"".join(elements) + b"]"
    samples = [_sample(n) for n in range(RECORDS)]
    archive = b"".join(samples) + bytes(10240)
    packs: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        "xz": lzma.compress,
        "bz2": bz2.compress,
    }
    found = [
        Container("a.jsonl", "text", b"".join(lines), _spans(lines), cuttable=False),
        Container("a.json", "text", array, _spans(elements, 2), cuttable=False),
        Container("a.tar", "webdataset", archive, _spans(samples)),
        *(Container(f"{c}.parquet", "text", _parquet(c), [], checked=True) for c in ("none", "snappy", "zstd")),
    ]
    for suffix, pack in packs.items():
        for name, plain in (("a.jsonl", b"".join(lines)), ("a.json", array), ("a.tar", archive)):
            form = "webdataset" if name == "a.tar" else "text"
            found.append(Container(f"{name}.{suffix}", form, pack(plain), [], checked=True))
        found.append(_members(lines, pack, f"members.jsonl.{suffix}"))
    found.append(_zip({"a.jsonl": b"".join(lines)}, 1, "a.jsonl.zip"))
    found.append(_zip({"a.tar": archive}, 1, "a.tar.zip", "webdataset"))
    entries = {f"{n:02}.jsonl": b"".join(lines[n : n + MEMBER]) for n in range(0, RECORDS, MEMBER)}
    found.append(_zip(entries, MEMBER, "members.jsonl.zip"))
    return found


CONTAINERS = {container.name: container for container in containers()}


def damaged(content: bytes, random: random.Random, cuttable: bool) -> tuple[bytes, Span, str]:
    """The content with one damage, where it stands, and of which kind it is."""
    kinds = ["bit", "bytes", "zeros"] + (["missing", "more", "cut", "twice"] if cuttable else [])
    kind = random.choice(kinds)
    place = random.randrange(len(content))
    length = 1 if kind == "bit" else random.choice((1, 2, 8, 64, 700))
    end = min(len(content), place + length)
    if kind == "bit":
        new = bytes([content[place] ^ (1 << random.randrange(8))])
    elif kind == "bytes":
        new = random.randbytes(end - place)
    elif kind == "zeros":
        new = bytes(end - place)
    elif kind == "missing":
        new = b""
    elif kind == "more":
        new, end = random.randbytes(length), place
    elif kind == "twice":
        new = content[place:end] * 2
    else:
        new, end = b"", len(content)
    return content[:place] + new + content[end:], (place, max(end, place + 1)), kind


def texts(items: list[Item]) -> list[str]:
    documents = [item for item in items if isinstance(item, Document)]
    return [
        d.segments[0].data.decode("latin-1") if isinstance(d.segments[0], Image) else d.text  # type: ignore[union-attr]
        for d in documents
    ]


def check(container: Container, seed: int, folder: Path) -> None:
    content, (begin, end), kind = damaged(
        container.content, random.Random(f"{container.name} {seed}"), container.cuttable
    )
    path = folder / container.name
    path.write_bytes(content)
    notes = Notes()
    items: list[Item] = list(read_file(container.format, "source", str(path), notes=notes))
    found = texts(items)
    bad = [item for item in items if isinstance(item, BadInput)]
    told = bool(bad or notes.warned)
    what = f"{container.name}, damage {seed} ({kind} at {begin}): {bad[:3]} {notes.report()}"

    touched = [n for n, (first, last) in enumerate(container.spans) if first < end and last > begin]
    intact = set(found) & set(TEXTS)
    if kind == "twice":  # may be a whole record, or member, twice
        assert len(intact) == RECORDS or told, what
        return
    # Nothing is lost in silence: where damage goes over the end of a line, one bad line stands for both.
    accounted = len(found) + len(bad) >= RECORDS - max(0, len(touched) - 1) * (not container.checked)
    assert accounted or any(b.bytes_lost for b in bad) or notes.warned, what
    assert told or len(intact) == RECORDS or not container.checked, what
    # No two records are joined, and what is new is at most what was damaged.
    assert len(set(found) - set(TEXTS)) <= (max(1, len(touched)) if not container.checked else RECORDS), what
    if container.spans and kind != "cut":
        lost = len(touched) * container.a_span
        beside = 1 if container.format == "webdataset" else 0  # a sample whose neighbour's header is gone
        assert len(intact) >= RECORDS - lost - beside, what


@pytest.mark.parametrize("name", CONTAINERS)
def test_damage_costs_itself_and_is_told(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    count = -(-int(pytestconfig.getoption("--damages")) // len(CONTAINERS))
    for seed in range(count):
        check(CONTAINERS[name], seed, tmp_path)


@pytest.mark.parametrize("name", CONTAINERS)
def test_whole_files_are_read_whole(name: str, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    (tmp_path / name).write_bytes(container.content)
    notes = Notes()
    items = list(read_file(container.format, "source", str(tmp_path / name), notes=notes))
    assert texts(items) == TEXTS
    assert not notes.warned
