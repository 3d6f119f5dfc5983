"""WebDataset archives: what a sample is, and what is kept of a damaged one."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.document import Document, Image
from calumma.platform import storage
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.reading import name_of, read_file


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


def bad(items: list[Document | BadInput]) -> list[BadInput]:
    return [item for item in items if isinstance(item, BadInput)]


def good(items: list[Document | BadInput]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def test_a_webdataset_sample_is_an_image_with_its_caption(tmp_path: Path) -> None:
    items = read("webdataset", tmp_path / "a.tar", tar(samples(2)))
    assert items == [
        Document((Image(png(n), f"caption {n}"),), source="source", license="CC0", url="https://x.test")
        for n in range(2)
    ]
    assert name_of(good(items)[1]) == f"{tmp_path}/a.tar: dir/001.png"


def test_img2dataset_tells_captions_and_failures_in_its_json(tmp_path: Path) -> None:
    def about(**values: Any) -> bytes:
        return json.dumps({"key": "0", "status": "success", "error_message": None, **values}).encode()

    members = [
        ("0.jpg", png()),
        ("0.json", about(caption=" told in json ", url="https://x.test/0.jpg", license="CC-BY")),
        ("1.webp", png()),
        ("1.txt", b"told in text"),
        ("1.json", about(caption="not this one")),
        ("2.jpg", png()),
        ("2.json", about(status="failed_to_resize", error_message="decode error")),
        ("3.json", about(status="failed_to_download", error_message="HTTP Error 404")),
        ("4.jpg", png()),
        ("4.json", about(caption=None)),
    ]
    items = read("webdataset", tmp_path / "00000.tar", tar(members))
    assert [d.images[0].caption for d in good(items)] == ["told in json", "told in text", None]
    assert (good(items)[0].url, good(items)[0].license) == ("https://x.test/0.jpg", "CC-BY")
    assert [b.reason for b in bad(items)] == [
        "its status is 'failed_to_resize': decode error",
        "its status is 'failed_to_download': HTTP Error 404",
    ]


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
    assert [d.images[0].caption for d in good(items)] == ["caption 0", "caption 1", "caption 3"]
    damage, rest = bad(items)
    assert damage.bytes_lost == 1024  # the header, and the image
    assert f"damaged from byte {header:,} on, for 1,024" in damage.reason
    assert (rest.name, rest.reason) == (f"{tmp_path}/a.tar: dir/002", "parts of it may be lost to the damage beside it")


def test_a_member_that_claims_more_than_the_archive_is_damage_and_is_not_allocated(tmp_path: Path) -> None:
    content = bytearray(tar(samples(3)))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = archive.getmember("dir/002.png")
    member.size = 1 << 62
    content[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)
    items = read("webdataset", tmp_path / "a.tar", bytes(content))
    assert [d.images[0].caption for d in good(items)] == ["caption 0", "caption 1"]
    assert "parts of it may be lost" in bad(items)[1].reason
    assert f"{1 << 62:,} bytes long" in bad(items)[0].reason


def test_a_file_that_is_no_tar_is_lost_whole(tmp_path: Path) -> None:
    items = read("webdataset", tmp_path / "a.tar", b"this is no archive" * 100)
    assert [(b.name, b.bytes_lost) for b in bad(items)] == [(f"{tmp_path}/a.tar", 1800)]
    assert not good(items)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("1.txt", b"words")], "no image"),
        ([("1.png", png()), ("1.jpg", png())], "2 images"),
        ([("1.png", png()), ("1.txt", b"\xff\xff")], "caption"),
        ([("1.png", png()), ("1.json", b"{")], "metadata"),
        ([("1.png", png()), ("1.json", b"[]")], "not an object"),
    ],
)
def test_a_sample_that_is_no_pair_is_named(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    items = read("webdataset", tmp_path / "a.tar", tar([*members, ("2.png", png()), ("2.txt", b"fine")]))
    assert [d.images[0].caption for d in good(items)] == ["fine"]
    assert bad(items)[0].name == f"{tmp_path}/a.tar: 1"
    assert said in bad(items)[0].reason


def test_an_archive_is_read_a_sample_at_a_time_however_many_it_has(tmp_path: Path) -> None:
    def held(count: int) -> int:
        (tmp_path / "a.tar").write_bytes(tar([(f"{n}.png", b"x" * 500) for n in range(count)]))
        tracemalloc.start()
        assert sum(1 for _ in read_file("webdataset", "source", f"{tmp_path}/a.tar")) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    held(10)  # imports and caches
    assert held(5000) < held(500) + 400_000  # of 5 MB


def test_an_archive_in_s3_reads_like_a_local_one(s3: str, tmp_path: Path) -> None:
    content = tar(samples(3))
    storage.write_bytes(f"{s3}/a.tar", content)
    assert list(read_file("webdataset", "source", f"{s3}/a.tar")) == read("webdataset", tmp_path / "a.tar", content)
