"""The quickstart's documents: split by scan, in formats the curation reads without a complaint, equal when repeated."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from scipy import ndimage

from calumma.jobs.quickstart import conversations, digits, documents
from calumma.jobs.quickstart.digits import WORDS
from calumma.model.document import Document, Image
from calumma.platform import storage
from calumma.platform.sources import files, reading
from calumma.platform.storage.manifest import MANIFEST, Manifest

CONVERSATIONS = ("chat_recognition", "chat_drawing", "chat_counting", "chat_text")
ASKED = ("ask_recognition", "ask_drawing", "ask_counting")
FORMATS = {
    **dict.fromkeys(("scans_train", "scans_held_out", "pairs"), "webdataset"),
    **dict.fromkeys(("text", "text_held_out", "code"), "jsonl"),
    "pages": "interleaved",
    **dict.fromkeys((*CONVERSATIONS, *ASKED), "conversations"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    documents.write_documents(str(folder), fast=True)
    return folder / "documents"


def read(root: Path, source: str) -> list[Document]:
    """Documents of a source; a bad input is a failure."""
    found, ignored = reading.list_source(FORMATS[source], str(root / source))
    assert not ignored
    items = [item for uri in found for item in reading.read_file(FORMATS[source], source, uri)]
    assert not [item for item in items if isinstance(item, files.BadInput)]
    return [item for item in items if isinstance(item, Document)]


def pictures(root: Path, source: str) -> set[bytes]:
    return {image.open().tobytes() for document in read(root, source) for image in document.images}


def test_scans_are_split_stratified_and_for_good() -> None:
    scans = digits.read_scans()
    assert len(scans) == 1797
    train, held_out = digits.split(scans, seed=0)
    assert {s.number for s in train}.isdisjoint({s.number for s in held_out})
    assert len(train) + len(held_out) == len(scans)
    away, whole = Counter(s.digit for s in held_out), Counter(s.digit for s in scans)
    assert all(0.18 < away[d] / whole[d] < 0.22 for d in range(10))
    again = digits.split(scans, seed=0)[1]
    assert [s.number for s in again] == [s.number for s in held_out]
    assert [s.number for s in digits.split(scans, seed=1)[1]] != [s.number for s in held_out]


def test_a_scan_is_white_ink_on_black_at_32_pixels() -> None:
    scan = digits.read_scans()[0]
    with PILImage.open(io.BytesIO(scan.png())) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "L")
        grey = np.asarray(picture)
    assert grey[:, 0].max() < 64  # a margin of ground
    assert grey.max() > 200


def test_a_moved_scan_is_another_picture_of_the_same_ink() -> None:
    scan = digits.read_scans()[5]
    moved = scan.augmented(np.random.default_rng(0))
    assert (moved.number, moved.digit) == (scan.number, scan.digit)
    assert not np.array_equal(moved.ink_HW, scan.ink_HW)
    assert moved.ink_HW.min() >= 0
    assert moved.ink_HW.max() <= 1
    assert abs(moved.ink_HW.sum() / scan.ink_HW.sum() - 1) < 0.35  # by 1.14 in both directions it has 1.3 times as much


def test_moved_scans_stay_in_the_middle_and_as_large_on_average() -> None:
    scan, random = digits.read_scans()[5], np.random.default_rng(0)
    moved = [scan.augmented(random).ink_HW for _ in range(300)]
    middle = np.array(ndimage.center_of_mass(scan.ink_HW))
    shifts = np.array([ndimage.center_of_mass(ink) for ink in moved]) - middle
    assert np.abs(shifts.mean(0)).max() < 0.3
    assert 1 < np.abs(shifts).max() < 3.5
    assert np.mean([ink.sum() for ink in moved]) == pytest.approx(scan.ink_HW.sum(), rel=0.05)


@pytest.mark.parametrize("source", FORMATS)
def test_every_source_is_readable_and_counted(root: Path, source: str) -> None:
    manifest = Manifest.read(str(root))
    found = read(root, source)
    assert found
    assert manifest.report["documents"][source] == len(found)
    assert all(image.caption for document in found for image in document.images)


def test_manifests_name_every_file(root: Path) -> None:
    manifest = Manifest.read(str(root))
    manifest.verify(str(root), content=True)
    named = {entry.path for entry in manifest.files}
    there = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != MANIFEST}
    assert named == there
    for source in FORMATS:
        Manifest.read(str(root / source)).verify(str(root / source), content=True)


def test_no_held_out_scan_is_in_anything_that_trains(root: Path) -> None:
    held_out = pictures(root, "scans_held_out")
    for source in ("scans_train", "pairs", "pages", *CONVERSATIONS):
        assert pictures(root, source).isdisjoint(held_out), source
    for source in ASKED:
        assert pictures(root, source) <= held_out, source


def test_pairs_hold_every_training_scan_and_its_moved_copies(root: Path) -> None:
    train = pictures(root, "scans_train")
    pairs = pictures(root, "pairs")
    assert train <= pairs
    assert len(pairs) == len(train) * (1 + documents.FAST.copies)
    captions = {image.caption for document in read(root, "pairs") for image in document.images}
    assert all(any(word in (caption or "").split() for word in WORDS) for caption in captions)
    assert len(captions) > len(WORDS)  # several wordings


def test_samples_say_where_they_come_from(root: Path) -> None:
    first = next((root / "pairs").glob("*.tar"))
    with tarfile.open(first) as tar:
        names = tar.getnames()[:3]
        member = tar.extractfile(names[2])
        assert member is not None
        metadata = json.loads(member.read())
    assert [name.rpartition(".")[2] for name in names] == ["png", "txt", "json"]
    assert metadata == {"license": digits.LICENSE, "url": digits.URL}
    assert {document.license for document in read(root, "code")} == {"PSF-2.0"}


def test_pages_count_upwards_with_a_picture_after_each_word(root: Path) -> None:
    for page in read(root, "pages"):
        words = [image.caption for image in page.images]
        places = [WORDS.index(word or "") for word in words]
        assert places == list(range(places[0], places[0] + len(places)))
        assert isinstance(page.segments[-1], Image)
        for before, image in zip(page.segments[::2], page.segments[1::2], strict=True):
            assert isinstance(image, Image)
            assert before.text.split()[-1] == image.caption  # type: ignore[union-attr]


def test_questions_and_answers_agree(root: Path) -> None:
    for conversation in read(root, "ask_recognition"):
        question, answer = list(conversation.turns())
        (image,) = (s for s in question.segments if isinstance(s, Image))
        assert [s.text for s in answer.segments] == [image.caption]  # type: ignore[union-attr]
    for conversation in read(root, "ask_drawing"):
        (image,) = conversation.images
        assert image.role == "assistant"
        assert (image.caption or "") in conversation.text
    for conversation in read(root, "ask_counting"):
        words = [image.caption or "" for image in conversation.images]
        question = next(conversation.turns()).segments[0].text  # type: ignore[union-attr]
        assert f"from {words[0]} to {words[-1]}," in question
    assert all(len(list(c.turns())) == 2 for c in read(root, "chat_text"))


def test_counts_stay_within_five_digits_and_the_article_fits() -> None:
    spans = conversations.counting_ranges()
    assert (0, 1) in spans
    assert (5, 9) in spans
    assert all(1 <= last - first <= 4 and last <= 9 for first, last in spans)
    assert [conversations.with_article(w) for w in ("eight", "seven")] == ["an eight", "a seven"]


def test_writing_again_gives_equal_bytes_and_clears_what_is_stale(root: Path) -> None:
    before = Manifest.read(str(root))
    stale = root / "pairs" / "pairs-00099.tar"
    stale.write_bytes(b"left over")
    progress: list[tuple[float, float]] = []
    documents.write_documents(
        str(root.parent), fast=True, progress=lambda done, total, note="": progress.append((done, total))
    )
    assert Manifest.read(str(root)) == before
    assert not stale.exists()
    assert progress[-1][0] == progress[-1][1]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_documents_go_to_object_storage_too(s3: str) -> None:
    manifest = documents.write_documents(s3, fast=True)
    manifest.verify(storage.join(s3, "documents"))
