"""The public benchmarks' own training files, laid out and written as their publishers' pages describe them."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import list_source, read_source, require_files
from calumma.platform.sources.specification import Source


def jpg(shade: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (16, 8), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


def read(
    format: str, location: Path, notes: Notes | None = None, images: str | None = None, **options: Any
) -> list[Any]:
    source = Source(name="s", format=format, location=str(location), images=images, options=options)
    return [item for uri in require_files(source)[0] for item in read_source(source, uri, notes=notes)]


def pairs(items: list[Document | BadInput]) -> list[tuple[bytes, str | None]]:
    assert not [item for item in items if isinstance(item, BadInput)], items
    found = [item.segments[0] for item in items if isinstance(item, Document)]
    return [(s.data, s.caption) for s in found if isinstance(s, Image) and isinstance(s.data, bytes)]


def bad(items: list[Document | BadInput]) -> list[str]:
    return [item.reason for item in items if isinstance(item, BadInput)]


# -- COCO Captions


def coco() -> dict[str, Any]:
    license = {"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}
    image = {"license": 4, "height": 8, "width": 16, "date_captured": "2013-11-15 02:41:42", "flickr_url": "http://f/9"}
    return {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [license],
        "images": [
            {**image, "id": 9, "file_name": "000000000009.jpg", "coco_url": "http://images/000000000009.jpg"},
            {**image, "id": 25, "file_name": "000000000025.jpg", "coco_url": "http://images/000000000025.jpg"},
        ],
        "annotations": [
            {"image_id": 25, "id": 1, "caption": "A giraffe.\n"},
            {"image_id": 9, "id": 2, "caption": "Closeup of bins of food."},
            {"image_id": 9, "id": 3, "caption": "A meal."},
        ],
    }


COCO_FILES = {"train2017/000000000009.jpg": jpg(9), "train2017/000000000025.jpg": jpg(25)}


@pytest.mark.parametrize("where", ["the whole", "the annotations, and the images"])
def test_every_caption_of_coco_is_a_pair(tmp_path: Path, where: str) -> None:
    files = {"annotations/captions_train2017.json": coco(), "annotations/instances_train2017.json": {}, **COCO_FILES}
    write(tmp_path, files)
    if where == "the whole":
        items = read("coco_captions", tmp_path)
        assert list(list_source("coco_captions", str(tmp_path))[1]) == [
            str(tmp_path / "annotations/instances_train2017.json")
        ]
    else:
        annotations = tmp_path / "annotations/captions_train2017.json"
        items = read("coco_captions", annotations, images=str(tmp_path / "train2017"))
    assert pairs(items) == [(jpg(9), "Closeup of bins of food."), (jpg(9), "A meal."), (jpg(25), "A giraffe.")]
    assert (items[0].license, items[0].url) == ("Attribution License", "http://images/000000000009.jpg")


def test_of_cocos_captions_the_first_may_do(tmp_path: Path) -> None:
    notes = Notes()
    write(tmp_path, {"annotations/captions_train2017.json": coco(), **COCO_FILES})
    items = read("coco_captions", tmp_path, notes, captions="first")
    assert [caption for _, caption in pairs(items)] == ["Closeup of bins of food.", "A giraffe."]
    assert notes.unread == {"captions": {"beyond an image's first": 1}}


def test_what_is_missing_of_coco_is_named(tmp_path: Path) -> None:
    content = coco()
    content["annotations"] += [{"image_id": 7, "id": 4, "caption": "x"}, {"image_id": 25, "id": 5, "caption": None}]
    write(tmp_path, {"annotations/captions_train2017.json": content, "train2017/000000000009.jpg": jpg(9)})
    reasons = bad(read("coco_captions", tmp_path))
    assert "no image 'train2017/000000000025.jpg'" in reasons[0]
    assert reasons[1:] == ["has no caption", "is of the image 7, which the file does not have"]
    write(tmp_path, {"annotations/captions_train2017.json": {"info": {}}})
    assert bad(read("coco_captions", tmp_path)) == ["has no list `images`; it has info"]


def test_karpathys_splits(tmp_path: Path) -> None:
    def entry(number: int, split: str, *texts: str) -> dict[str, Any]:
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": number, "sentid": i} for i, text in enumerate(texts)
        ]
        return {
            "filename": f"{number}.jpg",
            "filepath": "val2014",
            "split": split,
            "imgid": number,
            "sentences": sentences,
        }

    images = [entry(1, "train", "one", "eins"), entry(2, "test", "two"), entry(3, "restval", "three")]
    files = {f"val2014/{number}.jpg": jpg(number) for number in (1, 2, 3)}
    write(tmp_path, {"dataset_coco.json": {"images": images, "dataset": "coco"}, **files})
    notes = Notes()
    items = read("coco_captions", tmp_path, notes, splits=["train", "restval"])
    assert pairs(items) == [(jpg(1), "one"), (jpg(1), "eins"), (jpg(3), "three")]
    assert notes.unread == {"images": {"of the split test": 1}}


# -- Flickr30k

CAPTIONS = [
    ("1000092795.jpg", ["Two young guys.", 'Two "friends", outside .']),
    ("10002456.jpg", ["Men ( working ) ."]),
]
FLICKR_IMAGES = {f"flickr30k-images/{name}": jpg(n) for n, (name, _) in enumerate(CAPTIONS)}


def token_file(_: Path) -> dict[str, bytes]:
    lines = [f"{name}#{n}\t{text}\n" for name, texts in CAPTIONS for n, text in enumerate(texts)]
    return {"results_20130124.token": "".join(lines).encode()}


def kaggle_table(_: Path) -> dict[str, bytes]:
    lines = [f"{name}| {n}| {text}\n" for name, texts in CAPTIONS for n, text in enumerate(texts)]
    return {"results.csv": "".join(["image_name| comment_number| comment\n", *lines]).encode()}


def hub_table(_: Path) -> dict[str, bytes]:
    import csv

    buffer = io.StringIO()
    rows = [(json.dumps(texts), "[0]", "train", name, n) for n, (name, texts) in enumerate(CAPTIONS)]
    csv.writer(buffer).writerows([("raw", "sentids", "split", "filename", "img_id"), *rows])
    return {"flickr_annotations_30k.csv": buffer.getvalue().encode()}


def karpathy_file(_: Path) -> dict[str, bytes]:
    images = [
        {"filename": name, "split": "train", "imgid": n, "sentences": [{"raw": text} for text in texts]}
        for n, (name, texts) in enumerate(CAPTIONS)
    ]
    return {"dataset_flickr30k.json": json.dumps({"images": images, "dataset": "flickr30k"}).encode()}


def test_the_first_caption_of_an_image_is_that_wherever_the_others_stand(tmp_path: Path) -> None:
    lines = b"1.jpg#0\tone\n2.jpg#0\ttwo\n1.jpg#1\tuno\n2.jpg#1\tdos\n"
    write(tmp_path, {"results.token": lines, "1.jpg": jpg(1), "2.jpg": jpg(2)})
    notes = Notes()
    assert pairs(read("flickr30k", tmp_path, notes, captions="first")) == [(jpg(1), "one"), (jpg(2), "two")]
    assert notes.unread["captions"] == {"beyond an image's first": 2}


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_captions_in_front_of_damage_are_read(tmp_path: Path, kept: float) -> None:
    captions = [random.Random(n).randbytes(40).hex() for n in range(400)]
    packed = gzip.compress("".join(f"1.jpg#{n}\t{words}\n" for n, words in enumerate(captions)).encode())
    write(tmp_path, {"results.token": packed[: int(kept * len(packed))], "1.jpg": jpg(1)})
    items = read("flickr30k", tmp_path)
    found = [words for _, words in pairs([item for item in items if isinstance(item, Document)])]
    assert found == captions[: len(found)]  # none of them is cut
    assert len(found) > 400 * kept * 0.5 or kept < 0.1
    (damage,) = bad(items)
    assert "damaged from here on" in damage


@pytest.mark.parametrize("start", [b"image,caption\n", b""])
def test_captions_that_are_damaged_from_their_beginning_are_told(tmp_path: Path, start: bytes) -> None:
    write(tmp_path, {"captions.txt": gzip.compress(start)[:12] + b"\xff" * 40})
    assert any("damaged" in reason for reason in bad(read("flickr30k", tmp_path)))


@pytest.mark.parametrize("layout", [token_file, kaggle_table, hub_table, karpathy_file])
def test_flickr30k_is_the_same_in_each_of_its_forms(tmp_path: Path, layout: Any) -> None:
    write(tmp_path, {**layout(tmp_path), **FLICKR_IMAGES})
    wanted = [(jpg(n), text) for n, (_, texts) in enumerate(CAPTIONS) for text in texts]
    assert pairs(read("flickr30k", tmp_path)) == wanted
    firsts = [(jpg(n), texts[0]) for n, (_, texts) in enumerate(CAPTIONS)]
    assert pairs(read("flickr30k", tmp_path, captions="first")) == firsts


def test_flickr30ks_captions_are_not_read_twice(tmp_path: Path) -> None:
    write(tmp_path, {**token_file(tmp_path), **kaggle_table(tmp_path), **FLICKR_IMAGES})
    assert len(read("flickr30k", tmp_path)) == 3
    assert list(list_source("flickr30k", str(tmp_path))[1]) == [str(tmp_path / "results.csv")]


def test_a_line_that_is_no_caption_is_bad_alone(tmp_path: Path) -> None:
    files = {"results.token": b"1.jpg#0\tone\nnothing\n1.jpg#1\t \n", "1.jpg": jpg(1)}
    items = read("flickr30k", write(tmp_path, files))
    assert len(items) == 3
    assert bad(items) == ["is not IMAGE#NUMBER, a tab, and a caption"] * 2
    table = b"image_name| comment_number| comment\n1.jpg| 0| one\n1.jpg| 4   A dog runs .\n"
    (tmp_path / "results.token").unlink()
    items = read("flickr30k", write(tmp_path, {"results.csv": table}))
    assert bad(items) == ["has 2 fields; the first line names 3"]


# -- VQAv2

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"


def vqa(*numbers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    head = {"info": {}, "data_subtype": "train2014", "license": {}, "data_type": "mscoco"}
    questions = [{"image_id": 9, "question": f"What is {n}?", "question_id": n} for n in numbers]
    answers = [{"answer": "net", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    annotations = [
        {"question_type": "what is", "multiple_choice_answer": "net", "answers": answers, "image_id": 9,
         "answer_type": "other", "question_id": n} for n in numbers
    ]  # fmt: skip
    return {**head, "task_type": "Open-Ended", "questions": questions}, {**head, "annotations": annotations}


@pytest.mark.parametrize("image", ["train2014/COCO_train2014_000000000009.jpg", "COCO_train2014_000000000009.jpg",
                                   "train2017/000000000009.jpg"])  # fmt: skip
def test_questions_of_vqav2_are_read_with_their_answers(tmp_path: Path, image: str) -> None:
    questions, annotations = vqa(9000, 9001)
    write(tmp_path, {QUESTIONS: questions, ANNOTATIONS: annotations, image: jpg(9)})
    items = read("vqav2", tmp_path, prompt="{question} Answer in a word.")
    picture = Image(jpg(9), None, "user")
    assert [item.segments for item in items] == [
        (picture, Text(f"What is {n}? Answer in a word.", "user"), Text("net", "assistant")) for n in (9000, 9001)
    ]
    assert not list_source("vqav2", str(tmp_path))[1]


def test_questions_and_answers_of_vqav2_are_never_joined_wrongly(tmp_path: Path) -> None:
    questions, annotations = vqa(1, 2)
    annotations["annotations"][0]["question_id"] = 3
    write(tmp_path, {QUESTIONS: questions, ANNOTATIONS: annotations, "COCO_train2014_000000000009.jpg": jpg(9)})
    notes = Notes()
    items = read("vqav2", tmp_path, notes)
    assert bad(items) == ["has no answer among the annotations"]
    assert notes.unread == {"annotations": {"of other questions": 1}}
    (tmp_path / ANNOTATIONS).unlink()
    assert f"{ANNOTATIONS}, are not beside it" in bad(read("vqav2", tmp_path))[0]


# -- MNIST


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def digits(count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images[:count] * 15).astype(np.uint8), found.target[:count]


@pytest.mark.parametrize("names", [("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
                                   ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte")])  # fmt: skip
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_mnists_images_have_their_digit_for_a_caption(tmp_path: Path, names: Sequence[str], packed: str) -> None:
    images, labels = digits()
    pack = gzip.compress if packed else bytes
    write(tmp_path, {names[0] + packed: pack(idx(images)), names[1] + packed: pack(idx(labels))})
    found = pairs(read("mnist", tmp_path))
    assert [caption for _, caption in found] == [str(label) for label in labels]
    for (data, _), image in zip(found, images, strict=True):
        assert np.array_equal(np.asarray(PILImage.open(io.BytesIO(data))), image)
    words = ["zero", "one", "two", "three"]
    assert [caption for _, caption in pairs(read("mnist", tmp_path, names=words))] == words


def test_mnist_unpacked_beside_itself_is_read_once(tmp_path: Path) -> None:
    images, labels = digits()
    files = {"train-images-idx3-ubyte": idx(images), "train-labels-idx1-ubyte": idx(labels)}
    write(tmp_path, {**files, **{f"{name}.gz": gzip.compress(data) for name, data in files.items()}})
    assert len(read("mnist", tmp_path)) == 4


def test_damage_to_mnist_is_counted(tmp_path: Path) -> None:
    images, labels = digits()
    names = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    write(tmp_path, {names[0]: idx(images)[:-100], names[1]: idx(labels)})
    items = read("mnist", tmp_path)
    assert [type(item) for item in items] == [Document] * 2 + [BadInput]
    assert bad(items) == ["2 of 4 images are lost: the file ends early"]
    assert items[-1].bytes_lost > 0
    write(tmp_path, {names[0]: idx(images), names[1]: idx(labels[:3])})
    assert bad(read("mnist", tmp_path)) == ["has no label; there are 3 labels for 4 images"]
    write(tmp_path, {names[1]: b"labels"})
    assert "is no idx file of labels" in bad(read("mnist", tmp_path))[0]
    (tmp_path / names[1]).unlink()
    assert bad(read("mnist", tmp_path)) == ["its labels, train-labels-idx1-ubyte, are not beside it"]


def test_emnists_images_are_set_upright_and_have_their_characters(tmp_path: Path) -> None:
    images, _ = digits()
    labels = np.array([0, 10, 36, 1])
    lying = np.ascontiguousarray(images.transpose(0, 2, 1))
    name = "emnist-balanced"
    write(tmp_path, {f"{name}-train-images-idx3-ubyte.gz": gzip.compress(idx(lying)),
                     f"{name}-train-labels-idx1-ubyte.gz": gzip.compress(idx(labels))})  # fmt: skip
    notes = Notes()
    assert [caption for _, caption in pairs(read("mnist", tmp_path, notes))] == ["0", "10", "36", "1"]
    assert "mapping.txt is not beside it" in notes.warnings[0][1]
    (tmp_path / f"{name}-mapping.txt").write_text("0 48\n1 49\n10 65\n36 97\n")
    found = pairs(read("mnist", tmp_path))
    assert [caption for _, caption in found] == ["0", "A", "a", "1"]
    for (data, _), image in zip(found, images, strict=True):
        assert np.array_equal(np.asarray(PILImage.open(io.BytesIO(data))), image)
    as_stored = pairs(read("mnist", tmp_path, transposed=False))
    assert np.array_equal(np.asarray(PILImage.open(io.BytesIO(as_stored[1][0]))), lying[1])
    assert list_source("mnist", str(tmp_path))[1] == {}


# -- SQuAD


def squad(version: str) -> dict[str, Any]:
    answers = [{"text": "Denver Broncos", "answer_start": 0}]
    questions: list[dict[str, Any]] = [{"answers": answers, "question": "Who won?", "id": "56be"}]
    if version == "v2.0":
        questions = [{**questions[0], "is_impossible": False}]
        questions.append({"plausible_answers": answers, "question": "Who lost?", "id": "5a8c", "answers": [],
                          "is_impossible": True})  # fmt: skip
    paragraph = {"context": "Denver Broncos won.", "qas": questions}
    return {"version": version, "data": [{"title": "Super_Bowl_50", "paragraphs": [paragraph]}]}


WON = (Text("Denver Broncos won.\n\nWho won?", "user"), Text("Denver Broncos", "assistant"))


def test_questions_of_squad_are_conversations(tmp_path: Path) -> None:
    items = read("squad", write(tmp_path, {"train-v1.1.json": squad("1.1")}))
    assert [item.segments for item in items] == [WON]


def test_questions_of_squad_without_an_answer_are_left_out_or_answered(tmp_path: Path) -> None:
    write(tmp_path, {"train-v2.0.json": squad("v2.0")})
    notes = Notes()
    assert [item.segments for item in read("squad", tmp_path, notes)] == [WON]
    assert notes.unread == {"questions": {"without an answer": 1}}
    items = read("squad", tmp_path, unanswerable="It does not say.", prompt="{question}")
    assert [s.text for s in items[1].segments] == ["Who lost?", "It does not say."]


def test_rows_of_squad_of_hugging_face(tmp_path: Path) -> None:
    row = {"id": "56be", "title": "Super_Bowl_50", "context": "Denver Broncos won.", "question": "Who won?",
           "answers": {"text": ["Denver Broncos"], "answer_start": [0]}}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-00000-of-00001.parquet")
    assert [item.segments for item in read("squad", tmp_path)] == [WON]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "holds a list, not an object"),
        ({"data": [{"title": "x"}]}, "has no list `qas`"),
        ({"data": [{"paragraphs": [{"context": None, "qas": [{"question": "q", "answers": []}]}]}]}, "no context"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"x": 1}]}]}]}]}, "no texts"),
    ],
)
def test_what_is_no_squad_is_named(tmp_path: Path, content: Any, said: str) -> None:
    assert said in bad(read("squad", write(tmp_path, {"a.json": content})))[0]


def test_ids_given_twice_join_nothing(tmp_path: Path) -> None:
    content = coco()
    content["images"].append({**content["images"][0], "file_name": "other.jpg"})
    content["annotations"].append({"image_id": [9], "id": 8, "caption": "x"})
    write(tmp_path, {"annotations/captions_train2017.json": content})
    reasons = bad(read("coco_captions", tmp_path))
    assert "is there with several `file_name`s" in reasons
    assert "is of the image 9, which the file has not once" in reasons
    questions, annotations = vqa(1, 2)
    annotations["annotations"].append({**annotations["annotations"][0], "multiple_choice_answer": "another"})
    annotations["annotations"][1]["image_id"] = 7777
    write(tmp_path, {QUESTIONS: questions, ANNOTATIONS: annotations})
    different, elsewhere = bad(read("vqav2", tmp_path))
    assert different == "has different answers among the annotations"
    assert "its answer about the image 7777" in elsewhere
