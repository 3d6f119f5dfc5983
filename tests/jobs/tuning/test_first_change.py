"""The tutorial of the first change, done as it says: its files, its command with few steps, its measure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from calumma.jobs.commands.finetune import finetune
from calumma.platform.sources import files, reading

PAGE = Path(__file__).resolve().parents[3] / "docs/pages/first-change.md"
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(finetune)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's folder after `python adding.py 40`."""
    place = tmp_path_factory.mktemp("first-change")
    for title, text in re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE.read_text(), re.DOTALL):
        (place / title).write_text(text)
    subprocess.run([sys.executable, "adding.py", "40"], cwd=place, check=True)
    return place


def rows(file: Path) -> list[tuple[str, str]]:
    """(question, what its picture shows)."""
    lines = map(json.loads, file.read_text().splitlines())
    return [(row["conversations"][0]["value"], row["captions"][0]) for row in lines]


def test_sums_are_right_and_what_is_asked_is_not_trained(folder: Path) -> None:
    from calumma.jobs.quickstart.digits import WORDS

    trained, asked = rows(folder / "adding.jsonl"), rows(folder / "asked.jsonl")
    for question, shown in trained + asked:
        a, b = re.findall("|".join(WORDS), question)
        assert WORDS.index(a) + WORDS.index(b) == WORDS.index(shown)
    assert len(trained) == 40
    assert {q for q, _ in asked}.isdisjoint({q for q, _ in trained})


def test_the_documents_are_read_without_a_complaint(folder: Path) -> None:
    found = list(reading.read_file("conversations", "adding", str(folder / "adding.jsonl")))
    assert len(found) == 40
    assert not [item for item in found if isinstance(item, files.BadInput)]


@pytest.mark.cluster
def test_the_models_it_tunes_are_measured(ray_cluster: None, model_directory: Path, folder: Path) -> None:
    """As the page says, but on a tiny model and for two steps: what it draws is not right, and is counted."""
    words = [str(model_directory), str(folder / "adding.jsonl"), "--out", str(folder / "adding"), "--steps", "2"]
    done = CliRunner().invoke(app, [*words, "--samples", "1", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"])
    assert done.exit_code == 0, done.output
    assert (folder / "adding" / "report.html").is_file()
    command = [sys.executable, "measure.py", str(folder / "adding/tuned/model")]
    measured = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    assert re.search(r"\d of 4 drawn rightly; the judge itself: 9\d\.\d%", measured.stdout)
