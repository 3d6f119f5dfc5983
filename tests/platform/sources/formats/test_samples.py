"""Samples of archives as people write them: captions under many names, several images, links, and names given twice."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.curation.steps.chain import check_form
from calumma.platform.sources.files import BadInput, Item
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import list_source, read_file

Member = tuple[str, bytes] | tarfile.TarInfo


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(members: list[Member], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(path: Path, content: bytes, **options: Any) -> tuple[list[Document], list[BadInput], dict[str, Any]]:
    path.write_bytes(content)
    notes = Notes()
    items: list[Item] = list(read_file("webdataset", "source", str(path), notes=notes, options=options))
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, BadInput)], notes.report()


def captions(documents: list[Document]) -> list[str | None]:
    return [image.caption for document in documents for image in document.images]


@pytest.mark.parametrize(
    ("members", "caption", "unread"),
    [
        ({"txt": b"one\r\n"}, "one", {}),
        ({"caption": b"one"}, "one", {}),
        ({"text": b"one"}, "one", {}),
        ({"cls": b"7"}, "7", {}),
        ({"png.txt": b"one"}, "one", {}),
        ({"txt": b"\xef\xbb\xbfone"}, "one", {}),
        ({"txt": "zwölf".encode("utf-16")}, "zwölf", {}),
        ({"json": b'{"caption": "one"}'}, "one", {}),
        ({"json": b'{"caption": ["one", "two", "three"]}'}, "one", {"captions": {"beyond the first": 2}}),
        ({"json": b'{"captions": ["one"]}'}, "one", {}),
        ({"json": b'{"text": "one", "sha256": "x"}'}, "one", {"fields": {"sha256": 1}}),
        ({"txt": b" ", "json": b'{"caption": "one"}'}, "one", {}),
        ({"txt": b"one", "cls": b"7"}, "one", {"members": {".cls": 1}}),
        ({"tags": b"one"}, None, {"members": {".tags": 1}}),
        ({"json": b'{"alt": "one"}'}, None, {"fields": {"alt": 1}}),
    ],
)
def test_captions_are_found_under_the_names_people_give_them(
    tmp_path: Path, members: dict[str, bytes], caption: str | None, unread: dict[str, Any]
) -> None:
    content = tar([("0.png", png()), *((f"0.{extension}", data) for extension, data in members.items())])
    documents, bad, told = read(tmp_path / "a.tar", content)
    assert (captions(documents), bad) == ([caption], [])
    assert told.get("unread", {}) == unread
    assert told.get("lacking", {}) == ({} if caption else {"caption": 1})


def test_an_option_names_the_caption_and_its_encoding(tmp_path: Path) -> None:
    content = tar([("0.png", png()), ("0.tags", "grün".encode("latin-1")), ("0.txt", b"not this")])
    documents, _, told = read(tmp_path / "a.tar", content, caption=".tags", encoding="latin-1")
    assert (captions(documents), told["unread"]) == (["grün"], {"members": {".txt": 1}})
    content = tar([("0.png", png()), ("0.json", b'{"alt": "one", "caption": "not this"}')])
    assert captions(read(tmp_path / "a.tar", content, caption="alt")[0]) == ["one"]
    _, (bad,), _ = read(tmp_path / "a.tar", tar([("0.png", png()), ("0.txt", "grün".encode("latin-1"))]))
    assert "0.txt is no text in utf-8" in bad.reason


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0.png", "0.png", "0.txt"], "0.png is in it twice"),
        (["0.png", "0.txt", "0.txt"], "0.txt is in it twice"),
        (["0.PNG", "0.png", "0.txt"], "0.PNG and 0.png are one name"),
        (["0.png", "0.txt", "0.TXT"], "0.txt and 0.TXT are one name"),
        (["0.png", "0.txt", "0.png", "0.txt"], "0.png is in it twice"),
    ],
)
def test_a_name_given_twice_is_a_bad_sample_and_costs_no_other(tmp_path: Path, names: list[str], said: str) -> None:
    members = [(name, png() if "png" in name.lower() else b"words") for name in [*names, "1.png", "1.txt"]]
    documents, (bad,), _ = read(tmp_path / "a.tar", tar(members))
    assert captions(documents) == ["words"]
    assert bad.name == f"{tmp_path}/a.tar: 0"
    assert said in bad.reason


def test_several_images_of_a_sample_and_what_its_key_is_are_options(tmp_path: Path) -> None:
    members: list[Member] = [("a/0.input.png", png(1)), ("a/0.output.png", png(2)), ("a/0.txt", b"make it brighter")]
    _, (bad,), _ = read(tmp_path / "a.tar", tar(members))
    assert "{images: several}" in bad.reason
    (document,), _, _ = read(tmp_path / "a.tar", tar(members), images="several")
    assert document.segments == (Image(png(1)), Image(png(2)), Text("make it brighter"))
    documents, bad_keys, _ = read(tmp_path / "a.tar", tar(members), key="last_dot")
    assert [image.data for document in documents for image in document.images] == [png(1), png(2)]
    assert "no image among txt" in bad_keys[0].reason
    members = [("0.b.png", png(2)), ("0.a.png", png(1)), ("0.a.txt", b"one"), ("0.b.txt", b"two")]
    (document,), _, told = read(tmp_path / "a.tar", tar(members), images="several")
    assert (document.segments, told) == ((Image(png(1), "one"), Image(png(2), "two")), {})


def test_images_of_a_sample_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    order = [png(n) for n in range(11)]
    images: list[Member] = [(f"0.{n}.png", order[n]) for n in (10, 9, 2, 0, 1, 3, 8, 7, 6, 5, 4)]
    (document,), _, _ = read(tmp_path / "a.tar", tar(images), images="several")
    assert [image.data for image in document.images] == order
    plan = json.dumps({"texts": [None] * 11, "images": [f"i{n}" for n in range(11)]}).encode()
    (document,), _, _ = read(tmp_path / "b.tar", tar([*images, ("0.json", plan)]))
    assert [image.data for image in document.images] == order
    twice = b'{"caption": "a", "caption": "b"}'
    _, (bad,), _ = read(tmp_path / "c.tar", tar([("0.png", png()), ("0.json", twice)]))
    assert "has the key `caption` twice" in bad.reason


def test_frames_beside_a_plan_are_an_interleaved_page(tmp_path: Path) -> None:
    def tiff(count: int) -> bytes:
        buffer = io.BytesIO()
        first, *more = [PILImage.new("RGB", (8, 8), (n, 0, 0)) for n in range(count)]
        first.save(buffer, "TIFF", save_all=True, append_images=more)
        return buffer.getvalue()

    plan = json.dumps({"texts": ["one", None, None, "two"], "images": [None, "i0", "i1", None], "url": "x"}).encode()
    members: list[Member] = [("0.json", plan), ("0.tiff", tiff(2)), ("1.json", plan), ("1.tiff", tiff(3))]
    (document,), (bad,), _ = read(tmp_path / "a.tar", tar(members))
    one, first, second, two = document.segments
    assert (one, two) == (Text("one"), Text("two"))
    assert [s.open().getpixel((0, 0))[0] for s in (first, second) if isinstance(s, Image)] == [0, 1]  # type: ignore[index]
    assert bad.reason == "its .json places 2 images, and it has 3"
    _, _, told = read(tmp_path / "b.tar", tar([("0.tiff", tiff(3)), ("1.tiff", tiff(1)), ("2.png", png())]))
    assert told["unread"] == {"frames": {"beyond the first of an image": 2}}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2"])
def test_hard_links_are_what_they_link_to_and_symbolic_ones_are_counted(tmp_path: Path, suffix: str) -> None:
    members: list[Member] = [
        ("0.png", png(1)),
        ("0.txt", b"one"),
        link("1.png", "./0.png"),
        ("1.txt", b"two"),
        link("2.png", "nowhere.png"),
        ("2.txt", b"three"),
        link("3.png", "0.png", tarfile.SYMTYPE),
        ("3.txt", b"four"),
        ("4.png", png(4)),
    ]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}[suffix]
    documents, bad, told = read(tmp_path / f"a.tar{suffix}", pack(tar(members)))
    assert [(i.data, i.caption) for d in documents for i in d.images] == [
        (png(1), "one"),
        (png(1), "two"),
        (png(4), None),
    ]
    assert [b.reason for b in bad] == [
        "2.png is a hard link to nowhere.png, which is not in the archive",
        "has no image among txt",
    ]
    assert told["unread"] == {"members": {".png (symbolic link)": 1}}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz", ".bz2"])
def test_packed_archives_of_every_format_are_read(tmp_path: Path, form: int, suffix: str) -> None:
    folder = "" if form == tarfile.USTAR_FORMAT else "é" * 130 + "/"
    members: list[Member] = [(f"{folder}{n}.{e}", d) for n in range(3) for e, d in (("png", png(n)), ("txt", b"words"))]
    plain = tar([*members, ("._0.png", b"x"), (".DS_Store", b"x"), ("__MACOSX/0.png", b"x")], form)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    content = pack[suffix](plain) if suffix else plain
    documents, bad, told = read(tmp_path / f"a.tar{suffix}", content)
    assert [d.images[0].data for d in documents] == [png(n) for n in range(3)]
    assert not bad
    assert documents[0].metadata["name"].endswith(f"{folder}0.png")
    assert told == {"unread": {"members": {"._* of macOS": 2, ".DS_Store": 1}}}
    (tmp_path / "b.tgz").touch()
    assert set(list_source("webdataset", str(tmp_path))[0]) == {f"{tmp_path}/a.tar{suffix}", f"{tmp_path}/b.tgz"}


def test_archives_one_after_another_are_read(tmp_path: Path) -> None:
    both = tar([("0.png", png()), ("0.txt", b"one")]) + tar([("1.png", png()), ("1.txt", b"two")])
    documents, bad, told = read(tmp_path / "a.tar", both)
    assert (captions(documents), bad, told["warned"]) == (["one", "two"], [], 1)
    documents, bad, told = read(tmp_path / "a.tar", both + b"signed by x")
    assert (captions(documents), bad, told["warned"]) == (["one", "two"], [], 2)


@pytest.mark.parametrize("size", [1, 512])
@pytest.mark.parametrize("part", range(8))
def test_a_damaged_header_costs_its_sample_alone(tmp_path: Path, part: int, size: int) -> None:
    members = [(f"{n}.{e}", d) for n in range(4) for e, d in (("txt", f"words {n}".encode()), ("png", png(n)))]
    content = bytearray(tar(list(members)))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        header = archive.getmembers()[part].offset
    content[header : header + size] = b"\xff" * size
    documents, bad, _ = read(tmp_path / "a.tar", bytes(content))
    lost = {part // 2}
    assert captions(documents) == [f"words {n}" for n in range(4) if n not in lost]
    assert all(d.images[0].data == png(int(str(d.images[0].caption)[-1])) for d in documents)
    assert any(b.bytes_lost for b in bad)
    content[header : header + 512] = bytes(512)
    documents, bad, _ = read(tmp_path / "a.tar", bytes(content))
    assert captions(documents) == [f"words {n}" for n in range(4) if n not in lost]
    assert bad


def test_an_archive_without_members_is_read_and_told(tmp_path: Path) -> None:
    documents, bad, told = read(tmp_path / "a.tar", tar([]))
    assert (documents, bad) == ([], [])
    assert [warning["reason"] for warning in told["warnings"]] == ["the archive has no members"]
    assert read(tmp_path / "b.tar", b"")[1]  # a file of nothing is none


def test_names_with_and_without_a_dot_before_them_are_one_sample(tmp_path: Path) -> None:
    members: list[Member] = [("./0.png", png(1)), ("0.txt", b"one"), ("./1.png", png(2)), ("1.png", png(3))]
    documents, (bad,), _ = read(tmp_path / "a.tar", tar(members))
    assert captions(documents) == ["one"]
    assert bad.reason == "./1.png and 1.png are one name; which one is meant cannot be told"


def test_frames_of_every_format_are_counted_once(tmp_path: Path) -> None:
    first, *more = [PILImage.new("RGB", (8, 8), (n * 60, 0, 0)) for n in range(3)]
    members: list[Member] = []
    for form in ("GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"):
        buffer = io.BytesIO()
        first.save(buffer, form, save_all=True, append_images=more)
        members.append((f"{form}.{form.lower()}", buffer.getvalue()))
    documents, _, told = read(tmp_path / "a.tar", tar(members))
    assert told["unread"] == {"frames": {"beyond the first of an image": 12}}
    notes = Notes()
    assert not any(isinstance(check_form(document, 1, False, notes), BadInput) for document in documents)
    assert notes.report() == {}


def test_a_caption_that_a_member_has_too_is_read(tmp_path: Path) -> None:
    members: list[Member] = [("0.png", png()), ("0.txt", b"one"), ("0.json", b'{"caption": "one", "text": "other"}')]
    assert read(tmp_path / "a.tar", tar(members))[2] == {"unread": {"fields": {"text": 1}}}


def test_an_archive_that_is_called_packed_and_is_not_is_read(tmp_path: Path) -> None:
    documents, bad, told = read(tmp_path / "a.tar.gz", tar([("0.png", png()), ("0.txt", b"one")]))
    assert (captions(documents), bad, told["warned"]) == (["one"], [], 1)
