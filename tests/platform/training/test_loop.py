"""The training loop without a cluster: bad steps, what MLflow is told, held-out losses and samples on the way.

One process of its own takes the part of a worker for every scenario, so that libraries are imported once; two more are
two workers.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.entities import Run as Recorded
from mlflow.entities.logged_model_status import LoggedModelStatus

from calumma.model import load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.shards.row_groups import RowGroupReader, all_micro_batches
from calumma.platform.specification import SpecificationError, Tracking
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tracking import registry
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training import loop, preparation
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine, held_out

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32)
CODES, STEPS = 16, 20


def publish_tokens(uri: str, vocabulary: Vocabulary, number: int, chaos: bool = False) -> None:
    """Row groups of two rows that count upwards, half of them over image ids; with `chaos` the ids are random."""
    random = np.random.default_rng(number)
    ids = np.array([vocabulary.image_ids, vocabulary.text_ids[:CODES]])
    rows = []
    for row in range(2 * number):
        order = random.integers(0, CODES, 33) if chaos else (random.integers(0, CODES) + np.arange(33)) % CODES
        rows.append(ids[row % 2][order].tolist())
    table = pa.table(
        {
            "tokens": pa.array(rows, pa.list_(pa.int32())),
            "loss_mask": pa.nulls(len(rows), pa.list_(pa.bool_())),
            "segments": pa.array([[0] * 33] * len(rows), pa.list_(pa.int32())),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=2)
    data = file.getvalue()
    storage.write_bytes(f"{uri}/tokens.parquet", data)
    entry = FileEntry.of("tokens.parquet", data, rows=len(rows), row_groups=number, sequences_per_row_group=2)
    Manifest(kind="tokens", files=[entry]).write(uri)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Storage with tokenizers and token shards."""
    root = str(tmp_path_factory.mktemp("storage"))
    text = Path(root, "tokenizers/text")
    text.mkdir(parents=True)
    vocabulary = train_text_tokenizer(["one two three four five six seven"] * 20, str(text), 310, CODES, 1)
    torch.manual_seed(0)
    shape = ImageTokenizerConfig(
        resolution=16, codebook_size=CODES, embedding=4, base_channels=4, multipliers=[1, 1, 1], residual_blocks=1
    )
    ImageTokenizer(shape).save(f"{root}/tokenizers/image")
    for name, number, chaos in (("train", 40, False), ("held-out", 4, False), ("chaos", 4, True)):
        publish_tokens(f"{root}/tokens/{name}", vocabulary, number, chaos)
        for kind in ("text", "image"):
            Manifest(kind=f"{kind}_tokenizer").write(f"{root}/tokenizers/{kind}")
    return root


def specification(root: str, name: str, **fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": root,
        "tracking": {"uri": f"{root}/mlflow", "project": "chameleons"},
        "mixture": {"tokens/train": 1.0},
        "output": f"stages/{name}",
        "run_name": name,
        "model": SHAPE.model_dump(exclude={"vocabulary_size"}),
        "steps": STEPS,
        "micro_batches": 2,
        "optimizer": {"learning_rate": 0.02},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "precision": "float32",
        "checkpoint_every": 4,
        "log_every": 2,
    }
    return PretrainSpecification.model_validate(values | fields)


# What goes wrong: at which steps (from 1) the loss is no number, the gradient is none, or the data is chaos; and before
# which step the worker dies.
Script = dict[str, Any]
SPIKE = {"spike_factor": 2.0, "window": 4}
SCENARIOS: dict[str, list[tuple[dict[str, Any], Script]]] = {
    "straight": [
        (
            {
                "held_out": {"counting": "tokens/held-out"},
                "held_out_every": 8,
                "samples": ["one two"],
                "samples_every": 10,
                "register_as": "counting",
            },
            {},
        )
    ],
    "skip": [({"faults": SPIKE}, {"loss": [7], "gradient": [11], "chaos": [15]})],
    "back": [({"faults": SPIKE | {"action": "roll_back", "around": 2}}, {"chaos": [11]})],
    "back, killed": [
        ({"faults": SPIKE | {"action": "roll_back", "around": 2}}, {"chaos": [11], "dies": 15}),
        ({"faults": SPIKE | {"action": "roll_back", "around": 2}}, {"chaos": [11]}),
    ],
    "back to the start": [({"faults": {"action": "roll_back"}}, {"loss": [2]})],
    "too many": [({"faults": {"in_a_row": 2}}, {"loss": [5, 6, 7]})],
    "too often back": [({"faults": {"action": "roll_back", "in_a_row": 1}, "checkpoint_every": 10}, {"loss": [3, 6]})],
    "lora": [({"lora": {"rank": 4}, "initial": "stages/straight", "model": None, "zero_stage": 3}, {})],
    "lora, killed": [
        ({"lora": {"rank": 4}, "initial": "stages/straight", "model": None, "zero_stage": 3}, {"dies": 15}),
        ({"lora": {"rank": 4}, "initial": "stages/straight", "model": None, "zero_stage": 3}, {}),
    ],
    "image head": [
        ({"trainable": "image_head", "initial": "stages/straight", "model": None, "precision": "bfloat16"}, {})
    ],
}


TOGETHER: dict[str, list[tuple[dict[str, Any], Script]]] = {
    "skip, two workers": SCENARIOS["skip"],
    "back, two workers": SCENARIOS["back"],
}


class Died(Exception):
    """What stands for kill -9."""


def work(rank: int, world: int, root: str, folder: str, runs: dict[str, list[Run]]) -> None:
    """All scenarios for so many workers; their reports and errors go to a file."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ["CALUMMA_OUTBOX"] = f"{folder}/outbox"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world
    )
    loop.join = lambda: Worker(rank, world, torch.device("cpu"))
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for name, parts in (SCENARIOS if world == 1 else TOGETHER).items():
        outcomes[name] = []
        for (fields, script), run in zip(parts, runs[name], strict=True):
            spec = specification(root, name, **fields)
            outcome: dict[str, Any] = {}
            try:
                assignment = preparation.prepare(spec, run)
                scripted(spec, script, assignment.first_step)
                outcome["report"] = loop.train({"assignment": assignment})
            except Exception as error:
                outcome["error"] = f"{type(error).__name__}: {error}"
            outcomes[name].append(outcome)
    Path(folder, f"{rank} of {world}.json").write_text(json.dumps(outcomes))


USUAL = engine.losses


def scripted(spec: PretrainSpecification, script: Script, first: int) -> None:
    """Let the data and the forward pass do what the script says."""
    now = [0]
    places = {name: spec.locate(f"tokens/{name}") for name in ("train", "chaos")}
    rows = {name: all_micro_batches(uri, Manifest.read(uri)) for name, uri in places.items()}

    def data(worker: Worker) -> Iterator[tuple[int, list[Any]]]:
        for step in range(first, spec.steps):
            now[0] = step + 1
            if now[0] == script.get("dies"):
                raise Died(f"before step {now[0]}")
            found = rows["chaos" if now[0] in script.get("chaos", ()) else "train"]
            numbers = range(step * spec.micro_batches + worker.rank, (step + 1) * spec.micro_batches, worker.world)
            yield step, [held_out.read(RowGroupReader(), found[number % len(found)]) for number in numbers]

    def losses(run: Any, batch: Any, image_mask_V: torch.Tensor, **given: Any) -> Any:
        found = USUAL(run, batch, image_mask_V, **given)
        if run.module.training and now[0] in script.get("loss", ()):
            broken = {name: getattr(found.sums, name) * math.nan for name in ("text_nll", "image_nll")}
            return found._replace(sums=found.sums._replace(**broken), total=found.total * math.nan)
        if run.module.training and now[0] in script.get("gradient", ()):
            return found._replace(total=found.total * math.inf)
        return found

    loop._data = data
    engine.losses = losses


@pytest.fixture(scope="module")
def told(root: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """What each scenario returned or raised, and its MLflow runs."""
    folder = str(tmp_path_factory.mktemp("work"))
    runs = {}
    for name, parts in (SCENARIOS | TOGETHER).items():
        runs[name] = []
        for fields, _ in parts:
            with job_run(specification(root, name, **fields)) as run:
                runs[name].append(run)
    for world in (1, 2):
        torch.multiprocessing.spawn(work, (world, root, folder, runs), nprocs=world)
    assert not list(Path(folder, "outbox").glob("*/*")), "something was not sent"
    alone, first, second = (
        json.loads(Path(folder, f"{who}.json").read_text()) for who in ("0 of 1", "0 of 2", "1 of 2")
    )
    for name, (outcome,) in second.items():
        assert outcome["report"]["incidents"] == first[name][0]["report"]["incidents"]
    return alone | first, runs


def report(told: Any, name: str) -> dict[str, Any]:
    last = told[0][name][-1]
    assert "error" not in last, last
    found: dict[str, Any] = last["report"]
    return found


def history(told: Any, name: str, metric: str) -> dict[int, float]:
    """Step -> value, over all runs of a scenario."""
    runs: list[Run] = told[1][name]
    return {m.step: m.value for run in runs for m in run.client.get_metric_history(run.id, metric)}


def weights(root: str, name: str) -> dict[str, torch.Tensor]:
    return load(Path(root, "stages", name, "model")).transformer.state_dict()


# -- what MLflow is told --


def test_metrics_say_how_training_goes_and_where_its_time_goes(told: Any) -> None:
    run = told[1]["straight"][0]
    latest = run.latest()
    names = {"loss", "loss_text", "loss_image", "perplexity", "perplexity_image", "z", "z_loss", "learning_rate"}
    names |= {"gradient_norm", "tokens_per_second", "mfu", "peak_flops_per_second", "memory/host_gib", "workers"}
    names |= {"seconds/data", "seconds/compute", "seconds/checkpoint", "seconds/evaluation", "seconds_left"}
    names |= {"stability/layer_01/query_norm", "stability/log_z", "faults/skipped", "checkpoint_step", "step"}
    assert names <= set(latest)
    losses = history(told, "straight", "loss")
    assert list(losses) == [1, *range(2, STEPS + 1, 2)]
    assert losses[STEPS] < losses[1] - 1
    perplexities = history(told, "straight", "perplexity")
    assert perplexities == pytest.approx({step: math.exp(loss) for step, loss in losses.items()})
    assert latest["z_loss"] == pytest.approx(1e-5 * latest["z"])
    assert 0 < latest["mfu"] < 1
    assert latest["seconds/compute"] > 0
    assert 0.05 < latest["memory/host_gib"] < 64
    assert latest["seconds_left"] == 0


def test_held_out_losses_and_samples_come_on_the_way_and_at_the_end(told: Any) -> None:
    found = history(told, "straight", "held_out/counting/loss")
    assert list(found) == [8, 16, STEPS]
    assert found[STEPS] < found[8]
    assert report(told, "straight")["held_out"]["counting"]["loss"] == pytest.approx(found[STEPS])
    run = told[1]["straight"][0]
    pictures = [a.path for a in run.client.list_artifacts(run.id, "samples")]
    assert pictures == ["samples/00.png", "samples/step-00000010"]
    answers = [a.path for a in run.client.list_artifacts(run.id, "answers")]
    assert answers == ["answers/end.json", "answers/step-00000010.json"]


def test_a_run_stands_below_its_project_and_says_what_it_is_made_of(told: Any, root: str) -> None:
    runs = told[1]
    recorded: list[Recorded] = [runs[name][0].client.get_run(runs[name][0].id) for name in ("straight", "skip")]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in recorded}
    assert runs["skip"][0].client.get_run(parent).info.run_name == "chameleons"
    assert len(recorded[0].data.tags["mlflow.source.git.commit"]) == 40
    inputs = {entry.dataset.name: entry for entry in recorded[0].inputs.dataset_inputs}
    assert inputs.keys() == {"train", "text", "image"}
    assert json.loads(inputs["train"].dataset.source)["uri"] == f"{root}/tokens/train"
    assert {tag.value for tag in inputs["train"].tags} == {"training"}
    run = runs["straight"][0]
    assert [a.path for a in run.client.list_artifacts(run.id, "data")] == ["data/train.json"]
    environment = json.loads(Path(run.client.download_artifacts(run.id, "environment.json")).read_text())
    assert environment["packages"]["torch"] == torch.__version__


def test_checkpoints_are_logged_models_with_their_step_and_metrics(told: Any, root: str) -> None:
    run = told[1]["straight"][0]
    experiment = run.client.get_run(run.id).info.experiment_id
    found = run.client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.id}'")
    by_name = {model.name: model for model in found}
    assert sorted(by_name) == [f"step-{step:08d}" for step in range(4, STEPS + 1, 4)]
    model = by_name["step-00000016"]
    assert model.status == LoggedModelStatus.READY
    assert model.tags["calumma.uri"] == catalog.location(f"{root}/stages/straight", 16)
    metrics = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    assert metrics["checkpoint/loss"] == (pytest.approx(history(told, "straight", "loss")[16]), 16)
    assert metrics["checkpoint/held_out_loss"][0] == pytest.approx(
        history(told, "straight", "held_out/counting/loss")[16]
    )
    outputs = run.client.get_run(run.id).outputs.model_outputs
    assert {output.step for output in outputs} == set(range(4, STEPS + 1, 4))


def test_a_registered_model_says_where_it_comes_from(told: Any, root: str) -> None:
    report(told, "lora")
    run = told[1]["lora"][0]
    uri = registry.register(Tracking(uri=f"{root}/mlflow"), "tuned", f"{root}/stages/lora/model", run.id)
    assert uri == "models:/tuned/1"
    tags = run.client.get_model_version("tuned", "1").tags
    assert tags["calumma.parent"] == "stages/straight"
    assert tags["calumma.step"] == str(STEPS)
    named = {value.rsplit(" ", 1)[0] for name, value in tags.items() if name.startswith("calumma.input.")}
    places = ("tokens/train", "tokenizers/text", "tokenizers/image", "stages/straight/model")
    assert named == {f"{root}/{place}" for place in places}


# -- bad steps --


def incidents(told: Any, name: str) -> list[tuple[int, str, int | None, int | None]]:
    """(step, cause, back to, resumed after) of each, as the report has them; MLflow has the same."""
    found = report(told, name)["incidents"]
    run = told[1][name][-1]
    artifacts = {a.path for part in told[1][name] for a in run.client.list_artifacts(part.id, "faults")}
    assert artifacts == {f"faults/step-{incident['step']:08d}.json" for incident in found}
    return [(i["step"], i["cause"], i["back_to"], i["resumed_after"]) for i in found]


def test_steps_that_are_bad_are_skipped_and_training_goes_on(told: Any) -> None:
    assert incidents(told, "skip") == [(7, "loss", None, None), (11, "gradient", None, None), (15, "spike", None, None)]
    assert told[1]["skip"][0].latest()["faults/skipped"] == 3
    losses = history(told, "skip", "loss")
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[STEPS] < losses[1] - 1
    straight = report(told, "straight")["tokens"]
    assert sum(report(told, "skip")["tokens"].values()) == sum(straight.values()) * (STEPS - 3) / STEPS


def test_a_roll_back_returns_to_the_last_checkpoint_and_goes_around_the_data(told: Any) -> None:
    assert incidents(told, "back") == [(11, "spike", 8, 13)]
    found = report(told, "back")
    assert (found["step"], found["schedule_step"]) == (STEPS, STEPS)
    # Steps 9 and 10 were undone, 11 was bad, 12 and 13 lay around it.
    assert sum(found["tokens"].values()) == sum(report(told, "straight")["tokens"].values()) * (STEPS - 5) / STEPS
    assert history(told, "back", "loss")[STEPS] < history(told, "back", "loss")[1] - 1


@pytest.mark.parametrize("name", ["skip", "back"])
def test_two_workers_come_to_the_verdicts_and_the_weights_of_one(told: Any, root: str, name: str) -> None:
    """Chaos is in the data of both, a loss that is no number as well."""
    assert incidents(told, f"{name}, two workers") == incidents(told, name)
    assert report(told, f"{name}, two workers")["tokens"] == report(told, name)["tokens"]
    expected = weights(root, name)
    for weight, value in weights(root, f"{name}, two workers").items():
        torch.testing.assert_close(value, expected[weight], rtol=0, atol=2e-3)


def test_a_run_that_is_killed_after_a_roll_back_comes_to_the_same_weights(told: Any, root: str) -> None:
    first, second = told[0]["back, killed"]
    assert first["error"] == "Died: before step 15"
    assert incidents(told, "back, killed") == incidents(told, "back")
    expected = weights(root, "back")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(root, "back, killed").items())
    assert second["report"]["tokens"] == report(told, "back")["tokens"]


def test_a_roll_back_before_the_first_checkpoint_returns_to_the_start(told: Any) -> None:
    assert incidents(told, "back to the start") == [(2, "loss", 0, 2)]


@pytest.mark.parametrize(
    ("name", "steps", "rule"),
    [("too many", [5, 6, 7], "more than 2 bad steps in a row"), ("too often back", [3, 6], "more than 1 bad steps")],
)
def test_too_many_bad_steps_in_a_row_end_the_run_with_a_report(
    told: Any, root: str, name: str, steps: list[int], rule: str
) -> None:
    error = told[0][name][0]["error"]
    assert error.startswith(f"TrainingFailed: training diverged before step {steps[-1]}: {rule}")
    assert all(f"step {step}: loss nan" in error for step in steps)
    assert f"{root}/stages/{name}/checkpoints" in error
    run = told[1][name][0]
    assert "faults/report.json" in [a.path for a in run.client.list_artifacts(run.id, "faults")]


# -- a part of the weights --


def test_adapters_are_merged_into_a_plain_model_that_has_learned(told: Any, root: str) -> None:
    found, before = weights(root, "lora"), weights(root, "straight")
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert {name.split(".")[2] for name in changed} == {"attention", "feed_forward"}
    assert history(told, "lora", "loss")[STEPS] < history(told, "straight", "loss")[STEPS]
    small, whole = report(told, "lora")["trained_parameters"], report(told, "lora")["parameters"]
    assert 0 < small < whole == report(told, "straight")["parameters"]


def test_adapters_that_are_killed_and_resumed_come_to_the_same_weights(told: Any, root: str) -> None:
    report(told, "lora, killed")
    for name, weight in weights(root, "lora, killed").items():
        torch.testing.assert_close(weight, weights(root, "lora")[name], rtol=0, atol=1e-6)


def test_an_image_head_changes_the_rows_of_image_ids_alone(told: Any, root: str) -> None:
    report(told, "image head")
    found, before = weights(root, "image head"), weights(root, "straight")
    for name in found.keys() - {"output.weight"}:
        assert torch.equal(found[name].float(), before[name].bfloat16().float()), name
    same = (found["output.weight"].float() == before["output.weight"].bfloat16().float()).all(dim=1)
    vocabulary = Vocabulary.read(f"{root}/tokenizers/text")
    assert (~same).nonzero()[:, 0].tolist() == vocabulary.image_ids


def test_another_choice_of_what_is_trained_cannot_go_on_with_an_optimizer(told: Any, root: str) -> None:
    report(told, "straight")
    fields = {"initial": "stages/straight", "model": None, "continue_schedule": True, "lora": {"rank": 2}}
    with pytest.raises(
        SpecificationError, match="lora: the stage whose optimizer continue_schedule goes on with had None"
    ):
        preparation.prepare(specification(root, "next", **fields), told[1]["straight"][0])
