"""The page from a text model to a tuned model that is served: what it says is done on its tiny random checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calumma.jobs.commands.main import app
from calumma.model import Text, generate, load
from calumma.model.document import Document
from calumma.model.generation import SamplingParams
from docs.blocks import blocks, commands
from docs.check import PAGES, environment, follow
from tests.model.convert.text_models import save_image_tokenizer

PAGE = PAGES / "guides" / "extending.md"
pytest.importorskip("transformers")


def test_the_pages_text_model_is_extended_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_image_tokenizer(tmp_path / "corpus/tokenizers/image")
    script = next(block for block in blocks(PAGE, PAGES) if block.title == "make_text_model.py")
    subprocess.run([sys.executable, "-c", script.text], check=True, cwd=tmp_path)
    extend = next(
        words for block in blocks(PAGE, PAGES) for words in commands(block.text, "calumma") if "extend" in words
    )
    result = CliRunner().invoke(app, extend[1:] if extend[0] == "calumma" else extend)
    assert result.exit_code == 0, result.output
    assert "ids follow the text model's 600" in result.output
    model = load(tmp_path / "corpus/models/extended")
    question = Document((Text("What is red?", "user"),))
    ids = model.encode(question, complete=False)
    assert ids[0] == model.text_tokenizer.special_names["<|im_start|>"]  # type: ignore[attr-defined]
    [answer] = generate(model, [question], SamplingParams(4, "text", seed=0))
    assert not answer.images
    again = CliRunner().invoke(app, extend[1:] if extend[0] == "calumma" else extend)
    assert again.exit_code == 1
    assert "exists already" in again.output


@pytest.mark.slow
def test_the_page_leads_from_a_text_model_to_a_server(tmp_path: Path) -> None:
    """With a cluster of its own, and port 8000."""
    for name in ("data", "extending"):
        follow(PAGES / "guides" / f"{name}.md", tmp_path, environment(tmp_path))
