"""`calumma finetune`: from a model directory and a file of conversations to a registered model, once and again. The
conversations are those of the tutorial of the first change."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from typer.testing import CliRunner

from calumma.jobs.commands.main import app
from calumma.model import load
from calumma.model.convert import export_hugging_face
from calumma.platform.specification import Tracking
from calumma.platform.tracking import registry

TALK = {"messages": [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "answer"}]}


@pytest.mark.cluster
def test_one_command_tunes_registers_and_says_how_to_serve(
    ray_cluster: None, model_directory: Path, tutorial: Path, tmp_path: Path
) -> None:
    out, mlflow = tmp_path / "poet", f"sqlite:///{tmp_path}/mlflow.db"
    words = ["finetune", str(model_directory), str(tutorial / "adding.jsonl"), "--out", str(out), "--steps", "2"]
    words += ["--lora", "2", "--dora"]
    words += ["--tracking-uri", mlflow, "--held-out", "0.2", "--samples", "1", "--lr", "0.05"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert f"calumma serve start models:/poet@champion --tracking-uri {mlflow}" in first.output
    page = (out / "report.html").read_text()
    assert all(said in page for said in ("plus", "before", "after", "calumma serve start"))
    registered = registry.model_source("models:/poet@champion", Tracking(uri=mlflow))
    tuned, base = load(registered), load(model_directory)
    beside = peft.PeftModel.from_pretrained(base.transformer, str(out / "tuned" / "adapter")).eval()  # type: ignore[arg-type]
    tokens = torch.tensor([tuned.encoder.text_tokenizer.encode("Draw one plus two.")])
    expected = tuned.transformer(tokens)
    torch.testing.assert_close(beside(tokens), expected, rtol=0, atol=1e-5)
    assert not torch.equal(load(model_directory).transformer(tokens), expected)
    assert yaml.safe_load((out / "finetune.yaml").read_text())["lora"] == {"rank": 2, "alpha": 4.0, "dora": True}

    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert "already done, kept" in again.output
    other = CliRunner().invoke(app, [*words[:-1], "0.01"])
    assert other.exit_code == 1
    assert "run with --force, which discards them" in other.output


@pytest.mark.cluster
def test_pairs_of_answers_are_learned_from(ray_cluster: None, model_directory: Path, tmp_path: Path) -> None:
    data, out, mlflow = tmp_path / "pairs.jsonl", tmp_path / "preferred", f"sqlite:///{tmp_path}/mlflow.db"
    pairs = [{"prompt": f"Question {n}?", "chosen": f"answer {n}", "rejected": "no answer"} for n in range(14)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    export_hugging_face(model_directory, tmp_path / "hf")  # as a checkpoint of others comes
    words = ["finetune", str(tmp_path / "hf"), str(data), "--out", str(out), "--steps", "6", "--lr", "0.01"]
    words += ["--tracking-uri", mlflow, "--held-out", "0.3", "--beta", "0.5"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "100.0% of the pairs the right way round" in found.output
    assert len(list((out / "tuned" / "reference").iterdir())) == 1  # of all pairs, kept
    assert not load(out / "base").image_tokenizer.config.decoder
    spec = yaml.safe_load((out / "finetune.yaml").read_text())
    assert spec["preference"] == {"beta": 0.5}
    assert "already done, kept" in CliRunner().invoke(app, words).output


@pytest.mark.parametrize("asked", [("--preference", "dpo"), ("--image-weight", "0.5")])
def test_pairs_are_asked_for_only_where_there_are_some(
    asked: tuple[str, str], model_directory: Path, tmp_path: Path
) -> None:
    data = tmp_path / "talks.jsonl"
    data.write_text(json.dumps(TALK) + "\n")
    words = ["finetune", str(model_directory), str(data), "--out", str(tmp_path / "out"), *asked]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 1
    assert f"{asked[0]} takes pairs, records with `chosen` and `rejected`, and it has none" in found.output
