"""The tutorial of the first change, done as it says: its files, and its measure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from calumma.platform.sources import files, reading


def rows(file: Path) -> list[tuple[str, str]]:
    """(question, what its picture shows)."""
    lines = map(json.loads, file.read_text().splitlines())
    return [(row["conversations"][0]["value"], row["captions"][0]) for row in lines]


def test_sums_are_right_and_what_is_asked_is_not_trained(tutorial: Path) -> None:
    from calumma.jobs.quickstart.digits import WORDS

    trained, asked = rows(tutorial / "adding.jsonl"), rows(tutorial / "asked.jsonl")
    for question, shown in trained + asked:
        a, b = re.findall("|".join(WORDS), question)
        assert WORDS.index(a) + WORDS.index(b) == WORDS.index(shown)
    assert len(trained) == 40
    assert {q for q, _ in asked}.isdisjoint({q for q, _ in trained})


def test_the_documents_are_read_without_a_complaint(tutorial: Path) -> None:
    found = list(reading.read_file("conversations", "adding", str(tutorial / "adding.jsonl")))
    assert len(found) == 40
    assert not [item for item in found if isinstance(item, files.BadInput)]


def test_a_model_is_measured(model_directory: Path, tutorial: Path) -> None:
    """What a tiny model draws is not right, and is counted. What the page tunes is tuned in test_finetune.py."""
    command = [sys.executable, "measure.py", str(model_directory)]
    measured = subprocess.run(command, cwd=tutorial, check=True, capture_output=True, text=True)
    assert re.search(r"\d of 4 drawn rightly; the judge itself: 9\d\.\d%", measured.stdout)
