"""Tracking: where runs go, what they hold, and models found again through the registry."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_param
from PIL import Image

from calumma.platform.specification import Tracking
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tracking import provenance, registry
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.names import flatten
from calumma.platform.tracking.run import Run
from calumma.platform.tracking.server import TrackingError, connect, resolve_uri
from calumma.platform.training.specification import PretrainSpecification


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """One database for the module: creating it runs all of MLflow's migrations."""
    return Tracking(uri=str(tmp_path_factory.mktemp("mlflow")), experiment="tests")


def specification(server: Tracking, **fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": "/data",
        "mixture": {"tokens/a b": 1.0},
        "output": "stage",
        "steps": 1,
        "micro_batches": 1,
        "model": {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "ffn_width": 8},
    }
    return PretrainSpecification(tracking=server, **(values | fields))


@pytest.fixture
def run(server: Tracking) -> Iterator[Run]:
    with job_run(specification(server)) as current:
        yield current


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_without_a_uri_runs_go_to_the_environments_server_or_below_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(Tracking()) == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert (tmp_path / "mlflow").is_dir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_uri(Tracking()) == "http://server:5000"
    assert resolve_uri(Tracking(uri="sqlite:///own.db")) == f"sqlite:///{tmp_path}/own.db"


def test_a_database_whose_creation_was_stopped_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.db import utils

    def stopped(engine: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_upgrade_db", stopped)
        with pytest.raises(KeyboardInterrupt):
            connect(resolve_uri(Tracking(uri=str(tmp_path)))).search_experiments()
    assert len(connect(resolve_uri(Tracking(uri=str(tmp_path)))).search_experiments()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot create the folder"):
        resolve_uri(Tracking(uri=str(tmp_path / "file" / "mlflow")))


def test_a_run_holds_parameters_metrics_and_pictures_and_ends_as_finished(server: Tracking) -> None:
    with job_run(specification(server, run_name="stage1")) as run:
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_metrics({"loss": 1.0}, step=2)
        run.log_image(Image.new("RGB", (4, 4), "red"), "samples/0.png")
        assert run.latest() == {"loss": 1.0}
    found = run.client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "stage1"
    assert found.data.params["mixture.tokens/a b"] == "1.0"
    assert found.data.params["model.layers"] == "1"
    assert [m.step for m in run.client.get_metric_history(run.id, "loss")] == [1, 2]
    assert [a.path for a in run.client.list_artifacts(run.id, "samples")] == ["samples/0.png"]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")]
)
def test_a_run_that_stops_early_says_how(server: Tracking, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), job_run(specification(server)) as run:
        raise error
    assert run.client.get_run(run.id).info.status == status


def test_artifacts_lie_beside_the_database(run: Run) -> None:
    folder = Path(run.uri.removeprefix("sqlite:///")).parent
    assert run.client.get_run(run.id).info.artifact_uri.startswith((folder / "artifacts").as_uri())


def test_a_run_can_be_written_from_another_process(run: Run) -> None:
    run.log_metrics({"here": 1.0})
    copy = pickle.loads(pickle.dumps(run))
    copy.log_metrics({"there": 2.0})
    assert run.latest() == {"here": 1.0, "there": 2.0}


def test_runs_of_one_project_stand_below_one_run(server: Tracking) -> None:
    project = server.model_copy(update={"project": "the team's model"})
    for job in ("stage1", "stage2"):
        with job_run(specification(project, run_name=job)) as run:
            pass
    below = f"tags.`mlflow.parentRunId` = '{run.client.get_run(run.id).data.tags['mlflow.parentRunId']}'"
    experiment = run.client.get_run(run.id).info.experiment_id
    found = run.client.search_runs([experiment], below)
    assert sorted(each.info.run_name for each in found) == ["stage1", "stage2"]
    parent = run.client.get_run(found[0].data.tags["mlflow.parentRunId"])
    assert (parent.info.run_name, parent.info.status) == ("the team's model", "FINISHED")


def test_the_commit_of_this_code_is_known_and_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.commit.cache_clear()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert provenance.commit()["mlflow.source.git.commit"] == head.stdout.strip()
    provenance.commit.cache_clear()
    monkeypatch.setenv("CALUMMA_COMMIT", "abc")
    assert provenance.commit() == {"mlflow.source.git.commit": "abc"}
    provenance.commit.cache_clear()


def test_a_registered_model_is_found_by_alias_and_by_version(server: Tracking, run: Run, model_directory: Path) -> None:
    assert (
        registry.register(server, "by-alias", str(model_directory), run.id, "champion") == "models:/by-alias@champion"
    )
    again = registry.register(server, "by-alias", str(model_directory), run.id)
    assert again == "models:/by-alias/1", "one run's model is one version, however often it is sent"
    for uri in ("models:/by-alias@champion", "models:/by-alias/1", str(model_directory)):
        with registry.resolve_model(uri, server) as path:
            assert path == model_directory
    assert run.client.get_model_version("by-alias", "1").run_id == run.id


def test_a_registered_version_outlives_the_next_training_of_its_folder(
    server: Tracking, run: Run, tmp_path: Path
) -> None:
    """Back to version 1 must mean back to its weights."""

    def published(weights: bytes) -> str:
        folder = tmp_path / "stage" / "model"
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {"config.json": b"{}", "model.safetensors": weights}.items():
            (folder / name).write_bytes(data)
        Manifest(kind="model", files=[FileEntry.from_bytes("model.safetensors", weights)]).write(str(folder))
        return str(folder)

    for weights in (b"first", b"second", b"second"):
        registry.register(server, "kept", published(weights), run.id)
    for version, weights in ((1, b"first"), (2, b"second")):
        with registry.resolve_model(f"models:/kept/{version}", server) as path:
            assert (path / "model.safetensors").read_bytes() == weights
            assert Manifest.read(str(path)).kind == "model"
    assert len(list((tmp_path / "stage" / "registered").iterdir())) == 2, "equal models share a copy"


def test_the_alias_moves_to_the_newest_registration(server: Tracking, run: Run, model_directory: Path) -> None:
    registry.register(server, "moving", "/elsewhere", run.id, "champion")
    registry.register(server, "moving", str(model_directory), run.id, "champion")
    assert registry.model_source("models:/moving@champion", server) == str(model_directory)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/known@nobody", r"'known' has versions 1 and aliases @champion"),
        ("models:/known/7", r"'known' has versions 1"),
        ("models:/unknown@champion", r"It has: .*known"),
        ("models:/known", r"models:/NAME@ALIAS"),
        ("/nowhere/at/all", r"there is no model directory"),
    ],
)
def test_a_model_that_is_not_there_is_an_error_that_says_what_is(
    server: Tracking, run: Run, model_directory: Path, uri: str, said: str
) -> None:
    if "known" not in {model.name for model in run.client.search_registered_models()}:
        registry.register(server, "known", str(model_directory), run.id, "champion")
    with pytest.raises(TrackingError, match=said), registry.resolve_model(uri, server):
        pass


def test_a_registered_model_whose_files_are_gone_is_an_error_that_says_where(server: Tracking, run: Run) -> None:
    registry.register(server, "gone", "/data/gone", run.id, "champion")
    with (
        pytest.raises(TrackingError, match="registered as /data/gone"),
        registry.resolve_model("models:/gone@champion", server),
    ):
        pass


def test_a_server_that_cannot_be_used_is_an_error_that_names_it() -> None:
    with pytest.raises(TrackingError, match="nosuch://x"), job_run(specification(Tracking(uri="nosuch://x"))):
        pass


def test_parameter_names_are_what_mlflow_accepts() -> None:
    flat = flatten({"a": {"b": [1, 2], "c d": {}}, "ü(x)": 1, "tracking": Tracking()})
    assert flat == {"a.b": [1, 2], "a.c d": {}, "ü_x_": 1, "tracking.uri": None, "tracking.experiment": "calumma"} | {
        "tracking.project": None,
        "tracking.tensorboard": None,
        "tracking.wandb": None,
    }


def test_a_mixture_of_uris_is_logged_as_parameters(server: Tracking) -> None:
    mixture = {"s3://bucket/x": 1.0, "s3:/bucket/x": 2.0, "tokens/pairs/": 3.0, "tokens/../pairs": 4.0, "/data/x": 5.0}
    with job_run(specification(server, mixture=mixture)) as run:
        pass
    params = run.client.get_run(run.id).data.params
    assert {name: float(value) for name, value in params.items() if name.startswith("mixture.")} == {
        "mixture.s3:/bucket/x": 1.0,
        "mixture.s3:/bucket/x 2": 2.0,
        "mixture.tokens/pairs": 3.0,
        "mixture.tokens/__/pairs": 4.0,
        "mixture./data/x": 5.0,
    }


@given(st.dictionaries(st.text("a./: (ü\n", max_size=8) | st.text(max_size=300), st.integers()))
def test_every_parameter_name_passes_mlflows_check_and_no_value_is_lost(values: dict[str, int]) -> None:
    flat = flatten(values)
    for name in flat:
        _validate_param(name, "1")
    assert list(flat.values()) == list(values.values())
