"""`calumma plan`: every recipe we ship fits the cluster that we describe; answers for people and for programs."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from calumma.jobs.commands.main import app
from calumma.jobs.commands.plan import answers
from calumma.platform.training.forecast.pace import Rates

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "ray_cluster.yaml"
RECIPES = Path(str(resources.files("calumma.jobs"))) / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.name not in ("fast.yaml", "large.yaml"))


def planned(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_fits_the_cluster_file(file: Path) -> None:
    model = "chameleon-7b" if file.parent.name == "extend" else None  # which extends a model of somebody's choice
    found = answers(file, (), None, CLUSTER, model, None, Rates())
    assert found[0].fits, "; ".join(map(str, found[0].problems))


@pytest.mark.parametrize(("model", "gpus"), [("chameleon-7b", 1024), ("chameleon-34b", 3072)])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_at_the_papers_size_no_worker_is_idle(model: str, stage: str, gpus: int) -> None:
    file = RECIPES / model / f"{stage}.yaml"
    (found,) = answers(file, (), f"{gpus // 8}x8xH100", None, None, None, Rates())
    assert found.fits
    assert found.workers == gpus
    assert found.time is not None
    assert found.time.efficiency == 1
    assert not [told for told in found.warnings if "proportional" in told]


def test_a_person_reads_a_table() -> None:
    found = planned(str(RECIPES / "chameleon-34b/stage1.yaml"), "--nodes", "32x8xH100")
    assert found.exit_code == 0
    for word in ("34,294,", "memory a GPU", "network a step", "checkpoint", "restart", "days", "$"):
        assert word in found.stdout, word


def test_a_program_reads_json_and_a_refusal_has_an_exit_code() -> None:
    recipe = str(RECIPES / "chameleon-34b/stage1.yaml")
    found = planned(recipe, "--nodes", "2x8xH100", "--set", "checkpoint_activations=false", "--json")
    assert found.exit_code == 1
    (answer,) = json.loads(found.stdout)
    assert not answer["fits"]
    assert answer["memory"]["activations"] > answer["gpu_memory"] / 4
    assert "checkpoint_activations: true" in answer["problems"][0]["advice"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "no specification file nowhere.yaml"),
        (["RECIPE", "--nodes", "8xGTX"], "--nodes: '8xGTX' is not like 8xH100"),
        (["RECIPE", "--nodes", "8xH100", "--cluster", "x.yaml"], "give one of them"),
        (["RECIPE", "--cluster", "README.md"], "is no cluster file"),
        (["RECIPE", "--set", "zero_stage=4"], "zero_stage"),
        (["RECIPE", "--model", "chameleon-8b", "--nodes", "8xH100"], "--model: no model preset 'chameleon-8b'"),
    ],
)
def test_wrong_questions_are_answered(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = str(RECIPES / "chameleon-7b/stage1.yaml")
    found = planned(*(recipe if each == "RECIPE" else each for each in arguments))
    assert found.exit_code == 1
    assert said in found.stderr


def test_what_a_specification_leaves_open_is_asked_for(tmp_path: Path) -> None:
    alone = tmp_path / "stage2.yaml"
    alone.write_text((RECIPES / "chameleon-7b/stage2.yaml").read_text().replace("s3://calumma/chameleon-7b", "store"))
    nodes = ("--nodes", "2x8xH100")
    assert "--model" in planned(str(alone), *nodes).stderr
    assert "--micro-batch" in planned(str(alone), *nodes, "--model", "chameleon-7b").stderr
    assert planned(str(alone), *nodes, "--model", "chameleon-7b", "--micro-batch", "2").exit_code == 0
