"""A source as a Ray dataset: every document, in order, a task a file."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.sources import dataset, reading
from calumma.platform.sources.specification import Source
from calumma.platform.specification import SpecificationError

PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG and so on").decode()


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def conversation(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image> {number}?"}, {"from": "gpt", "value": "yes"}]
    return {"conversations": turns, "images": [PNG if number % 2 else "1.png"], "license": "MIT"}


@pytest.mark.cluster
def test_a_dataset_has_the_documents_of_all_files_in_order(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"\x89PNG one")
    folder = tmp_path / "talk"
    folder.mkdir()
    for number, count in enumerate((30, 1, 0, 200, 5, 17)):
        content = lines(*(conversation(1000 * number + n) for n in range(count)))
        (folder / f"{number}.jsonl").write_bytes(content + (b"{broken\n" if number == 3 else b""))
    source = Source(name="talk", format="conversations", location="talk", images=".")

    found = dataset.read(source, root=str(tmp_path), block=200)  # several blocks of most files
    assert found.context.execution_options.preserve_order
    rows = found.map(lambda row: {**row, "url": row["name"].rpartition("/")[2]}).take_all()

    files, _ = reading.list_source(source.format, str(folder))
    expected = [
        item
        for uri in files
        for item in reading.read_source(source, uri, lambda place: str(tmp_path / place))
        if isinstance(item, Document)
    ]
    assert len(expected) == 253
    assert [Document.from_row({**row, "url": ""}) for row in rows] == expected
    assert [row["name"] for row in rows] == [reading.name_of(document) for document in expected]
    assert rows[0]["url"] == "0.jsonl: line 1"
    with pytest.raises(Exception, match=r"3\.jsonl: line 201: not a line of JSON"):
        dataset.read(source, root=str(tmp_path), bad="raise").count()


def test_a_file_becomes_blocks_of_a_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": "x" * size} for size in [300] * 10 + [5000] + [300] * 2)))
    source = Source(name="text", format="text", location=str(tmp_path))
    blocks = list(dataset._blocks(source, f"{tmp_path}/a.jsonl", "skip", 1000))
    assert [block.num_rows for block in blocks] == [3, 3, 3, 1, 1, 2]
    assert {block.schema for block in blocks} == {dataset.schema()}


def test_what_is_bad_is_logged_or_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}, {"words": 2}, {"text": "three"}))
    source = Source(name="text", format="text", location=str(tmp_path))
    (block,) = dataset._blocks(source, f"{tmp_path}/a.jsonl", "skip", 1000)
    assert block.num_rows == 2
    assert f"left out {tmp_path}/a.jsonl: line 2: has no `text`" in caplog.text
    with pytest.raises(dataset.UnreadableInput, match=r"a\.jsonl: line 2: has no `text`"):
        list(dataset._blocks(source, f"{tmp_path}/a.jsonl", "raise", 1000))


def test_a_source_without_files_says_what_is_there(tmp_path: Path, s3: str) -> None:
    for base in (str(tmp_path), s3):
        storage.write_bytes(f"{base}/notes.md", b"x")
        with pytest.raises(SpecificationError, match=r"no \*\.tar or .* files at .*1 other files, such as notes\.md"):
            dataset.read(Source(name="a", format="webdataset", location=base))
        with pytest.raises(SpecificationError, match="nothing at that location"):
            dataset.read(Source(name="a", format="webdataset", location="nowhere"), root=base)
