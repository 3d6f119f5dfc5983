"""Checkpoints: written by all workers while training goes on, read by any number of them at any stage of ZeRO."""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform import storage
from calumma.platform.config import PretrainSpecification, Retention
from calumma.platform.data.manifest import FileEntry, Manifest
from calumma.platform.training import checkpoint, engine
from calumma.platform.training.elastic import Saver
from calumma.platform.training.workers import TrainingFailed

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32, vocabulary_size=50, dropout=0.1)
MICRO_BATCHES = 6
RATES = [0.003 * (1 + step % 3) for step in range(1000)]


def specification(output: str, **fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": "/nowhere",
        "mixture": {"tokens": 1.0},
        "output": output,
        "model": SHAPE.model_dump(exclude={"vocabulary_size"}),
        "steps": 1000,
        "micro_batches": MICRO_BATCHES,
        "optimizer": {"learning_rate": 0.003, "eps": 1e-4, "weight_decay": 0.1},
        "precision": "float32",
    }
    return PretrainSpecification.model_validate(values | fields)


@dataclass
class Rows:
    tokens: torch.Tensor
    mask: torch.Tensor
    segments: torch.Tensor


def rows(step: int, number: int) -> Rows:
    """A micro-batch that can be learned: the next token is the last plus a number that the row begins with."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    stride = torch.randint(1, 4, (2, 1), generator=generator)
    tokens = (torch.randint(0, 50, (2, 1), generator=generator) + stride * torch.arange(17)) % 50
    return Rows(tokens, torch.rand(2, 17, generator=generator) < 0.3 + 0.1 * number, torch.zeros_like(tokens))


def join(rank: int, world: int, meeting: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)


def started(spec: PretrainSpecification, world: int) -> Any:
    return engine.initialize(Transformer(SHAPE).initialize(0), spec, world)


def steps(run: Any, spec: PretrainSpecification, world: int, rank: int, first: int, last: int) -> list[list[float]]:
    """Optimizer steps of a fixed plan: [step, mean loss, gradient norm] each, and the micro-batches used."""
    image_mask_V = torch.arange(50) >= 40
    empty = Rows(*(torch.zeros(0, 17, dtype=kind) for kind in (torch.long, torch.bool, torch.long)))
    seen = []
    for step in range(first, last):
        group = [rows(step, number) for number in range(rank, MICRO_BATCHES, world)]
        group += [empty] * (engine.micro_batches_a_worker(spec, world) - len(group))
        engine.set_learning_rate(run, RATES[step])
        counts = engine.count(group, image_mask_V, run.device)
        local, _ = engine.step(run, group, counts, image_mask_V, 1e-4, world, (0, step, rank))
        text, image, _ = engine.everywhere(local).tolist()[:3]
        seen.append([step, (text + image) / counts.trained, float(run.get_global_grad_norm())])
    return seen


def part_of_a_run(
    rank: int, world: int, stage: int, first: int, last: int, output: str, precision: str, notes: str
) -> None:
    """One group of workers: from the newest checkpoint on, and a checkpoint at the end. Losses go to a file."""
    join(rank, world, f"{notes}-meeting-{first}-{last}")
    spec = specification(output, zero_stage=stage, precision=precision)
    run = started(spec, world)
    found = checkpoint.resumption(output, spec, {})
    assert (found.step if found else 0) == first
    if found:
        assert checkpoint.fits(found, spec, world)
        checkpoint.load(run, found)
    seen = steps(run, spec, world, rank, first, last)
    report = {"step": last, "schedule_step": last, "tokens": {}, "loss": seen[-1][1]}
    checkpoint.save(run, checkpoint.location(output, last), spec, {}, report)
    if rank == 0:
        Path(f"{notes}-{first}.json").write_text(json.dumps(seen))


def in_a_group(function: Any, *given: Any) -> None:
    """Run `function(rank, world, ...)` in as many forked processes as its first argument says."""
    for name in ("torch._dynamo", "deepspeed.runtime.engine", "deepspeed.checkpoint.ds_to_universal"):
        importlib.import_module(name)  # once, here, and not in every process

    torch.multiprocessing.start_processes(function, given, nprocs=given[0], start_method="fork")


def trained(
    notes: str, parts: list[tuple[int, int, int]], precision: str = "float32", output: str = ""
) -> list[list[float]]:
    """Losses of a run of several groups, each (workers, ZeRO stage, last step)."""
    first, seen = 0, []
    for world, stage, last in parts:
        in_a_group(part_of_a_run, world, stage, first, last, output or notes, precision, notes)
        seen += json.loads(Path(f"{notes}-{first}.json").read_text())
        first = last
    assert [step for step, *_ in seen] == list(range(first))
    return seen


def test_a_run_changes_its_workers_and_its_zero_stage_and_keeps_its_losses(tmp_path: Path) -> None:
    """2 -> 1 -> 3 workers and ZeRO 1 -> 3 -> 2 -> 1: the optimizer's moments, steps and each group's weight decay go
    along, so that losses and gradient norms stay those of the run that never changed."""
    straight = trained(str(tmp_path / "straight"), [(1, 1, 16)])
    changed = trained(str(tmp_path / "changed"), [(2, 1, 4), (1, 3, 8), (3, 2, 12), (1, 1, 16)])
    for (step, loss, norm), (_, other_loss, other_norm) in zip(straight, changed, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-3), f"step {step}"
        assert other_norm == pytest.approx(norm, rel=1e-2), f"step {step}"
    assert straight[-1][1] < straight[0][1] - 0.5


def test_weights_that_are_kept_in_bfloat16_change_hands_without_rounding_their_masters(tmp_path: Path) -> None:
    straight = trained(str(tmp_path / "straight"), [(1, 1, 6)], "bfloat16")
    changed = trained(str(tmp_path / "changed"), [(2, 1, 3), (1, 3, 6)], "bfloat16")
    for (step, loss, _), (_, other, _) in zip(straight, changed, strict=True):
        assert other == pytest.approx(loss, rel=1e-3), f"step {step}"


def test_a_checkpoint_in_s3_changes_hands_too(tmp_path: Path, s3: str) -> None:
    straight = trained(str(tmp_path / "straight"), [(1, 1, 4)])
    changed = trained(str(tmp_path / "changed"), [(2, 1, 2), (2, 1, 3), (1, 2, 4)], output=f"{s3}/stage")
    assert [values[1] for values in changed] == pytest.approx([values[1] for values in straight], rel=1e-3)


# -- writing, with a stand-in for DeepSpeed's engine that has a state to save --


class Engine:
    """One tensor of state, saved the way DeepSpeed does: through its checkpoint engine."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.checkpoint_engine: Any = None
        self.state = torch.zeros(1000)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        Path(folder, tag).mkdir()
        Path(folder, "zero_to_fp32.py").write_text("print()")
        self.checkpoint_engine.save({"weights": [self.state], "step": 1}, f"{folder}/{tag}/mp_rank_00_model_states.pt")

    def zero_optimization_stage(self) -> int:
        return 1


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A torch.distributed group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def report(step: int, **fields: Any) -> dict[str, Any]:
    return {"step": step, "schedule_step": step, "tokens": {}, **fields}


def saved(run: Engine, output: str, step: int, **fields: Any) -> str:
    """The URI of a published checkpoint whose weights are `step` everywhere."""
    run.state.fill_(step)
    uri = checkpoint.location(output, step)
    checkpoint.save(run, uri, specification(output), {}, report(step, **fields))  # type: ignore[arg-type]
    return uri


def content(output: str, step: int) -> float:
    manifest = Manifest.read(checkpoint.location(output, step))
    manifest.verify(checkpoint.location(output, step), content=True)
    (path,) = [entry.path for entry in manifest.files if entry.path.endswith("model_states.pt")]
    weights = torch.load(Path(checkpoint.location(output, step), path))["weights"][0]
    assert len(weights.unique()) == 1
    return float(weights[0])


def test_training_goes_on_while_a_checkpoint_is_written(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state of when it was saved, and nothing is published before all of it is there."""
    output, run, write, may_write = str(tmp_path / "stage"), Engine(), torch.save, threading.Event()

    def slow(*given: Any, **named: Any) -> None:
        may_write.wait()
        write(*given, **named)

    monkeypatch.setattr(torch, "save", slow)
    told: list[str] = []
    with Saver(specification(output), {}, published=lambda uri, report: told.append(uri)) as saver:
        for step in (1, 2):
            run.state.fill_(step)
            may_write.clear()
            saver.save(run, checkpoint.location(output, step), report(step))  # type: ignore[arg-type]
            run.state.fill_(99)  # the next optimizer step
            assert checkpoint.newest_step(output) == step - 1 or step == 1
            assert not storage.exists(f"{checkpoint.location(output, step)}/manifest.json")
            may_write.set()
            saver.settle()
    assert [content(output, step) for step in (1, 2)] == [1.0, 2.0]
    assert told == [checkpoint.location(output, step) for step in (1, 2)]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_in_use(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output, run = str(tmp_path / "stage"), Engine()
    saved(run, output, 1)
    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", failing)
        with pytest.raises(storage.StorageError, match=r"step-00000002 was not written: .*disk full"):
            saved(run, output, 2)
        assert checkpoint.newest_step(output) == 1
        with pytest.raises(TrainingFailed, match=r"3 checkpoints in a row could not be written: .*disk full"):
            save_without_waiting(run, output, range(3, 8))
    assert "training goes on with the one before it" in caplog.text
    assert checkpoint.newest_step(output) == 1
    saved(run, output, 8)
    assert content(output, 8) == 8.0


def save_without_waiting(run: Engine, output: str, steps: range) -> None:
    with Saver(specification(output), {}) as saver:
        for step in steps:
            saver.save(run, checkpoint.location(output, step), report(step))  # type: ignore[arg-type]


def failing(*given: Any, **named: Any) -> None:
    raise OSError("disk full")


def test_a_checkpoint_in_s3_is_whole(group: None, s3: str) -> None:
    uri = saved(Engine(), f"{s3}/stage", 3)
    manifest = Manifest.read(uri)
    manifest.verify(uri, content=True)
    assert [Path(entry.path).name for entry in manifest.files] == ["mp_rank_00_model_states.pt", "zero_to_fp32.py"]


# -- finding the one to go on with --


def test_one_that_is_not_whole_is_passed_over_and_a_damaged_one_is_set_aside(
    group: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, run = str(tmp_path / "stage"), Engine()
    places = [Path(saved(run, output, step)) for step in (1, 2, 3, 4)]
    storage.write_bytes(f"{checkpoint.location(output, 5)}/abc/state/part.pt", b"killed before its manifest")
    cut, changed = (next(place.rglob("*model_states.pt")) for place in (places[3], places[2]))
    cut.write_bytes(cut.read_bytes()[:-1])
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1  # one bit, same size
    changed.write_bytes(data)

    found = checkpoint.resumption(output, specification(output), {})
    assert found is not None
    assert found.step == 2
    assert "the checkpoint after step 4 is not whole" in caplog.text
    assert "the checkpoint after step 3 is damaged and set aside" in caplog.text
    assert (places[2] / checkpoint.DAMAGED).exists()
    newest = checkpoint.newest(output)
    assert newest is not None
    assert newest.step == 2  # whoever looks from now on agrees, without reading contents


def test_late_writers_of_a_group_that_was_given_up_do_no_harm(group: None, tmp_path: Path) -> None:
    output, run = str(tmp_path / "stage"), Engine()
    spec = specification(output)
    with Saver(spec, {}) as old:
        run.state.fill_(7.5)
        old.save(run, checkpoint.location(output, 7), report(7))  # type: ignore[arg-type]
        saved(run, output, 7)
        old.settle()
    assert content(output, 7) in (7.0, 7.5)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"last": 2}, {7, 8}),
        ({"last": 1, "every": 3}, {3, 6, 8}),
        ({"last": 1, "best": 2}, {2, 5, 8}),
        ({"last": 20}, set(range(1, 9))),
    ],
)
def test_retention_keeps_the_last_every_nth_and_the_best(tmp_path: Path, keep: dict[str, int], left: set[int]) -> None:
    output = str(tmp_path)
    losses = [9.0, 1.0, 8.0, 7.0, 2.0, 6.0, 5.0, 4.0]
    for step, loss in enumerate(losses, start=1):
        storage.write_bytes(f"{checkpoint.location(output, step)}/abc/state/part.pt", b"x")
        files = [FileEntry.of("abc/state/part.pt", b"x")]
        Manifest(kind="checkpoint", files=files, report=report(step, loss=loss)).write(
            checkpoint.location(output, step)
        )
    storage.delete(f"{checkpoint.location(output, 4)}/manifest.json")  # killed while it was written, long ago
    storage.write_bytes(f"{checkpoint.location(output, 9)}/abc/state/part.pt", b"being written")
    assert set(checkpoint.retain(output, Retention.model_validate(keep))) == left - {4}
    there = {int(path.name.removeprefix("step-")) for path in Path(checkpoint.folder(output)).iterdir()}
    assert there == left - {4} | {9}


def test_fields_that_a_checkpoint_is_older_than_do_not_make_it_another_training(tmp_path: Path) -> None:
    spec = specification(str(tmp_path))
    older = spec.model_dump(mode="json")
    del older["resources"], older["z_loss"]
    manifest = Manifest(kind="checkpoint", specification=older, report=report(4))
    assert checkpoint.continues(spec, {})(manifest)
    assert not checkpoint.continues(spec.model_copy(update={"z_loss": 0.5}), {})(manifest)


# -- kills at random, and storage that fails now and then --

EVERY = 3  # steps


def group_under_fire(rank: int, world: int, output: str, attempt: int, last: int, kill: bool) -> None:
    """A group that goes on from the newest whole checkpoint, in a storage where one write in eight fails. Its first
    worker notes each step that it took; one of its workers is killed a few steps on, at any moment of a step."""
    join(rank, world, f"{output}-meeting-{attempt}")
    chance = random.Random(f"{attempt} {rank}")
    write = storage.write_bytes

    def unreliable(uri: str, data: bytes) -> None:
        if chance.random() < 1 / 8:
            raise storage.StorageError(f"cannot write {uri}: the endpoint does not answer")
        write(uri, data)

    spec = specification(output, resources={"keep": {"last": 2}})
    found = checkpoint.resumption(output, spec, {})
    first = found.step if found else 0
    run = started(spec, world)
    if found:
        checkpoint.load(run, found)
    doomed = first + chance.randrange(6) if kill and rank == attempt % world else None
    storage.write_bytes = unreliable  # type: ignore[assignment]
    keep_few = partial(checkpoint.retain, output, spec.resources.keep)
    with Saver(spec, {}, retain=keep_few if rank == 0 else None) as saver:
        for step in range(first, last):
            if step == doomed:
                threading.Timer(chance.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGKILL)).start()
            (seen,) = steps(run, spec, world, rank, step, step + 1)
            if rank == 0:
                with Path(f"{output}.jsonl").open("a") as file:
                    file.write(json.dumps([attempt, first, *seen]) + "\n")
            if (step + 1) % EVERY == 0:
                saver.save(run, checkpoint.location(output, step + 1), report(step + 1))
    if rank == 0:
        Path(f"{output}-done").touch()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])  # twenty: more than a minute
def test_workers_killed_at_random_and_failing_storage_never_cost_a_step(tmp_path: Path, kills: int) -> None:
    output, last = str(tmp_path / "stage"), 15 * kills  # too far for fewer groups than that
    attempt, killed = 0, 0
    while not Path(f"{output}-done").exists():
        try:
            in_a_group(group_under_fire, 2, output, attempt, last, killed < kills)
        except torch.multiprocessing.ProcessExitedException as ended:
            killed += ended.signal_name == "SIGKILL"
        except torch.multiprocessing.ProcessRaisedException:  # the other worker saw it first, or storage failed
            pass
        for step in checkpoint.published(output):  # whatever is published is whole
            Manifest.read(checkpoint.location(output, step)).verify(checkpoint.location(output, step), content=True)
        attempt += 1
        assert attempt < 5 * kills + 10
    notes = [json.loads(line) for line in Path(f"{output}.jsonl").read_text().splitlines()]
    straight = {step: loss for step, loss, _ in trained(str(tmp_path / "straight"), [(2, 1, last)])}
    assert killed == kills
    assert sorted({step for _, _, step, *_ in notes}) == list(range(last))
    for _, _, step, loss, _ in notes:  # every time that a step was taken, not only the last
        assert loss == pytest.approx(straight[step], rel=1e-6), f"step {step}"
