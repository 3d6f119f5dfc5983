"""`calumma data look`: what it says of layouts, and that the job it writes runs."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image as PILImage
from rich.console import Console
from typer.testing import CliRunner

from calumma.jobs.commands import data
from calumma.jobs.commands.main import app
from calumma.platform.cluster.progress import no_progress
from calumma.platform.curation import curate
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.sources.look.look import look
from calumma.platform.specification import SpecificationError


def png(shade: int = 200) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade, 10, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            for suffix, content in (("png", png(number)), ("txt", f"red {number}".encode())):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def lines(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def archives(folder: Path) -> None:
    tar(folder / "00000.tar")
    (folder / "00000_stats.json").write_text("{}")


def conversations(folder: Path) -> None:
    (folder / "pictures").mkdir()
    (folder / "pictures/1.png").write_bytes(png())
    turns = [{"from": "human", "value": "<|image|> what?"}, {"from": "gpt", "value": "red"}]
    lines(folder / "chat.jsonl", {"conversations": turns, "image": ["1.png"]})


def pairs(folder: Path) -> None:
    image = {"bytes": png(), "path": "1.png"}
    pq.write_table(pa.Table.from_pylist([{"image": image, "caption": "red"}]), folder / "train-00000-of-00001.parquet")


def pages_with_lost_images(folder: Path) -> None:
    rows = [{"texts": ["a", None], "images": [None, name]} for name in ("1.png", "lost.png")]
    lines(folder / "pages.jsonl", *rows)
    (folder / "1.png").write_bytes(png())


def classes(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(png())


def described(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\n1.png,red\n")
    (folder / "1.png").write_bytes(png())


def samples(folder: Path) -> None:
    (folder / "00000").mkdir()
    (folder / "00000/0.png").write_bytes(png())
    (folder / "00000/0.txt").write_text("red")


def code(folder: Path) -> None:
    lines(folder / "a.jsonl", {"path": "a.py", "body": "print(1)  # a program", "stars": 3})


def squad(folder: Path) -> None:
    question = {"question": "q?", "id": "1", "answers": [{"text": "a", "answer_start": 0}]}
    content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "a.", "qas": [question]}]}]}
    (folder / "train-v1.1.json").write_text(json.dumps(content, indent=1))


def flickr(folder: Path) -> None:
    (folder / "results_20130124.token").write_text("1.jpg#0\tred\n")
    (folder / "flickr30k-images").mkdir()
    (folder / "flickr30k-images/1.jpg").write_bytes(png())


def web(folder: Path) -> None:
    (folder / "a.md").write_text("# Red\n\n![red](a.png)\n\nIt is red.\n")
    (folder / "a.png").write_bytes(png())


def alpaca(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps([{"instruction": "add", "input": "1 1", "output": "2"}]))


def table(folder: Path) -> None:
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("1.png", "red")])
    (folder / "1.png").write_bytes(png())


def mmc4(folder: Path) -> None:
    info = {"image_name": "1.png", "matched_text_index": 0}
    lines(folder / "docs_shard_0_v2.jsonl", {"text_list": ["red"], "image_info": [info], "url": "https://x.test"})
    (folder / "1.png").write_bytes(png())


def books(folder: Path) -> None:
    (folder / "a.txt").write_text("It was red.")


LAYOUTS: list[tuple[Callable[[Path], None], str, dict[str, Any]]] = [
    (archives, "webdataset", {}),
    (conversations, "conversations", {"mark": "<|image|>"}),
    (pairs, "pairs", {}),
    (pages_with_lost_images, "interleaved", {"other_images": "leave_out"}),
    (classes, "imagefolder", {}),
    (described, "imagefolder", {}),
    (samples, "image_files", {}),
    (code, "text", {"field": "body"}),
    (squad, "squad", {}),
    (flickr, "flickr30k", {}),
    (web, "pages", {}),
    (alpaca, "conversations", {}),
    (table, "pairs", {}),
    (mmc4, "mmc4", {}),
    (books, "text_files", {}),
]


class Nowhere:
    """A run that logs nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize(("layout", "format", "options"), LAYOUTS, ids=[layout.__name__ for layout, *_ in LAYOUTS])
def test_a_location_is_recognized_and_the_job_it_gives_curates_it(
    tmp_path: Path, layout: Callable[[Path], None], format: str, options: dict[str, Any]
) -> None:
    folder = tmp_path / "My Data"
    folder.mkdir()
    layout(folder)
    seen = look(str(folder))
    assert seen.guess is not None, seen.why_not
    assert (seen.guess.format, seen.guess.options) == (format, options)
    assert seen.guess.reason
    assert not seen.bad
    assert seen.documents
    spec = CurateSpecification.model_validate(yaml.safe_load(seen.curation()))
    spec = spec.model_copy(update={"storage": str(tmp_path / "corpus")})
    manifest = curate.run(spec, Nowhere(), no_progress)  # type: ignore[arg-type]
    report = manifest.report["sources"]["my-data"]
    assert (report["kept"], report["bad"]) == (seen.read, 0)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    return CliRunner()


def test_the_command_shows_documents_and_writes_the_page_and_the_job(tmp_path: Path, cli: CliRunner) -> None:
    archives(tmp_path)
    page, job = tmp_path / "look.html", tmp_path / "job.yaml"
    result = cli.invoke(app, ["data", "look", str(tmp_path), "--html", str(page), "--save", str(job)])
    assert result.exit_code == 0, result.output
    for said in (
        "2 files",
        ".tar (1), .json (1)",
        "it seems to be webdataset: most of the bytes are in 1 tar archive",
        ".png (3), .txt (3)",
        "files not read: .json (1)",
        "00000.tar: 0.png",
        "[image 8x8: red 0]",
        "format: webdataset",
    ):
        assert said in result.output
    assert "\x1b" not in result.output
    assert "▀" not in result.output, "no terminal, no pictures"
    assert page.read_text().count("data:image/png;base64,") == 3
    assert yaml.safe_load(job.read_text())["sources"][0]["format"] == "webdataset"


def test_pictures_are_half_blocks_where_the_terminal_has_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives(tmp_path)
    seen = look(str(tmp_path))

    def shown(**settings: Any) -> str:
        console = Console(file=io.StringIO(), width=100, **settings)
        for line in data.lines(seen, console):
            console.print(line)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert shown(force_terminal=True, color_system="truecolor").count("▀") == 3 * 8 * 4
    assert "38;2;0;10;20" in shown(force_terminal=True, color_system="truecolor")
    assert "▀" not in shown(force_terminal=True, color_system="truecolor", no_color=True)
    assert "▀" not in shown(force_terminal=False)


def test_bad_documents_are_named_and_the_job_allows_them(tmp_path: Path, cli: CliRunner) -> None:
    lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": 2}, {"text": "three"})
    result = cli.invoke(app, ["data", "look", str(tmp_path)])
    assert result.exit_code == 0
    assert "1 bad among the first 3:" in result.output
    assert "a.jsonl: line 2: `text` is a number, not a string" in result.output
    assert "max_bad_share: 0.67   # 1 of the first 3 are bad: look at why" in result.output


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"notes.docx": "hello"}, "no format reads .docx; a reader of your own is a function of a few lines"),
        ({"a.jsonl": '{"x": 1}\n'}, "its records have `x`, of which no format is known"),
        ({"a.jsonl": "no json\n"}, "no record could be read"),
    ],
)
def test_what_is_nothing_known_is_said(tmp_path: Path, cli: CliRunner, files: dict[str, str], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    result = cli.invoke(app, ["data", "look", str(tmp_path)])
    assert result.exit_code == 1
    assert said in result.output


def test_wrong_calls_say_what_is_right(tmp_path: Path, cli: CliRunner) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(SpecificationError, match=r"there is nothing at .*/pictres; .* has pictures"):
        look(str(tmp_path / "pictres"))
    lines(tmp_path / "a.jsonl", {"body": "one"})
    for words, said in (
        (["--format", "txt"], "format 'txt' is not known; known are"),
        (["--format", "text", "--option", "feld=body"], "has no option 'feld'; it knows field"),
        (["--option", "field"], "write NAME=VALUE"),
    ):
        result = cli.invoke(app, ["data", "look", str(tmp_path), *words])
        assert result.exit_code == 1
        assert said in result.output
    result = cli.invoke(app, ["data", "look", str(tmp_path), "--format", "text", "--option", "field=body"])
    assert result.exit_code == 0, result.output
