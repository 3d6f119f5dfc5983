"""The whole quickstart at its smallest size, once: documents to HTTP answers, everything it leaves behind, and what a
second call does."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import typer
from mlflow import MlflowClient
from typer.testing import CliRunner, Result

from calumma.jobs.commands.quickstart import quickstart
from calumma.jobs.quickstart import report, steps
from calumma.jobs.quickstart.questions import Answer
from calumma.jobs.quickstart.steps import MEASURED, Options
from calumma.model import load
from calumma.model.document import Image
from calumma.platform.cluster import runner
from calumma.platform.storage.manifest import Manifest

pytestmark = pytest.mark.cluster

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(quickstart)
NAMES = [step.name for step in steps.STEPS]


def call(workdir: Path, *more: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["--fast", "--workdir", str(workdir), *more])


@pytest.fixture(scope="module")
def workdir(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which `calumma quickstart --fast` has run. The wished port is taken: it finds another."""
    folder = tmp_path_factory.mktemp("quickstart") / "work"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = call(folder, "--port", str(taken.getsockname()[1]))
    assert done.exit_code == 0, done.output
    for name in MEASURED.values():
        assert name in done.output
    for place in (folder / report.PAGE, folder / report.RESULTS, folder / "storage/stages/finetuned/model"):
        assert f"  {place}" in done.output.splitlines()
    assert "calumma serve start models:/calumma-quickstart@champion --tracking-uri sqlite:///" in done.output
    return folder


@pytest.fixture
def mlflow(workdir: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{workdir / 'mlflow' / 'mlflow.db'}")


def artifacts(mlflow: MlflowClient, run: str, folder: str | None = None) -> list[str]:
    found: list[str] = []
    for item in mlflow.list_artifacts(run, folder):
        found += artifacts(mlflow, run, item.path) if item.is_dir else [item.path]
    return found


def test_every_step_is_published(workdir: Path) -> None:
    for name in NAMES:
        spec = steps.step_specification(name, Options(workdir, fast=True))
        manifest = runner.reusable_result(spec)
        assert manifest is not None, name
        manifest.verify(spec.output_uri)


def test_results_say_what_was_measured(workdir: Path) -> None:
    found = json.loads((workdir / report.RESULTS).read_text())
    shares = [name for name in MEASURED if name not in ("image_reconstruction_error", "generation_diversity_of_real")]
    assert all(0 <= found[name] <= 1 for name in shares)
    assert found["image_reconstruction_error"] > 0
    assert found["generation_diversity_of_real"] > 0
    assert found["judge_accuracy"] > 0.8  # an honest classifier, whatever the model is worth
    assert {*NAMES, "cluster"} == set(found["seconds"])
    assert found["model_uri"] == "models:/calumma-quickstart@champion"
    evaluated = Manifest.read(str(workdir / "storage" / "evaluation")).report
    assert {k: found[k] for k in evaluated if k in found} == {k: evaluated[k] for k in evaluated if k in found}
    assert evaluated["cases"] == {"recognition": 25, "generation": 20, "interleaved": 30}


def test_the_model_directory_is_whole(workdir: Path) -> None:
    found = json.loads((workdir / report.RESULTS).read_text())
    model = load(found["model_directory"])
    assert model.config.query_key_norm
    assert model.image_length == 16


def test_mlflow_has_a_run_a_step(mlflow: MlflowClient) -> None:
    experiment = mlflow.get_experiment_by_name(steps.DIGITS.name)
    assert experiment is not None
    runs = {run.info.run_name: run for run in mlflow.search_runs([experiment.experiment_id])}
    assert set(runs) == set(NAMES)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert all(run.data.params["storage"] for run in runs.values())
    for stage in ("stage1", "stage2", "finetune"):
        measured = runs[stage].data.metrics
        assert {"loss_text", "loss_image", "tokens_per_second", "gradient_norm", "learning_rate"} <= set(measured)
        made = artifacts(mlflow, runs[stage].info.run_id)
        assert any(path.startswith("samples/") and path.endswith(".png") for path in made), stage
        assert any(path.startswith("checkpoints/") for path in made), stage
    history = mlflow.get_metric_history(runs["stage1"].info.run_id, "loss_image")
    assert [entry.step for entry in history] == [1, 2, 3, 4]
    assert "recognition_accuracy" in runs["evaluate"].data.metrics
    assert "evaluation/generation.png" in artifacts(mlflow, runs["evaluate"].info.run_id)
    assert "codebook_used" in runs["train_image_tokenizer"].data.metrics


def test_the_registered_model_is_the_champion(workdir: Path, mlflow: MlflowClient) -> None:
    version = mlflow.get_model_version_by_alias("calumma-quickstart", "champion")
    assert version.source is not None
    assert (Path(version.source) / "config.json").is_file()
    assert Path(version.source).parent == workdir / "storage" / "stages" / "finetuned" / "registered"


def test_http_answers_hold_pictures_that_decode(workdir: Path) -> None:
    raw = json.loads((workdir / "storage" / "answers" / "answers.json").read_text())
    answers = [Answer.model_validate(answer) for answer in raw]
    assert [a.kind for a in answers] == ["recognition"] * 3 + ["generation"] * 3 + ["interleaved"] * 3
    for answer in answers:
        if answer.kind == "recognition":
            assert answer.picture is not None
            assert {part.kind for part in answer.parts} <= {"text"}
        if answer.kind == "generation":
            (part,) = answer.parts
            assert part.kind == "image"
            assert part.png().startswith(b"\x89PNG")
            assert Image(part.png()).open().size == (32, 32)


def test_the_report_needs_nothing_else(workdir: Path) -> None:
    page = (workdir / report.PAGE).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "url(http" not in page
    assert page.count("<svg ") == 2  # the losses of all stages, the image tokenizer's reconstruction
    assert "Draw a seven." in page
    assert "Which digit is this?" in page
    assert "Made with --fast" in page


def test_a_second_call_skips_what_is_finished(workdir: Path, mlflow: MlflowClient) -> None:
    before = json.loads((workdir / report.RESULTS).read_text())
    (workdir / report.PAGE).unlink()
    done = call(workdir)
    assert done.exit_code == 0, done.output
    for step in steps.STEPS:
        assert f"{step.title}: already done" in done.output
    assert json.loads((workdir / report.RESULTS).read_text()) == before
    assert (workdir / report.PAGE).is_file()
    experiment = mlflow.get_experiment_by_name(steps.DIGITS.name)
    assert experiment is not None
    assert len(mlflow.search_runs([experiment.experiment_id])) == len(NAMES)
