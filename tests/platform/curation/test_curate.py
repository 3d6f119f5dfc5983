"""Raw files -> curated documents: what is kept, what is reported, and that a rerun makes the same."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Segment, Text
from calumma.platform.cluster.progress import no_progress
from calumma.platform.curation import curate, source_job
from calumma.platform.curation.curate import TooMuchBadInput
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps.chain import StepChain, order_pair
from calumma.platform.curation.steps.filters import Dropped
from calumma.platform.shards.documents import read_documents
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.notes import Notes
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import MANIFEST, Manifest


class Recorder:
    """What a job logs."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.images: dict[str, PILImage.Image] = {}
        self.artifacts: dict[str, bytes] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_image(self, image: PILImage.Image, path: str) -> None:
        self.images[path] = image

    def log_artifact(self, local_path: str | Path, folder: str | None = None) -> None:
        self.artifacts[Path(local_path).name] = Path(local_path).read_bytes()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks run in this process; the list names the sources that were worked on."""
    return run_here(monkeypatch)


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    worked: list[str] = []

    def in_order(tasks: Sequence[Any], work: Any, resources: Any, arguments: Any = None) -> Iterator[Any]:
        function = work(**arguments) if isinstance(work, type) else work
        for task in tasks:
            worked.append(Path(task["output"]).name)
            yield json.loads(json.dumps(function(json.loads(json.dumps(task)))))

    monkeypatch.setattr(curate, "map_in_order", in_order)
    return worked


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade % 256, shade // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(number: int, image: bytes | None = None) -> list[tuple[str, bytes]]:
    return [(f"{number:04d}.png", image or png(number)), (f"{number:04d}.txt", f"number {number}".encode())]


def raw(root: Path, pairs: int = 60) -> None:
    """Two sources: pairs in two tars, and texts of growing length."""
    half = pairs // 2
    write_tar(root / "raw/pairs/a.tar", [member for n in range(half) for member in pair(n)])
    write_tar(root / "raw/pairs/b.tar", [member for n in range(half, pairs) for member in pair(n)])
    write_lines(root / "raw/text.jsonl", [{"text": f"text {n}: " + "more words " * n} for n in range(30)])


def curation(root: Path, **fields: Any) -> CurateSpecification:
    values: dict[str, Any] = {
        "storage": str(root),
        "sources": [
            {"name": "pairs", "format": "webdataset", "location": "raw/pairs"},
            {"name": "text", "format": "jsonl", "location": "raw/text.jsonl"},
        ],
        "documents_per_shard": 25,
        **fields,
    }
    return CurateSpecification.model_validate(values)


def run_curate(spec: CurateSpecification) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return curate.run(spec, recorder, no_progress), recorder  # type: ignore[arg-type]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- one document ------------------------------------------------------------------------------------------------------


def test_a_pair_is_turned_by_its_content_and_keeps_its_caption() -> None:
    image = Image(png(1), "seven")
    assert order_pair(Document((image,)), 0, 1.0).segments == (image, Text("seven"))
    assert order_pair(Document((image,)), 0, 0.0).segments == (Text("seven"), image)


def prepare(document: Document, spec: CurateSpecification) -> Document | Dropped | BadInput:
    result = StepChain(spec, "text")(document)
    if isinstance(result, BadInput):
        return result
    return result.dropped or order_pair(result.document, spec.seed, spec.image_first)


@given(st.integers(0, 1000), st.floats(0.2, 0.8))
def test_image_first_is_a_share_of_the_pairs(seed: int, share: float) -> None:
    documents = [Document((Image(b"image %d" % n, "x"),)) for n in range(400)]
    turned = [order_pair(document, seed, share) for document in documents]
    assert turned == [order_pair(document, seed, share) for document in documents]
    first = sum(isinstance(document.segments[0], Image) for document in turned) / 400
    assert abs(first - share) < 0.13  # five standard deviations


@pytest.mark.parametrize(
    "segments",
    [
        (Image(png(1)),),
        (Text("a"), Image(png(1), "b")),
        (Image(png(1), "a"), Image(png(2), "b")),
        (Text("Draw.", "user"), Image(png(1), "a", "assistant")),
    ],
)
def test_everything_but_a_pair_keeps_its_order(tmp_path: Path, segments: tuple[Segment, ...]) -> None:
    document = Document(segments)
    assert prepare(document, curation(tmp_path, image_first=0.0)) == document


def test_white_space_beside_an_image_of_the_same_speaker_is_layout(tmp_path: Path) -> None:
    page = Document((Text("  three "), Image(png(1)), Text(" "), Image(png(2)), Text("\nend ")))
    kept = prepare(page, curation(tmp_path))
    assert isinstance(kept, Document)
    assert kept.segments == (Text("  three"), Image(png(1)), Image(png(2)), Text("end "))
    chat = Document((Text("Draw ", "user"), Image(png(1), None, "assistant")))
    assert prepare(chat, curation(tmp_path)) == chat


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (Document(()), "empty"),
        (Document((Text(" ab \n"),)), "shorter than 3 characters"),
        (Document((Text("hello?", "user"),)), "conversation without an answer"),
        (Document((Text("a?", "user"), Text("b", "assistant", trained=False))), "conversation without an answer"),
    ],
)
def test_unwanted_documents_are_dropped_with_a_reason(tmp_path: Path, document: Document, reason: str) -> None:
    assert prepare(document, curation(tmp_path, min_text=3)) == Dropped(reason)


@pytest.mark.parametrize(
    ("segments", "name", "said"),
    [
        ((Image(b"no image", "x"),), "a.tar: 1.png", "not a readable image"),
        ((Image(png(1)[:48], "x"),), "a.tar: 1.png", "not a readable image"),
        ((Image(png(1)), Image(b"no image")), "a.tar: 1.png, image 1", "not a readable image"),
        ((Text("lone \ud800"),), "a.tar: 1.png", "not valid Unicode"),
    ],
)
def test_what_cannot_be_decoded_is_bad_input(tmp_path: Path, segments: Any, name: str, said: str) -> None:
    result = prepare(Document(segments, metadata={"name": "a.tar: 1.png"}), curation(tmp_path))
    assert isinstance(result, BadInput)
    assert result.name == name
    assert said in result.reason


# -- curate ------------------------------------------------------------------------------------------------------------


def test_curated_documents_are_published_by_source_and_as_a_whole(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    spec = curation(tmp_path)
    manifest, recorder = run_curate(spec)
    documents = list(read_documents(f"{tmp_path}/curated/pairs"))
    assert [d.images[0].caption for d in documents] == [f"number {n}" for n in range(60)]
    assert [d.text for d in documents] == [f"number {n}" for n in range(60)]
    assert {d.source for d in documents} == {"pairs"}
    image_first = sum(isinstance(d.segments[0], Image) for d in documents)
    assert 0 < image_first < 60

    assert list(read_documents(f"{tmp_path}/curated")) == [*documents, *read_documents(f"{tmp_path}/curated/text")]
    assert manifest == Manifest.read(f"{tmp_path}/curated")
    assert [entry.rows for entry in Manifest.read(f"{tmp_path}/curated/pairs").files] == [25, 5, 25, 5]
    for folder in ("", "/pairs", "/text"):
        Manifest.read(f"{tmp_path}/curated{folder}").verify(f"{tmp_path}/curated{folder}", content=True)

    report = manifest.report["sources"]["pairs"]
    assert (report["read"], report["kept"], report["dropped"], report["bad"], report["images"]) == (60, 60, {}, 0, 60)
    assert report["image_first"] == image_first
    assert report["characters"] == sum(len(d.text) for d in documents)
    assert recorder.metrics["pairs/kept"] == 60
    assert recorder.metrics["text/kept"] == 30
    sheet = recorder.images["samples/pairs.png"]
    assert len(recorder.images) == 1
    assert recorder.artifacts["report.html"] == (tmp_path / "curated/report.html").read_bytes()
    assert not list(tmp_path.glob("curated/.*"))
    assert (np.asarray(sheet) == (7, 0, 99)).all(axis=-1).sum() == 72 * 72  # the eighth picture, at its size


def test_equal_specifications_make_equal_bytes(tmp_path: Path, here: list[str]) -> None:
    for name in ("one", "two"):
        raw(tmp_path / name)
        run_curate(curation(tmp_path / name))
    one, two = (
        {name.rpartition("-")[2]: data for name, data in files_below(tmp_path / n / "curated/pairs").items()}
        for n in ("one", "two")
    )
    one.pop(MANIFEST), two.pop(MANIFEST)
    assert one == two
    assert one


def test_bad_input_is_skipped_counted_and_named(
    tmp_path: Path, here: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    raw(tmp_path)
    write_tar(tmp_path / "raw/pairs/c.tar", [*pair(100), *pair(101, b"no image"), *pair(102)])
    whole = (tmp_path / "raw/pairs/b.tar").read_bytes()
    (tmp_path / "raw/pairs/b.tar").write_bytes(whole[:20_000])
    manifest, recorder = run_curate(curation(tmp_path, max_bad_share=0.1))

    captions = [d.images[0].caption for d in read_documents(f"{tmp_path}/curated/pairs")]
    kept = len(captions) - 32  # of b.tar, which is cut
    assert captions == [f"number {n}" for n in [*range(30 + kept), 100, 102]]
    assert 0 < kept < 30
    report = manifest.report["sources"]["pairs"]
    assert report["bad"] == recorder.metrics["pairs/bad"] == 2
    assert report["bad_share"] == 2 / (len(captions) + 2)
    truncated, unreadable = report["bad_inputs"]
    assert truncated["name"].startswith(f"{tmp_path}/raw/pairs/b.tar")
    assert "breaks off" in truncated["reason"]
    assert unreadable["name"] == f"{tmp_path}/raw/pairs/c.tar: 0101.png"

    (warning,) = caplog.messages
    first, *named = warning.splitlines()
    assert first == "source 'pairs': 2 unreadable, skipped:"
    assert named == [f"  {bad['name']}: {bad['reason']}" for bad in (truncated, unreadable)]


def test_a_message_about_bad_input_names_the_first_of_it() -> None:
    report = {"bad": 300, "bad_inputs": [{"name": f"a.tar: {n}.png", "reason": "torn"} for n in range(200)]}
    told = source_job.describe_skipped("pairs", report)
    assert told is not None
    assert told.splitlines()[5:] == ["  a.tar: 4.png: torn", "  and 295 more (see bad_inputs in the source's manifest)"]
    assert source_job.describe_skipped("pairs", {"bad": 0, "bad_inputs": []}) is None


def test_what_is_not_read_is_told_by_name() -> None:
    notes = Notes()
    notes.skip("members", ".cls", 2)
    notes.lack("caption", 6)
    notes.warn("a.jsonl.gz", "512 bytes of zeros after its end")
    told = source_job.describe_skipped("pairs", {"read": 7, "bad": 0, **notes.report()})
    assert told is not None
    assert told.splitlines() == [
        "source 'pairs': 1 read in spite of a fault:",
        "  a.jsonl.gz: 512 bytes of zeros after its end",
        "source 'pairs': members not read: .cls (2)",
        "source 'pairs': 6 of 7 documents have no caption",
    ]


@pytest.mark.parametrize("phases", [False, True])
def test_images_that_records_refer_to_are_read_and_others_are_counted(
    tmp_path: Path, here: list[str], phases: bool
) -> None:
    folder = tmp_path / os.fsdecode(b"raw \xe9")  # a name that is no UTF-8
    for name in ("img/1.png", "img/2.PNG", "unused.png", "notes.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(len(name)))
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "this"}]
    write_lines(
        folder / "a.jsonl", [{"image": f"img/{n}", "conversations": turns} for n in ("1.png", "./2.PNG", "1.png")]
    )
    source = {"name": "turns", "format": "conversations", "location": "raw*"}
    run_curate(curation(tmp_path, sources=[source], **({"duplicates": {}} if phases else {})))
    report = Manifest.read(str(tmp_path / "curated/turns")).report
    assert report["unread"] == {"files": {".png": 1, ".txt": 1}}
    assert report["files_ignored"] == 2


def test_too_much_bad_input_publishes_nothing_of_that_source(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    write_tar(tmp_path / "raw/pairs/c.tar", pair(101, b"no image"))
    with pytest.raises(TooMuchBadInput) as error:
        run_curate(curation(tmp_path))
    assert "source 'pairs': 1.64% of the input is unreadable (1 bad, 60 read)" in str(error.value)
    assert "max_bad_share allows (1.00%)" in str(error.value)
    assert f"{tmp_path}/raw/pairs/c.tar: 0101.png: not a readable image" in str(error.value)
    assert not files_below(tmp_path / "curated/pairs")
    assert Manifest.find(f"{tmp_path}/curated") is None

    # The other source stands: mending the bad file leads to work on this one only.
    (tmp_path / "raw/pairs/c.tar").unlink()
    here.clear()
    manifest, _ = run_curate(curation(tmp_path))
    assert set(here) == {"pairs"}
    assert set(manifest.report["sources"]) == {"pairs", "text"}


def test_a_file_that_cannot_be_read_at_all_counts_by_its_bytes(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    size = sum(p.stat().st_size for p in (tmp_path / "raw/pairs").iterdir())
    (tmp_path / "raw/pairs/c.tar").write_bytes(b"\xff" * size)
    with pytest.raises(TooMuchBadInput, match=r"50\.00% of the input is unreadable \(1 bad, 60 read\)"):
        run_curate(curation(tmp_path, max_bad_share=0.4))


def test_a_source_without_documents_is_an_error(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    with pytest.raises(TooMuchBadInput, match=r"'text': no document is left of 30 read \(30 shorter than 9999"):
        run_curate(curation(tmp_path, min_text=9999))


def test_a_changed_specification_replaces_what_was_published(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    run_curate(curation(tmp_path))
    before = set(files_below(tmp_path / "curated/pairs"))
    run_curate(curation(tmp_path, documents_per_shard=7))
    after = set(files_below(tmp_path / "curated/pairs"))
    assert before & after == {MANIFEST}
    assert {entry.path for entry in Manifest.read(f"{tmp_path}/curated/pairs").files} == after - {MANIFEST}


def test_other_content_of_an_equal_size_gets_shards_of_other_names(tmp_path: Path, here: list[str]) -> None:
    """What an interrupted run has finished is found by these names."""
    raw(tmp_path)
    run_curate(curation(tmp_path))
    before = set(files_below(tmp_path / "curated/pairs"))
    tar = next((tmp_path / "raw/pairs").glob("*.tar"))
    tar.write_bytes(tar.read_bytes())
    run_curate(curation(tmp_path))
    assert before & set(files_below(tmp_path / "curated/pairs")) == {MANIFEST}


def test_a_published_source_is_kept_unless_a_file_of_it_is_gone(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    manifest, _ = run_curate(curation(tmp_path))
    here.clear()
    assert run_curate(curation(tmp_path))[0] == manifest
    assert here == []
    (tmp_path / "curated" / manifest.files[-1].path).unlink()
    assert run_curate(curation(tmp_path))[0] == manifest
    assert here == ["text"]


def test_changed_input_is_curated_again_and_no_other_file_is_touched(tmp_path: Path, here: list[str]) -> None:
    raw(tmp_path)
    # The source's output is where its input is: shards come beside it.
    spec = curation(tmp_path, output="raw")
    run_curate(spec)
    (tmp_path / "raw" / MANIFEST).unlink()
    write_tar(tmp_path / "raw/pairs/c.tar", pair(100))
    here.clear()
    manifest, _ = run_curate(spec)
    assert set(here) == {"pairs"}
    assert manifest.report["sources"]["pairs"]["kept"] == 61
    kept = {entry.path for entry in Manifest.read(f"{tmp_path}/raw/pairs").files}
    assert set(files_below(tmp_path / "raw/pairs")) == {"a.tar", "b.tar", "c.tar", MANIFEST, *kept}


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("raw/nowhere", "there is nothing at that location"),
        ("raw/other", r"there are 1 other files, such as notes\.md"),
    ],
)
def test_a_source_without_files_says_what_is_there(tmp_path: Path, location: str, said: str) -> None:
    raw(tmp_path)
    (tmp_path / "raw/other").mkdir()
    (tmp_path / "raw/other/notes.md").write_text("x")
    source = {"name": "digits", "format": "webdataset", "location": location}
    with pytest.raises(
        SpecificationError, match=rf"source 'digits' \(webdataset\): no \*\.tar or .* files at .*{said}"
    ):
        run_curate(curation(tmp_path, sources=[source]))
