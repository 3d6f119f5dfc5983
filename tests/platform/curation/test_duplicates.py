"""Duplicates and evaluation sets: what counts as alike, and that the division of the work does not matter."""

from __future__ import annotations

import io
import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageDraw

from calumma.model.document import Document, Image, Text
from calumma.platform.curation.specification import Decontamination, DuplicateRules, NearDuplicates
from calumma.platform.curation.steps import decontaminate, duplicates, signatures, staging
from calumma.platform.curation.steps.filters import Dropped
from calumma.platform.curation.steps.words import hashes, ngrams, words
from calumma.platform.shards import documents as document_shards
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import FileEntry, Manifest

VOCABULARY = [f"word{n}" for n in range(4000)]


def text(content: str) -> Document:
    return Document((Text(content),))


def prose(seed: int, length: int = 200) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def drawing(seed: int, side: int = 96) -> PILImage.Image:
    """Some overlapping shapes; equal seeds give equal pictures at any size."""
    chosen = random.Random(seed)
    image = PILImage.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        corners = sorted(chosen.random() * side for _ in range(2)), sorted(chosen.random() * side for _ in range(2))
        colour = tuple(chosen.randrange(256) for _ in range(3))
        draw.ellipse((corners[0][0], corners[1][0], corners[0][1] + 2, corners[1][1] + 2), fill=colour)
    return image


def encoded(image: PILImage.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def found(
    root: Path, documents: Sequence[Document], rules: dict[str, Any], files: int = 1
) -> dict[int, tuple[str, int]]:
    """Number of each dropped document -> (kind, number of the one it is like), with the signatures in some files."""
    checked = DuplicateRules.model_validate(rules)
    rows: dict[str, int] = {}
    for part in range(files):
        spool = duplicates.SignatureWriter(str(root), f"part{part}")
        for number in range(part, len(documents), files):
            spool.add(documents[number], number, checked)
        spool.flush()
        rows = {kind: rows.get(kind, 0) + count for kind, count in spool.written.items()}
    for task in duplicates.comparison_tasks(str(root), str(root), checked, rows):
        duplicates.find_duplicates(json.loads(json.dumps(task)))
    return {n: (d.kind, d.of) for n, d in duplicates.read_duplicates(str(root), 0, len(documents)).items()}


# -- equal -------------------------------------------------------------------------------------------------------------


def test_documents_are_equal_whatever_their_case_and_white_space(tmp_path: Path) -> None:
    documents = [text("Some  Words\n"), text("some words"), text("some word s"), text("ﬁne"), text("fine")]
    assert found(tmp_path, documents, {}) == {1: ("exact", 0), 4: ("exact", 3)}


def test_roles_images_and_order_are_part_of_the_content(tmp_path: Path) -> None:
    one, two = Image(encoded(drawing(1))), Image(encoded(drawing(2)))
    different = [
        Document((Text("a"), one)),
        Document((one, Text("a"))),
        Document((Text("a"), two)),
        Document((Text("a", "user"), one)),
        Document((Image(encoded(drawing(1)), "a"),)),
        Document((Text("a"), Text("b"))),
        Document((Text("ab"),)),
    ]
    assert found(tmp_path, [*different, different[2]], {}) == {7: ("exact", 2)}


def test_only_asked_for_likeness_is_looked_for(tmp_path: Path) -> None:
    assert found(tmp_path, [text("a"), text("a")], {"exact": False}) == {}


# -- similar texts -----------------------------------------------------------------------------------------------------


def test_near_duplicates_are_dropped_and_others_stay(tmp_path: Path) -> None:
    """Of texts with 2 % changed words (Jaccard about 0.9) nearly all go, of those with half changed none."""
    documents, near, far = [], [], []
    for seed in range(40):
        original = prose(seed)
        documents.append(text(" ".join(original)))
        for changes, numbers in ((2, near), (20, far)):
            copy = list(original)
            for place in random.Random(seed).sample(range(len(copy)), changes):
                copy[place] = "changed"
            numbers.append(len(documents))
            documents.append(text(" ".join(copy)))
    gone = found(tmp_path, documents, {"near": {}})
    assert sum(gone.get(number) == ("near", number - 1) for number in near) >= 38
    assert set(gone) <= set(near)


@given(st.integers(0, 100), st.integers(0, 60))
def test_a_sketch_estimates_similarity(seed: int, changes: int) -> None:
    rules = NearDuplicates(permutations=256)
    one, two = prose(seed), prose(seed)
    for place in random.Random(seed + 1).sample(range(len(two)), changes):
        two[place] = "changed"
    runs = [set(ngrams(hashes(w), rules.words).tolist()) for w in (one, two)]
    jaccard = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    sketches = []
    for content in (one, two):
        signature = signatures.minhash(text(" ".join(content)), rules)
        assert signature is not None
        sketches.append(np.frombuffer(signatures.sketch(signature), np.uint8))
    assert len(sketches[0]) == rules.permutations // 2
    estimate = signatures.similarity(sketches[0], sketches[1][None])[0]
    assert abs(estimate - jaccard) < 0.16  # over four standard deviations of 256 values


def test_images_count_as_words_of_a_page(tmp_path: Path) -> None:
    def page(*seeds: int) -> Document:
        parts = [s for n, seed in enumerate(seeds) for s in (Text(f"part {n}"), Image(encoded(drawing(seed))))]
        return Document(tuple(parts))

    documents = [page(1, 2, 3, 4, 5), page(6, 7, 8, 9, 10), page(1, 2, 3, 4, 5)]
    assert found(tmp_path, documents, {"exact": False, "near": {}}) == {2: ("near", 0)}


def test_short_texts_and_captions_are_never_near_duplicates(tmp_path: Path) -> None:
    pairs = [Document((Image(encoded(drawing(n)), "one caption that stands at many images"),)) for n in range(2)]
    assert found(tmp_path, [text("four words are few"), text("four words are few!"), *pairs], {"near": {}}) == {}


# -- similar images ----------------------------------------------------------------------------------------------------


def test_scaled_and_compressed_images_are_duplicates(tmp_path: Path) -> None:
    documents = [Document((Image(encoded(drawing(seed)), f"first {seed}"),)) for seed in range(8)]
    again = [
        encoded(drawing(0).resize((200, 200))),
        encoded(drawing(1), "JPEG", quality=60),
        encoded(drawing(2).resize((64, 64)), "WEBP"),
    ]
    documents += [Document((Image(data, "later"),)) for data in again]
    assert found(tmp_path, documents, {"images": {}}) == {n + 8: ("images", n) for n in range(3)}


def test_images_of_pages_and_conversations_may_repeat(tmp_path: Path) -> None:
    image = Image(encoded(drawing(0)))
    documents = [Document((image, Text(f"page {n}"))) for n in range(2)]
    documents += [
        Document((Text(f"{n}?", "user"), Image(encoded(drawing(0)), None, "user"), Text("yes", "assistant")))
        for n in range(2)
    ]
    assert found(tmp_path, documents, {"images": {}, "near": {}}) == {}


@given(st.integers(0, 2**64 - 1), st.integers(0, 10), st.data())
def test_hashes_within_the_distance_always_share_a_key(value: int, distance: int, data: st.DataObject) -> None:
    flips = data.draw(st.sets(st.integers(0, 63), max_size=distance))
    other = value ^ sum(1 << bit for bit in flips)
    assert set(signatures.image_keys(value, distance)) & set(signatures.image_keys(other, distance))


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=40), st.integers(0, 3))
def test_images_close_to_any_earlier_one_go(drawn: list[tuple[int, int]], distance: int) -> None:
    """Compared with what the definition says, over hashes that are 0 to 3 bits from one of eight."""
    chosen = random.Random(7)
    centres = [chosen.getrandbits(64) for _ in range(8)]
    values = [centres[c] ^ ((1 << flips) - 1) for c, flips in drawn]
    rows = [(key, n, value) for n, value in enumerate(values) for key in signatures.image_keys(value, distance)]
    rows.sort()
    keys, ids, column = (np.array(part, np.uint64) for part in zip(*rows, strict=True))
    gone = set()
    for group in duplicates._groups(keys):
        dropped, of = duplicates._similar_images(ids[group], column[group], distance)
        assert all(earlier < later for earlier, later in zip(of, dropped, strict=True))
        gone |= {int(number) for number in dropped}
    expected = {
        n for n, value in enumerate(values) if any((value ^ other).bit_count() <= distance for other in values[:n])
    }
    assert gone == expected


# -- however the work is divided ---------------------------------------------------------------------------------------


def test_the_same_documents_go_however_the_work_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = random.Random(3)
    documents = []
    for n in range(60):
        content = prose(chosen.randrange(25), 60)
        if chosen.random() < 0.5:
            content[chosen.randrange(60)] = f"changed{n}"
        documents.append(text(" ".join(content)))
        documents.append(Document((Image(encoded(drawing(chosen.randrange(20), 64 + n)), f"caption {n}"),)))
    rules = {"near": {}, "images": {}}
    whole = found(tmp_path / "one", documents, rules)
    assert {kind for kind, _ in whole.values()} == {"exact", "near", "images"}
    for files, rows_a_task, rows_a_file in ((4, 100, 50), (3, 37, 10**9)):
        monkeypatch.setattr(duplicates, "ROWS_PER_TASK", rows_a_task)
        monkeypatch.setattr(duplicates, "ROWS_PER_FILE", rows_a_file)
        assert found(tmp_path / f"{files}", documents, rules, files) == whole


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.lists(st.integers(0, 2**64), min_size=1, max_size=4))
def test_ranges_of_a_table_give_every_row_once(keys: list[int], cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/table"
        staging.write_table(uri, {"key": keys, "id": list(range(len(keys)))})
        edges = [0, *sorted(cuts), 1 << 64]
        read: list[tuple[int, int]] = []
        for low, high in itertools.pairwise(edges):
            if part := staging.read_tables([uri], low, high):
                assert all(low <= key < high for key in part["key"].tolist())
                read += zip(part["key"].tolist(), part["id"].tolist(), strict=True)
    assert sorted(read) == sorted(zip(keys, range(len(keys)), strict=True))


# -- evaluation sets ---------------------------------------------------------------------------------------------------

QUESTION = "Which of these rivers flows through the largest number of capital cities in Europe?"


def overlap(tmp_path: Path, against: str, document: Document, **fields: Any) -> str | None:
    rules = Decontamination.model_validate({"against": [against], **fields})
    index = f"{tmp_path}/index.npz"
    decontaminate.build_index({"rules": rules.model_dump(mode="json"), "against": [against], "index": index})
    decontaminate._read_index.cache_clear()
    result = decontaminate.overlap_rule(rules, ["the test"], index)(document)
    return result.reason if isinstance(result, Dropped) else None


def test_documents_with_thirteen_words_of_an_evaluation_set_go(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": {"text": QUESTION}, "choices": ["Danube", "Rhine"]}) + "\n")
    uri = f"{tmp_path}/test.jsonl"
    inside = "Quiz night! " + QUESTION.upper().replace(" ", "\n") + " Danube, of course."
    assert overlap(tmp_path, uri, text(inside)) == "13 words of the test"
    assert overlap(tmp_path, uri, Document((Image(encoded(drawing(0)), QUESTION),))) == "13 words of the test"
    cut = " ".join(QUESTION.split()[:12])
    assert overlap(tmp_path, uri, text(cut + " the world")) is None
    assert overlap(tmp_path, uri, text(cut + " the world"), ngram=10) == "10 words of the test"
    assert overlap(tmp_path, uri, text("The Danube and the Rhine")) is None


def test_evaluation_texts_shorter_than_the_run_count_whole(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("A dog catches a yellow ball on the beach\n\nToo short to count\n")
    uri = f"{tmp_path}/test.txt"
    assert overlap(tmp_path, uri, text("Look: a dog catches a yellow ball on the beach!")) == "9 words of the test"
    assert overlap(tmp_path, uri, text("a dog catches a yellow ball on the lawn")) is None
    assert overlap(tmp_path, uri, text("this is too short to count")) is None
    assert overlap(tmp_path, uri, text("a dog catches a yellow ball on the beach"), shortest=10, ngram=9) is not None


def test_curated_evaluation_sets_count_with_their_images(tmp_path: Path) -> None:
    picture = Image(encoded(drawing(5)))
    data = document_shards.to_parquet([Document((picture, Text(QUESTION))), text("x")])
    (tmp_path / "set").mkdir()
    (tmp_path / "set/documents.parquet").write_bytes(data)
    Manifest(kind=document_shards.CURATED, files=[FileEntry.from_bytes("documents.parquet", data, rows=2)]).write(
        f"{tmp_path}/set"
    )
    copy = Document((Image(encoded(drawing(5).resize((150, 150)), "JPEG")), Text("something else")))
    uri = f"{tmp_path}/set"
    assert overlap(tmp_path, uri, text(QUESTION)) == "13 words of the test"
    assert overlap(tmp_path, uri, copy) is None
    assert overlap(tmp_path, uri, copy, image_distance=4) == "image of the test"
    assert overlap(tmp_path, uri, Document((Image(encoded(drawing(6))),)), image_distance=4) is None
    assert overlap(tmp_path, uri, text("no image at all"), image_distance=4) is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"q": "short"}\n', "holds no text of 8 words or more"),
        ("a.jsonl", '{"q": \n', r"a\.jsonl: line 1 is no JSON"),
        ("a.csv", "q\n", r"is no curated directory, and there are no \.jsonl or \.json or \.txt files"),
    ],
)
def test_evaluation_sets_that_are_none_are_told(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SpecificationError, match=said):
        overlap(tmp_path, f"{tmp_path}/{name}", text("x"))


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_equal_runs_of_words_and_no_others_have_equal_hashes(items: list[str], length: int) -> None:
    runs = [tuple(items[n : n + length]) for n in range(len(items) - length + 1)]
    hashed = ngrams(hashes(items), length).tolist()
    assert len(hashed) == len(runs)
    assert len(set(zip(runs, hashed, strict=True))) == len(set(runs)) == len(set(hashed))


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words("Don't STOP, café—№5! 日本 x_y") == ["don", "t", "stop", "café", "no5", "日", "本", "x_y"]
