"""What a stage starts from: another's end, verified; a checkpoint; and a branch of a training that diverged."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training import stage, starting
from calumma.platform.training.checkpoints import catalog, resumption
from calumma.platform.training.construction.sources import CheckpointWeights, Wanted
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.preparation import prepare


@pytest.fixture
def earlier(scenarios: Any, tmp_path: Path) -> Path:
    """A copy of a finished stage, to be damaged."""
    shutil.copytree(Path(scenarios.root, "stages/straight"), tmp_path / "earlier")
    return tmp_path / "earlier"


def next_stage(scenarios: Any, earlier: Path, **fields: Any) -> Any:
    spec = scenarios.specification("next", initial=str(earlier), model=None, **fields)
    return prepare(spec, scenarios.runs["straight"][0])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 5] ^= 1  # of a checkpoint's: within the weights, which come first
    path.write_bytes(data)


def start(rank: int, folder: str, continued: Any, named: Any) -> None:
    """In a process of its own, as DeepSpeed leaves its groups behind: what is said of damaged and mended files."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    said, alone, dog = [], Worker(0, 1, torch.device("cpu")), Watchdog(600.0, lambda stacks: None)
    for assignment, part in (
        (continued, Path(continued.continued.files, "part-00000.safetensors")),
        (named, Path(named.initial_checkpoint.files, "part-00000.safetensors")),
    ):
        for _ in ("damaged", "mended"):
            flip_a_bit(part)
            try:
                starting.start_engine(assignment, alone, dog)
                said.append("started")
            except TrainingFailed as error:
                said.append(str(error))
    Path(folder, "said.json").write_text(json.dumps(said))


def test_a_flipped_bit_in_what_is_started_from_ends_the_stage_before_its_first_step(
    scenarios: Any, earlier: Path, tmp_path: Path
) -> None:
    weights = next_stage(scenarios, earlier)
    starting.require_undamaged_start(weights)
    flip_a_bit(earlier / "model/model.safetensors")
    with pytest.raises(TrainingFailed, match=r"earlier/model is damaged.*model\.safetensors is not what"):
        starting.require_undamaged_start(weights)

    continued = next_stage(scenarios, earlier, continue_schedule=True)
    assert continued.offset == 20
    named = next_stage(scenarios, earlier / "checkpoints/step-00000016")
    torch.multiprocessing.spawn(start, (str(tmp_path), continued, named), nprocs=1)
    said = json.loads((tmp_path / "said.json").read_text())
    assert re.search(r"step-00000020 is damaged.*part-00000.* not what was written", said[0])
    assert re.search(r"step-00000016.* is damaged.*part-00000.* not what was written", said[2])
    assert (said[1], said[3]) == ("started", "started")
    assert catalog.newest_step(str(earlier)) == 20, "another stage's checkpoint is not set aside"


def test_an_end_that_is_not_whole_is_refused_and_no_earlier_checkpoint_takes_its_place(
    scenarios: Any, earlier: Path
) -> None:
    end = Path(catalog.checkpoint_uri(str(earlier), 20))
    next(end.rglob("part-00000.safetensors")).unlink()
    with pytest.raises(SpecificationError, match=r"the checkpoint at the end of .*earlier is not whole: .*part-00000"):
        next_stage(scenarios, earlier, continue_schedule=True)
    shutil.rmtree(end)
    with pytest.raises(
        SpecificationError, match=r"newest checkpoint of .*earlier is after step 16 of 20.*step-00000016"
    ):
        next_stage(scenarios, earlier, continue_schedule=True)
    shutil.rmtree(earlier / "model")
    with pytest.raises(
        SpecificationError, match=r"neither a finished stage.*after step 16 of 20: finish.*step-00000016"
    ):
        next_stage(scenarios, earlier)
    named = next_stage(scenarios, earlier / "checkpoints/step-00000016", continue_schedule=True)
    assert named.offset == 16


def test_a_stage_starts_from_any_checkpoint(scenarios: Any) -> None:
    first = scenarios.history("from a checkpoint", "loss")
    straight = scenarios.history("straight", "loss")
    assert first[1] < (straight[12] + straight[16]) / 2
    architecture = Manifest.read(f"{scenarios.root}/stages/straight/checkpoints/step-00000016").report["architecture"]
    assert architecture["vocabulary_size"] > 0


# -- branches --


def test_a_diverged_training_goes_on_from_an_earlier_checkpoint_with_another_learning_rate(scenarios: Any) -> None:
    failed, went_on = scenarios.outcomes["diverged"]
    assert "training diverged before step 11" in failed["error"]
    assert "resume: {from: 8, allow: [learning_rate]}" in failed["error"]
    report = went_on["report"]
    assert report["step"] == 20
    assert report["incidents"] == [], "those of the steps that were left"
    (branch,) = report["branches"]
    assert branch["step"] == 8
    assert branch["of_run"] == scenarios.runs["diverged"][0].id
    assert branch["changed"] == {"optimizer.learning_rate": {"was": 0.02, "is": 0.01}}
    rates = {m.step: m.value for m in scenarios.runs["diverged"][1].client.get_metric_history(
        scenarios.runs["diverged"][1].id, "learning_rate")}  # fmt: skip
    assert sorted(rates) == [9, 10, 12, 14, 16, 18, 20]
    assert set(rates.values()) == {0.01}
    newest = catalog.newest(f"{scenarios.root}/stages/diverged")
    assert newest is not None
    assert newest.manifest.report["branches"] == [branch]


def test_a_branch_is_recorded_and_what_it_leaves_is_set_aside(scenarios: Any, earlier: Path) -> None:
    (run,) = scenarios.runs["straight"]
    own = {"output": str(earlier), "optimizer": {"learning_rate": 0.001}}
    spec = scenarios.specification("straight", **own, resume={"from": 12, "allow": ["learning_rate"]})
    assignment = prepare(spec, run)
    assert assignment.first_step == 12
    assert catalog.newest_step(str(earlier)) == 20, "preparing changes nothing"
    stage._begin(assignment)
    assert catalog.published_steps(str(earlier)) == [12]
    assert (Path(catalog.checkpoint_uri(str(earlier), 16)) / catalog.SUPERSEDED).exists()
    tags = run.client.get_run(run.id).data.tags
    assert tags["calumma.branch.from"] == catalog.checkpoint_uri(str(earlier), 12)
    assert tags["calumma.branch.step"] == "12"
    assert tags["calumma.branch.of_run"] == run.id
    assert tags["calumma.branch.changed"] == "optimizer.learning_rate: 0.02 -> 0.001"
    assert "branch.json" in [artifact.path for artifact in run.client.list_artifacts(run.id)]
    # Killed before its first checkpoint, it begins there again; with one of its own it goes on from that.
    assert prepare(spec, run).begins_branch
    found = resumption.agreed_checkpoint(str(earlier), spec, assignment.inputs, assignment.origin)
    assert found is not None
    assert found.step == 12
    shutil.copytree(catalog.checkpoint_uri(str(earlier), 12), catalog.checkpoint_uri(str(earlier), 18))
    manifest = Manifest.read(catalog.checkpoint_uri(str(earlier), 18))
    settings = spec.model_dump(mode="json")
    manifest.model_copy(
        update={"specification": settings, "report": manifest.report | {"step": 18}}
    ).write(catalog.checkpoint_uri(str(earlier), 18))  # fmt: skip
    again = prepare(spec, run)
    assert (again.first_step, again.begins_branch) == (18, False)
    without = scenarios.specification("straight", **own)  # whoever takes the line away again stays on the branch
    assert prepare(without, run).first_step == 18


@pytest.mark.parametrize("named", ["the folder", "the output", "the run"])
def test_a_branch_may_begin_at_another_output_by_checkpoint_or_run(scenarios: Any, tmp_path: Path, named: str) -> None:
    (run,) = scenarios.runs["straight"]
    start = {
        "the folder": "stages/straight/checkpoints/step-00000020",
        "the output": "stages/straight",
        "the run": run.id,
    }[named]
    fields = {"output": str(tmp_path / "new"), "steps": 30, "micro_batches": 4}
    spec = scenarios.specification("straight", **fields, resume={"from": start, "allow": ["steps", "micro_batches"]})
    assignment = prepare(spec, run)
    assert (assignment.first_step, assignment.begins_branch) == (20, True)
    assert assignment.branch is not None
    assert assignment.branch["changed"].keys() == {"steps", "micro_batches"}


@pytest.mark.parametrize(
    ("fields", "resume", "said"),
    [
        ({"seed": 1}, {"from": 12}, r"seed was 0 and is 1\. .*resume\.allow: \[seed\]"),
        (
            {"z_loss": 0.5, "seed": 1},
            {"from": 12, "allow": ["seed"]},
            r"z_loss was 1e-05 and is 0\.5.*\[seed, z_loss\]",
        ),
        ({}, {"from": 13}, r"has none after step 13; there are: .*12, 16, 20"),
        ({}, {"from": "stages/nowhere"}, r"there is no checkpoint at .*stages/nowhere"),
        ({}, {"from": "0" * 32}, r"has no run 0{32}"),
        ({}, {"from": 20}, r"is after step 20 and `steps` is 20"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(
    scenarios: Any, earlier: Path, fields: dict[str, Any], resume: dict[str, Any], said: str
) -> None:
    spec = scenarios.specification("straight", output=str(earlier), resume=resume, **fields)
    with pytest.raises(SpecificationError, match=said):
        prepare(spec, scenarios.runs["straight"][0])


def test_a_storage_that_has_moved_is_no_other_training(scenarios: Any, tmp_path: Path) -> None:
    """Nor is a slash at its end: what decides is the content."""
    (run,) = scenarios.runs["straight"]
    moved = tmp_path / "moved"
    shutil.copytree(scenarios.root, moved, ignore=shutil.ignore_patterns("mlflow"))
    spec = scenarios.specification("straight")
    for place in (f"{scenarios.root}/", str(moved)):
        assert prepare(spec.model_copy(update={"storage": place}), run).first_step == 20
    (moved / "tokens/train/manifest.json").write_text(
        Manifest.read(f"{moved}/tokens/train").model_copy(update={"report": {"made": "again"}}).model_dump_json()
    )
    with pytest.raises(SpecificationError, match=r"other settings \(mixture\).*resume\.allow: \[mixture\]"):
        prepare(spec.model_copy(update={"storage": str(moved)}), run)


# -- which weights --


def test_the_best_checkpoint_is_published_where_that_is_asked_for(scenarios: Any) -> None:
    report = scenarios.report("best")
    assert report["published_step"] == 8
    losses = scenarios.history("best", "held_out/counting/loss")
    assert losses[10] > losses[8]
    assert report["held_out_loss"] == pytest.approx(losses[8])
    output = f"{scenarios.root}/stages/best"
    best = catalog.best(output)
    assert best is not None
    published = scenarios.weights("best")
    found = {name: torch.zeros(weight.numel()) for name, weight in published.items()}
    source = CheckpointWeights(best.uri, best.manifest)
    source.fill([Wanted(name, 0, target) for name, target in found.items()])
    for name, weight in published.items():
        torch.testing.assert_close(found[name].view(weight.shape), weight)
    assert 8 in catalog.published_steps(output)
    assert not storage.exists(f"{output}/manifest.json")
