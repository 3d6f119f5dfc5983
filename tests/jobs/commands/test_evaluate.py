"""`calumma evaluate` as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from calumma.jobs.commands.main import app

runner = CliRunner()


def test_a_model_stands_where_the_command_would() -> None:
    found = runner.invoke(app, ["evaluate", "/nowhere/model", "--suite", "papre"])
    assert found.exit_code == 1
    assert "suite: Input should be 'paper', 'safety' or 'none' (given 'papre')" in found.output
    assert "MODEL|URL" in runner.invoke(app, ["evaluate", "run", "--help"]).output


def test_a_model_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path / "none"), "--only", "squad", "--output", str(tmp_path / "out")]
    found = runner.invoke(app, ["evaluate", *arguments], env={"MLFLOW_TRACKING_URI": str(tmp_path / "mlflow")})
    assert found.exit_code == 1
    assert "there is no model directory" in found.output


def test_runs_that_are_none_cannot_be_compared(tmp_path: Path) -> None:
    found = runner.invoke(app, ["evaluate", "compare", str(tmp_path), str(tmp_path)])
    assert found.exit_code == 1
    assert "there is no finished run" in found.output


def test_miniatures_are_written_and_fetched(tmp_path: Path) -> None:
    assert runner.invoke(app, ["evaluate", "data", "miniatures", str(tmp_path / "a")]).exit_code == 0
    arguments = ["evaluate", "data", "fetch", str(tmp_path / "b"), "--mirror", str(tmp_path / "a"), "--only", "squad"]
    assert runner.invoke(app, arguments).exit_code == 0
    assert runner.invoke(app, ["evaluate", "data", "fetch", str(tmp_path / "b"), "--check"]).exit_code == 0
    (tmp_path / "b" / "squad" / "dev-v2.0.json").write_text("{}")
    assert runner.invoke(app, ["evaluate", "data", "fetch", str(tmp_path / "b"), "--check"]).exit_code == 1
