"""Sources in general: formats by name, listing, and references to images.

How damage is named without losing what is whole is told for each format by itself, in the files beside this one.
"""

from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.sources import formats, reading, registry
from calumma.platform.sources.files import BadInput, Draft, File, Malformed, Reference
from calumma.platform.sources.reading import list_source, name_of, read_file
from calumma.platform.sources.references import PREFETCH, fetch, path_of, resolve_references
from calumma.platform.sources.specification import Source
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.client import s3_client
from calumma.platform.storage.manifest import Manifest


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def good(items: list[Document | BadInput]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


# -- references


@pytest.fixture(params=["local", "s3"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with the image album/1.png, and next to it a secret."""
    base = request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "data")
    storage.write_bytes(f"{base}/album/1.png", png(1))
    storage.write_bytes(f"{base}/../secret.png" if request.param == "local" else f"{base}-secret.png", png(9))
    return base


def test_a_reference_is_a_path_below_the_images(images: str) -> None:
    assert fetch("album/1.png", images) == png(1)
    assert fetch("./album/../album//1.png", images) == png(1)
    assert fetch("1.png", f"{images}/album") == png(1)


def test_a_reference_may_carry_the_image_itself(tmp_path: Path) -> None:
    assert fetch("data:image/png;base64," + base64.b64encode(png(3)).decode(), str(tmp_path)) == png(3)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("https://x.test/a.png", "is remote; download first, e.g. with img2dataset"),
        ("//x.test/a.png", "is remote"),
        ("HTTP://x.test/a.png", "is remote"),
        ("s3://bucket/a.png", "is absolute"),
        ("file:///etc/passwd", "is absolute"),
        ("/etc/passwd", "is absolute"),
        ("../secret.png", "leads out"),
        ("album/../../secret.png", "leads out"),
        ("..", "leads out"),
        ("", "no file name"),
        (".", "no file name"),
        ("a\0b.png", "no file name"),
        ("a" * 2000, "no file name"),
        ("\ud800.png", "not valid Unicode"),
        ("data:text/plain;base64,AAAA", "no data URL of an image"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("album", "no "),
        ("album/2.png", "there is no image 'album/2.png'"),
        ("a" * 300 + ".png", "no "),
    ],
)
def test_a_reference_to_anything_else_says_why_it_is_none(images: str, target: str, said: str) -> None:
    with pytest.raises(Malformed, match=said):
        fetch(target, images)


def test_an_encoded_path_is_not_decoded_into_one_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (document,) = resolve_references(
        [Draft((Reference("%2e%2e/secret.png"),), "d")], "source", f"file://{tmp_path}/data"
    )
    assert isinstance(document, BadInput)


def test_links_that_the_owner_of_the_images_made_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0").write_bytes(png())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").symlink_to(tmp_path / "blobs" / "0")
    assert fetch("1.png", str(tmp_path / "images")) == png()


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "", "%2e%2e", "...", "a.png"]), max_size=8).map("/".join))
def test_no_path_leads_out_of_the_images(target: str) -> None:
    try:
        path = path_of(target, "/data/images")
    except Malformed:
        return
    base = Path("/data/images")
    assert Path("/data/images", path).resolve().is_relative_to(base)
    assert Path("/data/images", path).resolve() != base


def test_images_are_fetched_ahead_in_order_and_not_without_bound(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []

    def read_bytes(uri: str) -> bytes:
        asked.append(uri)
        return uri.encode()

    def drafts() -> Iterator[Draft | BadInput]:
        for number in range(500):
            yield Draft((Text(str(number)), Reference(f"{number}.png")) if number % 3 else (Text(str(number)),), "d")

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    items = resolve_references(drafts(), "source", str(tmp_path))
    first = [next(items) for _ in range(5)]
    assert len(asked) <= PREFETCH + 5 + 1
    documents = [*first, *items]
    assert [document.text for document in documents if isinstance(document, Document)] == [str(n) for n in range(500)]
    assert [d.images[0].data for d in good(documents) if d.images] == [
        f"{tmp_path}/{n}.png".encode() for n in range(500) if n % 3
    ]


def test_an_image_that_cannot_be_had_spoils_its_document_or_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    parts = (Text("a"), Reference("1.png", "one"), Reference("2.png"), Text("b"))
    optional = (Text("a"), Reference("1.png", "one"), Reference("2.png", optional=True), Text("b"))
    items = list(resolve_references([Draft(parts, "x"), Draft(optional, "y")], "source", str(tmp_path)))
    assert items == [
        BadInput("x", f"there is no image '2.png' in {tmp_path}"),
        Document((Text("a"), Image(png(1), "one"), Text("b")), "source"),
    ]


def test_a_storage_that_fails_is_not_bad_data(tmp_path: Path, monkeypatch: Any) -> None:
    def read_bytes(uri: str) -> bytes:
        raise storage.StorageError(f"cannot read {uri}: the endpoint does not answer")

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    with pytest.raises(storage.StorageError, match="does not answer"):
        list(resolve_references([Draft((Reference("1.png"),), "x")], "source", str(tmp_path)))


# -- formats by name, and readers of one's own

OWN = """
from calumma.model.document import Document, Text
from calumma.platform.sources import BadInput, Draft, Malformed, Reference, reader


@reader("words", (".words",))
def words(file, *, least: int = 1):
    for number, line in enumerate(file.content, start=1):
        if line.startswith(b"!"):
            raise Malformed("an exclamation")
        if len(line.split()) >= least:
            yield Draft((Text(line.decode().strip()), Reference("1.png")), file.at(f"line {number}"))


def plain(file):
    yield Document((Text(file.content.read().decode()),))
    yield BadInput(file.at("end"), "no more")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with two readers."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "readers_of_my_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield "readers_of_my_own"
    registry.FORMATS.pop("words", None)


def test_a_reader_of_ones_own_is_a_function_named_by_its_module(own: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.words").write_text("one\ntwo words\nthree more words\n")
    (tmp_path / "data" / "b.other").write_text("other")
    (tmp_path / "1.png").write_bytes(png(1))
    source = Source(
        name="mine", format=f"{own}:words", location=str(tmp_path / "data"), images=".", options={"least": "2"}
    )
    files, others = list_source(source.format, source.location)
    assert (list(files), list(others)) == ([f"{tmp_path}/data/a.words"], [f"{tmp_path}/data/b.other"])
    items = list(reading.read_source(source, f"{tmp_path}/data/a.words", lambda place: str(tmp_path / place)))
    assert items == [Document((Text(text), Image(png(1))), source="mine") for text in ("two words", "three more words")]
    assert name_of(good(items)[0]) == f"{tmp_path}/data/a.words: line 2"


def test_without_suffixes_a_reader_reads_all_files(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.x", "b", "manifest.json"):
        (tmp_path / "data" / name).write_text(name)
    files, others = list_source(f"{own}:plain", str(tmp_path / "data"))
    assert [Path(file).name for file in files] == ["a.x", "b"]
    assert [Path(file).name for file in others] == ["manifest.json"]
    Manifest(kind="documents").write(str(tmp_path / "data"))  # a job's own is no news to anyone
    assert list_source(f"{own}:plain", str(tmp_path / "data")) == (files, {})
    monkeypatch.chdir(tmp_path / "data")
    assert [sorted(map(str, found)) for found in list_source(f"{own}:plain", ".")] == [["a.x", "b"], []]
    items = list(read_file(f"{own}:plain", "source", next(iter(files))))
    assert items == [
        Document((Text("a.x"),), source="source"),
        BadInput(f"{tmp_path}/data/a.x: end", "no more"),
    ]


def test_a_file_that_a_reader_finds_malformed_is_lost_from_there_on(own: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "a.words").write_text("one\n!\nthree\n")
    one, end = read_file(f"{own}:words", "source", f"{tmp_path}/a.words")
    assert isinstance(one, Document)
    assert end == BadInput(f"{tmp_path}/a.words", "an exclamation", 12)


def test_a_reader_need_not_look_out_for_damage(own: str, tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"{n} {n * n}\n" for n in range(1000)).encode())
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "a.words").write_bytes(packed[:-500])
    *found, end = read_file(f"{own}:words", "source", f"{tmp_path}/a.words")
    assert found
    assert isinstance(end, BadInput)
    assert "damaged" in end.reason


@pytest.mark.parametrize(
    ("format", "options", "said"),
    [
        (
            "zip",
            {},
            "'zip' is not known; known are 'coco_captions', 'conversations', 'flickr30k', ",
        ),
        ("no_such_module:f", {}, None),
        ("text", {"feild": "body"}, "'text' has no option 'feild'; it knows field"),
        ("text", {"field": 5}, "option 'field': Input should be a valid string"),
        ("jsonl", {"field": "x"}, "it has none"),
        ("pages", {"other_images": "keep"}, "'bad' or 'leave_out'"),
        ("pages", {"encoding": "no-such"}, "there is no encoding of this name"),
        ("webdataset", {"encoding": "no-such"}, "there is no encoding of this name"),
    ],
)
def test_a_specification_names_a_known_format_and_its_options(
    format: str, options: dict[str, Any], said: str | None
) -> None:
    values = {"name": "a", "format": format, "location": "raw", "options": options}
    if said is None:  # only the cluster may have the module
        assert Source.model_validate(values).format == format
        with pytest.raises(SpecificationError, match="no_such_module cannot be imported"):
            formats.find_format(format)
    else:
        with pytest.raises(ValueError, match=said):
            Source.model_validate(values)


def test_a_name_is_given_once_and_a_function_that_is_not_there_is_told(own: str) -> None:
    with pytest.raises(ValueError, match=r"'text' is taken by calumma\.platform\.sources\.formats\.text:text"):
        registry.reader("text", (".x",))(lambda file: iter(()))
    with pytest.raises(SpecificationError, match="readers_of_my_own has no function nothing"):
        formats.find_format(f"{own}:nothing")
    with pytest.raises(SpecificationError, match="has no option 'most'"):
        list(read_file(f"{own}:words", "source", "/nowhere", options={"most": 1}))


# -- listing


def test_a_folder_lists_files_of_the_format_and_a_file_lists_itself(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "notes.txt", "deep/c.TAR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    files, others = list_source("webdataset", str(tmp_path))
    assert files == {f"{tmp_path}/{name}": 5 for name in ("a.tar", "b.tar", "deep/c.TAR")}
    assert others == {f"{tmp_path}/notes.txt": ("files", ".txt")}
    assert list_source("webdataset", f"{tmp_path}/notes.txt") == ({f"{tmp_path}/notes.txt": 5}, {})
    assert list_source("webdataset", f"file://{tmp_path}/notes.txt") == ({f"{tmp_path}/notes.txt": 5}, {})
    assert list_source("webdataset", f"{tmp_path}/nowhere") == ({}, {})


def test_a_suffix_may_tell_a_compression_too(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.json.ZST", "d.gz", "e.parquet", "f.txt"):
        (tmp_path / name).write_bytes(b"")
    files, others = list_source("text", str(tmp_path))
    assert [Path(file).name for file in files] == ["a.jsonl", "b.jsonl.gz", "c.json.ZST", "e.parquet"]
    assert [Path(file).name for file in others] == ["d.gz", "f.txt"]


def test_what_is_hidden_is_not_read_and_counted_by_name(tmp_path: Path) -> None:
    names = ("a.jsonl", "b/c.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/b/._c.jsonl", "._a.jsonl")
    for name in (*names, "b/.hidden.jsonl", ".git/x/y.jsonl", ".DS_Store", "d.log"):
        (tmp_path / ".store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".store" / name).write_bytes(b"{}")
    files, others = list_source("text", f"{tmp_path}/.store")  # what the location itself is called does not matter
    assert [storage.relative(uri, f"{tmp_path}/.store") for uri in files] == ["a.jsonl", "b/c.jsonl"]
    assert sorted(others.values()) == [
        ("files", ".log"),
        ("hidden files", ".DS_Store"),
        ("hidden files", "._*"),
        ("hidden files", ".git/"),
        ("hidden files", ".hidden.jsonl"),
        ("hidden files", ".ipynb_checkpoints/"),
        ("hidden files", "__MACOSX/"),
    ]


def test_a_pattern_names_what_is_not_there(tmp_path: Path) -> None:
    for name in ("00000.tar", "00002.tar", "00003.tar", "00001.txt"):
        (tmp_path / name).write_bytes(b"x")
    files, others = list_source("webdataset", f"{tmp_path}/{{00000..00002}}.tar")
    assert [Path(uri).name for uri in files] == ["00000.tar", "00002.tar"]
    assert others == {f"{tmp_path}/00001.tar": ("files that are not there", "00001.tar")}
    files, others = list_source("webdataset", f"{tmp_path}/0000*")
    assert (len(files), list(others.values())) == (3, [("files", ".txt")])


@pytest.mark.parametrize(("page", "pages"), [(1000, 1), (7, 6)])
def test_many_files_are_listed_by_one_request_a_page(s3: str, page: int, pages: int) -> None:
    for number in range(40):
        storage.write_bytes(f"{s3}/{number:03d}.jsonl", b"{}")
    requests: list[str] = []
    events = s3_client().meta.events
    events.register("before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=page), "page")
    events.register("before-send.s3", lambda request, **_: requests.append(request.url), unique_id="count")
    try:
        files, _ = list_source("text", s3)
    finally:
        events.unregister("before-send.s3", unique_id="count")
        events.unregister("before-parameter-build.s3.ListObjectsV2", unique_id="page")
    assert list(files) == [f"{s3}/{number:03d}.jsonl" for number in range(40)]
    assert len(requests) == pages + 1, "one for an object that is called as the folder"


def test_a_file_knows_its_place_and_what_is_left_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.JSON.gz").write_bytes(b"0123456789")
    with storage.open_read(f"{tmp_path}/a.JSON.gz") as raw:
        file = File(f"{tmp_path}/a.JSON.gz", raw, str(tmp_path))
        assert file.plain_name.endswith("/a.json")
        raw.read(4)
        assert (file.size, file.bytes_left, file.at("line 1")) == (10, 6, f"{tmp_path}/a.JSON.gz: line 1")
