"""Layouts that people have their images in: Hugging Face's datasets, folders, tables, and pages of Multimodal C4.

What `datasets` writes is written by `datasets` itself.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import list_source, read_source, require_files
from calumma.platform.sources.specification import Source


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(format: str, location: Path, notes: Notes | None = None, **options: Any) -> list[Document | BadInput]:
    """All of a source, as curation reads it."""
    images = options.pop("images", None)
    source = Source(name="s", format=format, location=str(location), images=images, options=options)
    files, others = require_files(source)
    assert not [uri for uri in others if uri.endswith((".png", ".jpg"))], "images are never `other files`"
    return [item for uri in files for item in read_source(source, uri, notes=notes)]


def good(items: list[Document | BadInput]) -> list[tuple[Any, ...]]:
    """The segments of the documents; every item must be one."""
    assert not [item for item in items if isinstance(item, BadInput)], items
    return [item.segments for item in items if isinstance(item, Document)]


def bad(items: list[Document | BadInput]) -> list[str]:
    return [item.reason for item in items if isinstance(item, BadInput)]


# -- Hugging Face's datasets


@pytest.fixture(scope="module")
def hub() -> Any:
    return pytest.importorskip("datasets")


def stored(hub: Any, dataset: Any, form: str, folder: Path) -> Path:
    """A dataset as it is shared (Parquet), as `save_to_disk` keeps it, and as JSON lines."""
    if form == "parquet":
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    elif form == "disk":
        hub.DatasetDict({"train": dataset}).save_to_disk(folder)
    else:
        dataset.to_json(folder / "train.jsonl")
    return folder


@pytest.mark.parametrize("form", ["parquet", "disk"])
def test_images_with_captions_of_hugging_faces_datasets(tmp_path: Path, hub: Any, form: str) -> None:
    features = hub.Features({"image": hub.Image(), "text": hub.Value("string"), "id": hub.Value("int64")})
    rows = [{"image": {"bytes": png(n), "path": f"{n}.png"}, "text": f"red {n}", "id": n} for n in range(3)]
    notes = Notes()
    items = read("pairs", stored(hub, hub.Dataset.from_list(rows, features), form, tmp_path / "d"), notes)
    assert good(items) == [(Image(png(n), f"red {n}"),) for n in range(3)]
    assert notes.unread == {"columns": {"id": 1}}  # of a columnar file once, not for every row


@pytest.mark.parametrize("form", ["parquet", "disk"])
def test_a_class_label_of_hugging_faces_datasets_is_its_name(tmp_path: Path, hub: Any, form: str) -> None:
    features = hub.Features({"img": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])})
    rows = [{"img": {"bytes": png(n), "path": None}, "label": n % 2} for n in range(3)]
    items = read("pairs", stored(hub, hub.Dataset.from_list(rows, features), form, tmp_path / "d"))
    assert [segments[0].caption for segments in good(items)] == ["cat", "dog", "cat"]


@pytest.mark.parametrize("form", ["parquet", "disk"])
def test_conversations_about_several_images_of_hugging_faces_datasets(tmp_path: Path, hub: Any, form: str) -> None:
    turn = {"role": hub.Value("string"), "content": hub.Value("string")}
    features = hub.Features({"images": hub.List(hub.Image()), "messages": hub.List(turn)})
    messages = [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "the second"}]
    row = {"images": [{"bytes": png(n), "path": None} for n in (1, 2)], "messages": messages}
    alone = {"images": [], "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    items = read("conversations", stored(hub, hub.Dataset.from_list([row, alone], features), form, tmp_path / "d"))
    first, second = good(items)
    assert first[:2] == (Image(png(1), None, "user"), Text(" or ", "user"))
    assert first[2:] == (Image(png(2), None, "user"), Text("?", "user"), Text("the second", "assistant"))
    assert second == (Text("hi", "user"), Text("ho", "assistant"))


def test_the_cauldrons_pairs_of_texts_come_after_their_images(tmp_path: Path, hub: Any) -> None:
    pair = {"user": hub.Value("string"), "assistant": hub.Value("string"), "source": hub.Value("string")}
    features = hub.Features({"images": hub.List(hub.Image()), "texts": hub.List(pair)})
    row = {"images": [{"bytes": png(1), "path": None}], "texts": [{"user": "what?", "assistant": "red", "source": "x"}]}
    items = read("conversations", stored(hub, hub.Dataset.from_list([row], features), "parquet", tmp_path / "d"))
    assert good(items) == [(Image(png(1), None, "user"), Text("what?", "user"), Text("red", "assistant"))]


@pytest.mark.parametrize("form", ["parquet", "disk", "lines"])
def test_texts_of_hugging_faces_datasets(tmp_path: Path, hub: Any, form: str) -> None:
    dataset = hub.Dataset.from_list(
        [{"text": "one", "meta": {"url": "https://x.test/1"}}, {"text": "two", "meta": None}]
    )
    items = read("text", stored(hub, dataset, form, tmp_path / "d"))
    assert good(items) == [(Text("one"),), (Text("two"),)]
    assert isinstance(items[0], Document)
    assert items[0].url == "https://x.test/1"


def test_a_class_that_is_not_known_is_no_caption(tmp_path: Path, hub: Any) -> None:
    features = hub.Features({"img": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])})
    dataset = hub.Dataset.from_list([{"img": {"bytes": png(1), "path": None}, "label": -1}], features)
    notes = Notes()
    assert good(read("pairs", stored(hub, dataset, "parquet", tmp_path / "d"), notes)) == [(Image(png(1)),)]
    assert notes.lacking == {"caption": 1}


def test_feather_is_read_as_arrow_and_its_damage_is_named(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {n} " + "x" * 500 for n in range(400)]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=100):
            writer.write_batch(batch)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[: len(whole) * 3 // 5])
    items = read("text", tmp_path / "a.arrow")
    assert len([item for item in items if isinstance(item, Document)]) == 200
    assert [item.reason.partition(":")[0] for item in items if isinstance(item, BadInput)] == [
        "the file is damaged from here on"
    ]
    pa.feather.write_feather(table, str(tmp_path / "b.arrow"))
    assert len(good(read("text", tmp_path / "b.arrow"))) == 400


def test_a_file_of_text_is_a_document(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.txt": "\ufeffone\ntwo\n",
        "b/c.txt.gz": gzip.compress(b"three"),
        "d.txt": b"\xe9t\xe9",
    }
    items = read("text_files", write(tmp_path, files))
    assert [item.text for item in items if isinstance(item, Document)] == ["one\ntwo\n", "three"]
    assert "the option `encoding` may name another" in bad(items)[0]
    assert good(read("text_files", tmp_path / "d.txt", encoding="latin-1")) == [(Text("été"),)]


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_unicode_of_any_width_is_text_or_told(tmp_path: Path, codec: str) -> None:
    write(tmp_path, {"a.txt": "été: hello".encode(codec)})
    if codec.endswith(("le", "be")):
        assert "UTF-16 without a byte order mark" in bad(read("text_files", tmp_path / "a.txt"))[0]
        assert good(read("text_files", tmp_path / "a.txt", encoding=codec)) == [(Text("été: hello"),)]
    else:
        assert good(read("text_files", tmp_path / "a.txt")) == [(Text("été: hello"),)]


# -- tables


def test_a_table_names_image_files_and_their_captions(tmp_path: Path) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerows(
        [["image", "caption", "split"], ["a/1.png", "one, and\nmore", "train"], ["2.png", 'a "two"', "train"]]
    )
    write(tmp_path, {"t.csv": buffer.getvalue(), "a/1.png": png(1), "2.png": png(2)})
    notes = Notes()
    items = read("pairs", tmp_path / "t.csv", notes)
    assert good(items) == [(Image(png(1), "one, and\nmore"),), (Image(png(2), 'a "two"'),)]
    assert notes.unread == {"fields": {"split": 2}}


def test_of_several_captions_each_makes_a_pair_or_the_first(tmp_path: Path) -> None:
    write(tmp_path, {"t.jsonl": lines({"image": "1.png", "caption": ["one", "eins", ""]}), "1.png": png(1)})
    assert [s[0].caption for s in good(read("pairs", tmp_path / "t.jsonl"))] == ["one", "eins"]
    notes = Notes()
    assert [s[0].caption for s in good(read("pairs", tmp_path / "t.jsonl", notes, captions="first"))] == ["one"]
    assert notes.unread == {"captions": {"beyond an image's first": 1}}


def test_several_images_of_a_row_stand_before_their_text(tmp_path: Path) -> None:
    rows = [{"images": ["1.png", "2.png"], "text": "both"}, {"images": ["1.png", "lost.png"], "text": "one is lost"}]
    write(tmp_path, {"t.jsonl": lines(*rows), "1.png": png(1), "2.png": png(2)})
    items = read("pairs", tmp_path / "t.jsonl")
    assert isinstance(items[0], Document)
    assert items[0].segments == (Image(png(1)), Image(png(2)), Text("both"))
    assert "no image 'lost.png'" in bad(items)[0]
    notes = Notes()
    items = read("pairs", tmp_path / "t.jsonl", notes, other_images="leave_out")
    assert good(items)[1] == (Image(png(1)), Text("one is lost"))
    assert notes.unread == {"images": {"that cannot be had": 1}}


def test_fields_of_other_names_are_told_and_may_be_named(tmp_path: Path) -> None:
    write(tmp_path, {"t.jsonl": lines({"picture": "1.png", "words": "one"}), "1.png": png(1)})
    assert bad(read("pairs", tmp_path / "t.jsonl")) == [
        "has no field image or images or img …; it has picture, words; the source's options may name it: {image: FIELD}"
    ]
    assert good(read("pairs", tmp_path / "t.jsonl", image="picture", caption="words")) == [(Image(png(1), "one"),)]
    notes = Notes()
    assert good(read("pairs", tmp_path / "t.jsonl", notes, image="picture")) == [(Image(png(1)),)]
    assert notes.report() == {"unread": {"fields": {"words": 1}}, "lacking": {"caption": 1}}


# -- folders


def test_an_image_folder_names_its_classes(tmp_path: Path) -> None:
    files = {"train/cat/1.png": png(1), "train/dog/2.PNG": png(2), "test/3.png": png(3), "README.md": "x"}
    notes = Notes()
    items = read("imagefolder", write(tmp_path, files), notes, names={"dog": "a good dog"})
    assert [s[0].caption for s in good(items)] == [None, "cat", "a good dog"]
    assert notes.lacking == {"caption": 1}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_an_image_folder_has_its_captions_in_metadata(tmp_path: Path, form: str) -> None:
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "sub/2.png", "text": "two"}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    metadata: dict[str, str | bytes] = {
        "csv": "file_name,text\n1.png,one\nsub/2.png,two\n",
        "jsonl": lines(*rows),
        "parquet": (tmp_path / "m.parquet").read_bytes(),
    }
    (tmp_path / "m.parquet").unlink()
    files = {f"train/metadata.{form}": metadata[form], "train/1.png": png(1), "train/sub/2.png": png(2)}
    notes = Notes()
    items = read("imagefolder", write(tmp_path, {**files, "train/3.png": png(3)}), notes)
    assert good(items) == [(Image(png(1), "one"),), (Image(png(2), "two"),)]
    assert notes.unread == {"images": {"named by no row of the metadata": 1}}


def test_metadata_names_no_image_outside_the_location(tmp_path: Path) -> None:
    write(tmp_path, {"d/metadata.jsonl": lines({"file_name": "../secret.png", "text": "one"}), "secret.png": png(9)})
    assert "leads out" in bad(read("imagefolder", tmp_path / "d"))[0]
    write(tmp_path, {"d/metadata.jsonl": lines({"file_name": 3, "text": "one"}, {"file_name": "/etc/x", "text": "y"})})
    assert ["file name is no text" in bad(read("imagefolder", tmp_path / "d"))[0]] == [True]


def test_of_two_metadata_files_of_a_folder_one_is_read(tmp_path: Path) -> None:
    files = {
        "metadata.csv": "file_name,text\n1.png,one\n",
        "metadata.jsonl": lines({"file_name": "1.png", "text": "one"}),
    }
    write(tmp_path, {**files, "1.png": png(1)})
    assert good(read("imagefolder", tmp_path)) == [(Image(png(1), "one"),)]
    assert list(list_source("imagefolder", str(tmp_path))[1]) == [str(tmp_path / "metadata.csv")]


def test_img2datasets_files_are_read_with_their_captions(tmp_path: Path) -> None:
    about = json.dumps({"caption": "one", "url": "https://x.test/1.jpg", "status": "success", "key": "000000000"})
    files = {
        "00000/000000000.png": png(1),
        "00000/000000000.txt": "one",
        "00000/000000000.json": about,
        "00000/000000001.png": png(2),
        "00000/000000001.json": json.dumps({"caption": "two"}),
        "00000/000000002.JPG": png(3),
        "00000/000000002.TXT": "three",
        "00000/000000002.json": about,
        "00000.parquet": b"PAR1",
        "00000_stats.json": "{}",
    }
    items = read("image_files", write(tmp_path, files))
    assert good(items) == [(Image(png(1), "one"),), (Image(png(2), "two"),), (Image(png(3), "three"),)]
    assert isinstance(items[0], Document)
    assert items[0].url == "https://x.test/1.jpg"
    others = [Path(uri).name for uri in list_source("image_files", str(tmp_path))[1]]
    assert others == ["00000.parquet", "00000_stats.json"]
    (tmp_path / "00000/000000002.txt").write_text("drei")
    assert bad(read("image_files", tmp_path)) == ["000000002.TXT is there in two spellings; which is meant?"]


# -- pages


def mmc4(*images: dict[str, Any], **more: Any) -> str:
    return lines({"url": "https://x.test", "text_list": ["First.", "Second."], "image_info": list(images), **more})


def test_images_of_multimodal_c4_stand_before_their_sentence(tmp_path: Path) -> None:
    info = {"image_name": "1.png", "raw_url": "https://x.test/1.png", "matched_text_index": 1, "matched_sim": 0.3}
    write(tmp_path, {"docs_shard_0_v2.jsonl": mmc4(info, similarity_matrix=[[0.1, 0.3]]), "1.png": png(1)})
    items = read("mmc4", tmp_path / "docs_shard_0_v2.jsonl")
    assert good(items) == [(Text("First.\n"), Image(png(1)), Text("Second."))]
    assert isinstance(items[0], Document)
    assert items[0].url == "https://x.test"
    after = good(read("mmc4", tmp_path / "docs_shard_0_v2.jsonl", place="after"))
    assert after == [(Text("First.\n"), Text("Second."), Image(png(1)))]
    notes = Notes()
    assert good(read("mmc4", tmp_path / "docs_shard_0_v2.jsonl", notes, least_similarity=0.5))[0][1] == Text("Second.")
    assert notes.unread == {"images": {"less similar to their text than asked": 1}}


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"image_name": "1.png", "matched_text_index": 2}, "matched to the text 2 of 2"),
        ({"image_name": "1.png"}, "matched to the text None of 2"),
        ({"matched_text_index": 0}, "has no `image_name`"),
        ({"image_name": "lost.png", "matched_text_index": 0}, "no image 'lost.png'"),
    ],
)
def test_an_image_of_multimodal_c4_without_its_place_makes_the_page_bad(
    tmp_path: Path, info: dict[str, Any], said: str
) -> None:
    write(tmp_path, {"a.jsonl": mmc4(info), "1.png": png(1)})
    assert said in bad(read("mmc4", tmp_path / "a.jsonl"))[0]


def test_lost_images_of_multimodal_c4_may_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": mmc4({"image_name": "lost.png", "matched_text_index": 0})})
    assert good(read("mmc4", tmp_path / "a.jsonl", other_images="leave_out")) == [(Text("First.\n"), Text("Second."))]
    write(tmp_path, {"a.jsonl": mmc4({"image_name": None, "matched_text_index": 0})})
    assert good(read("mmc4", tmp_path / "a.jsonl", other_images="leave_out")) == [(Text("First.\n"), Text("Second."))]


PAGE = b"<!DOCTYPE html><title>404</title>"
EMPTY: list[Any] = [None, {"bytes": b"", "path": ""}, {"bytes": None, "path": None}]
NONE: list[Any] = [{"bytes": PAGE, "path": None}, {"bytes": None, "path": "page.png"}]


@pytest.mark.parametrize("empty", EMPTY + NONE)
def test_failed_downloads_of_a_page_may_be_left_out(tmp_path: Path, empty: Any) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    row = {"texts": ["intro", None, None, "end"], "images": [None, {"bytes": png(1), "path": None}, empty, None]}
    schema = pa.schema([("texts", pa.list_(pa.string())), ("images", pa.list_(image))])
    pa.parquet.write_table(pa.Table.from_pylist([row], schema), tmp_path / "a.parquet")
    write(tmp_path, {"page.png": PAGE})
    if empty in EMPTY:
        assert "{other_images: leave_out}" in bad(read("interleaved", tmp_path / "a.parquet"))[0]
    notes = Notes()
    items = read("interleaved", tmp_path / "a.parquet", notes, other_images="leave_out")
    assert good(items) == [(Text("intro"), Image(png(1)), Text("end"))]
    assert notes.unread == {"images": {"that cannot be had": 1}}


def test_remote_images_of_a_page_may_be_left_out(tmp_path: Path) -> None:
    rows = [
        {"texts": [None, "a"], "images": ["https://x.test/1.png", None]},
        {"texts": ["", "b"], "images": ["1.png", ""]},
    ]
    write(tmp_path, {"a.jsonl": lines(*rows), "1.png": png(1)})
    assert "is remote" in bad(read("interleaved", tmp_path / "a.jsonl"))[0]
    items = read("interleaved", tmp_path / "a.jsonl", other_images="leave_out")
    assert good(items) == [(Text("a"),), (Image(png(1)), Text("b"))]


# -- conversations


def chat(tmp_path: Path, row: dict[str, Any], **options: Any) -> list[Document | BadInput]:
    write(tmp_path, {"a.jsonl": lines(row), "1.png": png(1), "2.png": png(2)})
    return read("conversations", tmp_path / "a.jsonl", **options)


def said(words: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": words}, {"from": "gpt", "value": answer}], **more}


ONE, TWO = Image(png(1), None, "user"), Image(png(2), None, "user")


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        (said("a <|image|> b", images=["1.png"]), "<|image|>"),
        (said("a <img>1.png</img> b"), "<img>"),
        (said("a <image_1> b", images=["1.png"]), "<image_1>"),
        (said("a <|image_1|> b", image="1.png"), "<|image_1|>"),
    ],
)
def test_an_option_says_which_mark_stands_for_an_image(tmp_path: Path, row: dict[str, Any], mark: str) -> None:
    assert good(chat(tmp_path, row, mark=mark))[0] == (
        Text("a ", "user"),
        ONE,
        Text(" b", "user"),
        Text("yes", "assistant"),
    )
    message = bad(chat(tmp_path, row))[0]
    assert f"{{mark: '{mark}'}}" in message


def test_numbered_marks_choose_their_image(tmp_path: Path) -> None:
    row = said("<image_2> or <image_1>?", images=["1.png", "2.png"])
    assert good(chat(tmp_path, row, mark="<image_1>"))[0][:3] == (TWO, Text(" or ", "user"), ONE)
    again = said("<image_1> or <image_1>?", images=["1.png", "2.png"])
    assert bad(chat(tmp_path, again, mark="<image_1>")) == ["image 1 is marked more than once"]
    assert bad(chat(tmp_path, said("<image_3>", images=["1.png"]), mark="<image_1>")) == ["marks image 3 of 1"]


@pytest.mark.parametrize("mark", ["<video>", "<|audio|>", "<image_3>", "<|vision_start|>", "<img>x</img>", "[IMG]"])
def test_a_mark_that_is_not_understood_is_never_text_unless_asked(tmp_path: Path, mark: str) -> None:
    assert f"has the mark {mark.partition('x<')[0]!r}" in bad(chat(tmp_path, said(f"see {mark}")))[0]
    assert good(chat(tmp_path, said(f"see {mark}"), other_marks="text"))[0][0] == Text(f"see {mark}", "user")


def test_html_with_attributes_is_text(tmp_path: Path) -> None:
    words = 'write <img src="a.png"> and <video controls>'
    assert good(chat(tmp_path, said(words)))[0][0] == Text(words, "user")


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"instruction": "add", "input": "1 1", "output": "2"}, "add\n\n1 1", "2"),
        ({"instruction": "say hi", "input": "", "output": "hi"}, "say hi", "hi"),
        ({"query": "q", "response": "a"}, "q", "a"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"question": "q", "answers": ["x", "y", "y"]}, "q", "y"),
    ],
)
def test_exchanges_of_other_fields(tmp_path: Path, row: dict[str, Any], question: str, answer: str) -> None:
    assert good(chat(tmp_path, row)) == [(Text(question, "user"), Text(answer, "assistant"))]


def test_alpaca_with_its_system_and_history(tmp_path: Path) -> None:
    row = {"instruction": "q2", "output": "a2", "system": "be kind", "history": [["q1", "a1"]]}
    words = [(s.text, s.role) for s in good(chat(tmp_path, row))[0]]
    assert words[-3:] == [("a1", "assistant"), ("q2", "user"), ("a2", "assistant")]
    assert "be kind" in "".join(text for text, role in words if role == "user")


def test_a_question_about_an_image_comes_after_it(tmp_path: Path) -> None:
    row = {"image": "1.png", "question": "what?", "answer": "red"}
    assert good(chat(tmp_path, row)) == [(ONE, Text("what?", "user"), Text("red", "assistant"))]


def test_images_without_marks_are_bad_unless_they_may_stand_first(tmp_path: Path) -> None:
    row = {"instruction": "what?", "output": "red", "images": ["1.png", "2.png"]}
    assert "0 <image> marks and 2 images" in bad(chat(tmp_path, row))[0]
    assert good(chat(tmp_path, row, unmarked="first"))[0][:3] == (ONE, TWO, Text("what?", "user"))


def test_marks_in_parts_of_a_turn_are_images(tmp_path: Path) -> None:
    content = [{"type": "text", "text": "look <image> here"}]
    row = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}],
        "images": ["1.png"],
    }
    assert good(chat(tmp_path, row))[0][:3] == (Text("look ", "user"), ONE, Text(" here", "user"))


def test_older_datasets_keep_turns_as_an_object_of_lists(tmp_path: Path) -> None:
    row = {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}
    assert good(chat(tmp_path, row)) == [(Text("q", "user"), Text("a", "assistant"))]
    row = {"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])}
    assert good(chat(tmp_path, row)) == [(Text("q", "user"), Text("a", "assistant"))]


def test_metadata_in_a_folder_names_the_images_of_that_folder(tmp_path: Path) -> None:
    """Whatever the field is called: an image of the same name elsewhere is another."""
    files: dict[str, bytes | str] = {"0.png": png(1), "a/0.png": png(2), "b/0.png": png(3)}
    files |= {"metadata.csv": "path,text\n0.png,root\n", "a/metadata.csv": "image,text\n0.png,inner\n"}
    files |= {"b/metadata.jsonl": '{"filename": "0.png", "text": "third"}\n', ".cache/0.png": png(4)}
    notes = Notes()
    source = Source(name="s", format="imagefolder", location=str(write(tmp_path, files)))
    found = [item for uri in require_files(source)[0] for item in read_source(source, uri, notes=notes)]
    assert sorted((item.images[0].caption, item.images[0].data) for item in found if isinstance(item, Document)) == [
        ("inner", png(2)),
        ("root", png(1)),
        ("third", png(3)),
    ]
    assert notes.report() == {}
