"""Checkpoints: written by all workers while training goes on, read by any number of them at any stage of ZeRO."""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import signal
import threading
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.exceptions import ConnectionClosedError

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.storage.client import s3_client
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.checkpoints import catalog, resumption, saver
from calumma.platform.training.checkpoints.saver import Saver
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import deepspeed_settings, engine
from calumma.platform.training.steps.held_out import HeldOutBatch
from calumma.platform.training.trainable import parameters

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32, vocabulary_size=50, dropout=0.1)
VOCABULARY = Vocabulary(
    size=50, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(40, 50))
)
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


def rows(step: int, number: int) -> HeldOutBatch:
    """A micro-batch that can be learned: the next token is the last plus a number that the row begins with."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    stride = torch.randint(1, 4, (2, 1), generator=generator)
    tokens = (torch.randint(0, 50, (2, 1), generator=generator) + stride * torch.arange(17)) % 50
    return HeldOutBatch(
        tokens, torch.rand(2, 17, generator=generator) < 0.3 + 0.1 * number, torch.zeros_like(tokens), number
    )


def join(rank: int, world: int, meeting: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)


def started(spec: PretrainSpecification, world: int, seed: int = 0) -> Any:
    assert spec.model is not None
    shape = spec.model.model_copy(update={"vocabulary_size": SHAPE.vocabulary_size})
    model = parameters.set_trainable(Transformer(shape).initialize(seed), spec, VOCABULARY)
    return engine.initialize(model, spec, world)


def steps(run: Any, spec: PretrainSpecification, world: int, rank: int, first: int, last: int) -> list[list[float]]:
    """Optimizer steps of a fixed plan: [step, mean loss, gradient norm] each, and the micro-batches used."""
    image_mask_V = torch.arange(50) >= 40
    empty = HeldOutBatch(*(torch.zeros(0, 17, dtype=kind) for kind in (torch.long, torch.bool, torch.long)))
    seen = []
    for step in range(first, last):
        group = [rows(step, number) for number in range(rank, MICRO_BATCHES, world)]
        group += [empty] * (deepspeed_settings.micro_batches_a_worker(spec, world) - len(group))
        engine.set_learning_rate(run, RATES[step])
        counts = engine.count_tokens(group, image_mask_V, run.device)
        local, _ = engine.step(run, group, counts, image_mask_V, 1e-4, world, (0, step))
        text, image, _ = engine.sum_over_workers(local).tolist()[:3]
        seen.append([step, (text + image) / counts.trained, float(run.get_global_grad_norm())])
    return seen


def part_of_a_run(
    rank: int, world: int, stage: int, first: int, last: int, output: str, fields: dict[str, Any], notes: str
) -> None:
    """One group of workers: from the newest checkpoint on, and a checkpoint at the end. Losses go to a file."""
    join(rank, world, f"{notes}-meeting-{first}-{last}")
    spec = specification(output, zero_stage=stage, **fields)
    found = resumption.agreed_checkpoint(output, spec, {})
    assert (found.step if found else 0) == first
    # Nothing of a later group's own start may be left, but for weights that no checkpoint holds.
    run = started(spec, world, seed=0 if spec.lora else first)
    read = count_reads()
    if found:
        resumption.load(run, found, spec=spec)
    Path(f"{notes}-{first}-{rank}.read").write_text(str(sum(read)))
    seen = steps(run, spec, world, rank, first, last)
    report = {"step": last, "schedule_step": last, "tokens": {}, "loss": seen[-1][1]}
    saver.save(run, catalog.checkpoint_uri(output, last), spec, {}, report)
    if rank == 0:
        Path(f"{notes}-{first}.json").write_text(json.dumps(seen))


def count_reads() -> list[int]:
    """Bytes of each range and each small file that this process reads from here on."""
    asked, read_range, read_bytes = list[int](), storage.read_range, storage.read_bytes

    def range_counted(uri: str, offset: int, length: int, *given: Any) -> bytes:
        asked.append(length)
        return read_range(uri, offset, length, *given)

    def bytes_counted(uri: str) -> bytes:
        asked.append(len(data := read_bytes(uri)))
        return data

    storage.read_range, storage.read_bytes = range_counted, bytes_counted  # type: ignore[assignment]
    return asked


def report(step: int, **fields: Any) -> dict[str, Any]:
    return {"step": step, "schedule_step": step, "tokens": {}, **fields}


def in_a_group(function: Any, *given: Any) -> None:
    """Run `function(rank, world, ...)` in as many forked processes as its first argument says."""
    for name in ("torch._dynamo", "deepspeed.runtime.engine"):
        importlib.import_module(name)  # once, here, and not in every process

    torch.multiprocessing.start_processes(function, given, nprocs=given[0], start_method="fork")


def trained(notes: str, parts: list[tuple[int, int, int]], output: str = "", **fields: Any) -> list[list[float]]:
    """Losses of a run of several groups, each (workers, ZeRO stage, last step)."""
    first, seen = 0, []
    for world, stage, last in parts:
        in_a_group(part_of_a_run, world, stage, first, last, output or notes, fields, notes)
        seen += json.loads(Path(f"{notes}-{first}.json").read_text())
        first = last
    assert [step for step, *_ in seen] == list(range(first))
    return seen


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """A run of one worker that never changed."""
    return trained(str(tmp_path_factory.mktemp("straight") / "run"), [(1, 1, 16)])


def test_a_run_changes_its_workers_and_its_zero_stage_and_keeps_its_losses(
    tmp_path: Path, straight: list[list[float]]
) -> None:
    """1 -> 2 -> 3 -> 2 -> 1 workers and all stages of ZeRO: the optimizer's moments, steps and each group's weight
    decay go along, so that losses and gradient norms stay those of the run that never changed."""
    changed = trained(str(tmp_path / "changed"), [(1, 1, 3), (2, 0, 6), (3, 3, 9), (2, 2, 12), (1, 0, 14), (2, 3, 16)])
    for (step, loss, norm), (_, other_loss, other_norm) in zip(straight, changed, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-3), f"step {step}"
        assert other_norm == pytest.approx(norm, rel=1e-2), f"step {step}"
    assert straight[-1][1] < straight[0][1] - 0.5


def test_workers_read_little_more_than_the_state_whatever_wrote_it(tmp_path: Path) -> None:
    """Twelve bytes a parameter, counted where storage is asked, by all workers together."""
    shape = SHAPE.model_copy(update={"width": 128, "ffn_width": 512, "vocabulary_size": 50})
    notes = str(tmp_path / "run")
    trained(notes, [(1, 1, 1), (2, 3, 2), (3, 3, 3), (2, 0, 4)], model=shape.model_dump(exclude={"vocabulary_size"}))
    state = 12 * sum(p.numel() for p in Transformer(shape).parameters())
    for first, world in ((1, 2), (2, 3), (3, 2)):
        read = sum(int(Path(f"{notes}-{first}-{rank}.read").read_text()) for rank in range(world))
        assert state <= read <= 1.1 * state, f"{read / state:.3f} of the state"
    newest = catalog.newest(notes)
    assert newest is not None
    assert not catalog.find_damage(newest.uri, newest.manifest)


def test_weights_that_are_kept_in_bfloat16_change_hands_without_rounding_their_masters(tmp_path: Path) -> None:
    straight = trained(str(tmp_path / "straight"), [(1, 1, 6)], precision="bfloat16")
    changed = trained(str(tmp_path / "changed"), [(2, 1, 3), (1, 3, 6)], precision="bfloat16")
    for (step, loss, _), (_, other, _) in zip(straight, changed, strict=True):
        assert other == pytest.approx(loss, rel=1e-3), f"step {step}"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_without_zero_the_number_of_workers_changes_too(tmp_path: Path, kind: str) -> None:
    fields: dict[str, Any] = {"optimizer": {"kind": kind, "learning_rate": 0.003}}
    straight = trained(str(tmp_path / "straight"), [(1, 0, 4)], **fields)
    changed = trained(str(tmp_path / "changed"), [(2, 0, 2), (1, 0, 4)], **fields)
    expected = [values[1] for values in straight]
    assert [values[1] for values in changed] == pytest.approx(expected, rel=1e-3)


def test_adapters_and_the_frozen_weights_below_them_change_hands_too(tmp_path: Path) -> None:
    """An optimizer knows the adapters and the image rows only; the weights that it does not know go along."""
    fields: dict[str, Any] = {"lora": {"rank": 4}, "trainable": "image_head", "optimizer": {"learning_rate": 0.02}}
    straight = trained(str(tmp_path / "straight"), [(1, 1, 6)], **fields)
    changed = trained(str(tmp_path / "changed"), [(2, 3, 2), (1, 2, 4), (2, 1, 6)], **fields)
    for (step, loss, norm), (_, other_loss, other_norm) in zip(straight, changed, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-3), f"step {step}"
        assert other_norm == pytest.approx(norm, rel=1e-2), f"step {step}"


def test_a_checkpoint_in_s3_changes_hands_too(tmp_path: Path, s3: str, straight: list[list[float]]) -> None:
    """With copies on the host's disk, which are all of it that is read."""
    notes, parts = str(tmp_path / "changed"), [(2, 1, 2), (2, 1, 3), (1, 2, 4)]
    here = {"resources": {"recovery": {"node_local": str(tmp_path / "scratch")}}}
    changed = trained(notes, parts, output=f"{s3}/stage", **here)
    assert [values[1] for values in changed] == pytest.approx([values[1] for values in straight[:4]], rel=1e-3)
    read = sum(int(Path(f"{notes}-2-{rank}.read").read_text()) for rank in range(2))
    state = sum(size for name, size in storage.sizes(f"{s3}/stage").items() if "step-00000002" in name)
    assert read < 0.1 * state


def rolled_back(rank: int, world: int, stage: int, output: str, notes: str) -> None:
    """A group that goes back twice, to another group's checkpoint and to its own; what it saw before and after."""
    join(rank, world, f"{notes}-meeting")
    spec = specification(output, zero_stage=stage)
    run = started(spec, world, seed=1)
    seen = []
    for first in (2, 4):
        found = resumption.agreed_checkpoint(output, spec, {})
        assert found is not None
        assert found.step == first
        resumption.load(run, found)
        seen.append(steps(run, spec, world, rank, first, first + 2))
        refused(run, spec, world, rank, first + 2)
        resumption.load(run, found)
        seen.append(steps(run, spec, world, rank, first, first + 2))
        saver.save(run, catalog.checkpoint_uri(output, first + 2), spec, {}, report(first + 2))
    if rank == 0:
        Path(f"{notes}.json").write_text(json.dumps(seen))


def refused(run: Any, spec: PretrainSpecification, world: int, rank: int, step: int) -> None:
    """A step whose loss is found bad after its backward passes."""
    image_mask_V = torch.arange(50) >= 40
    group = [rows(step, number) for number in range(rank, MICRO_BATCHES, world)]
    counts = engine.count_tokens(group, image_mask_V, run.device)
    engine.step(run, group, counts, image_mask_V, 1e-4, world, accept=lambda sums: False)


def test_a_roll_back_brings_back_weights_and_optimizer(tmp_path: Path, straight: list[list[float]]) -> None:
    """ZeRO 2 and 3 on two workers, first to a checkpoint that one worker wrote at ZeRO 1."""
    output = str(tmp_path / "stage")
    trained(output, [(1, 1, 2)])
    for stage in (2, 3):
        for later in (4, 6):
            storage.delete(catalog.checkpoint_uri(output, later))
        in_a_group(rolled_back, 2, stage, output, f"{output}-{stage}")
        first, again, second, once_more = json.loads(Path(f"{output}-{stage}.json").read_text())
        assert again == [pytest.approx(values, rel=1e-6) for values in first]
        assert once_more == [pytest.approx(values, rel=1e-6) for values in second]
        assert first + second == [pytest.approx(values, rel=1e-3) for values in straight[2:6]]


# -- kills at random, and storage that fails now and then --

EVERY = 3  # steps


def unreliable(chance: random.Random) -> None:
    """From here on writes fail in this process: one in eight of small files, one in forty of S3's many requests."""
    write = storage.write_bytes

    def may_fail(uri: str, data: bytes) -> None:
        if chance.random() < 1 / 8:
            raise storage.StorageError(f"cannot write {uri}: the endpoint does not answer")
        write(uri, data)

    def breaks_off(request: Any, **named: Any) -> None:
        if request.method in ("PUT", "POST") and chance.random() < 1 / 40:
            raise ConnectionClosedError(endpoint_url=request.url)

    storage.write_bytes = may_fail  # type: ignore[assignment]
    os.environ["AWS_MAX_ATTEMPTS"] = "1"
    s3_client().meta.events.register("before-send.s3", breaks_off)


def group_under_fire(
    rank: int, world: int, output: str, notes: str, attempt: int, last: int, kill: bool, fields: dict[str, Any]
) -> None:
    """A group that goes on from the newest whole checkpoint, in a storage that fails now and then. Its first worker
    notes each step that it took; one of its workers, or all at once as where a node is lost, is killed a few steps on,
    at any moment of a step or an upload."""
    join(rank, world, f"{notes}-meeting-{attempt}")
    chance = random.Random(f"{attempt} {rank}")
    spec = specification(output, resources={"keep": {"last": 2}}, **fields)
    found = resumption.agreed_checkpoint(output, spec, {})
    first = found.step if found else 0
    run = started(spec, world)
    if found:
        resumption.load(run, found)
    doomed = None
    if kill and (rank == attempt % world or attempt % 3 == 2):
        doomed = first + random.Random(attempt).randrange(6)
    unreliable(chance)
    keep_few = partial(catalog.retain, output, spec.resources.keep)
    with Saver(spec, {}, retain=keep_few if rank == 0 else None) as saver:
        for step in range(first, last):
            if step == doomed:
                threading.Timer(chance.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGKILL)).start()
            (seen,) = steps(run, spec, world, rank, step, step + 1)
            saver.announce()
            if rank == 0:
                with Path(f"{notes}.jsonl").open("a") as file:
                    file.write(json.dumps([attempt, first, *seen]) + "\n")
            if (step + 1) % EVERY == 0:
                saver.save(run, catalog.checkpoint_uri(output, step + 1), report(step + 1))
    if rank == 0:
        Path(f"{notes}-done").touch()


def survives(tmp_path: Path, output: str, kills: int, resized: bool = False, **fields: Any) -> None:
    """Groups one after the other until the last step is taken; what they saw is what a run saw that lost nobody.
    resized: each has another size and stage of ZeRO; their sums are rounded in other orders, which adds up."""
    notes, last = str(tmp_path / "notes"), 15 * kills  # too far for fewer groups than that
    attempt, killed = 0, 0
    while not Path(f"{notes}-done").exists():
        try:
            stage = {"zero_stage": (3, 1, 2, 0)[attempt % 4]} if resized else {}
            world = 1 + attempt % 3 if resized else 2
            in_a_group(group_under_fire, world, output, notes, attempt, last, killed < kills, fields | stage)
        except torch.multiprocessing.ProcessExitedException as ended:
            killed += ended.signal_name == "SIGKILL"
        except torch.multiprocessing.ProcessRaisedException:  # the other worker saw it first, or storage failed
            pass
        for step in catalog.published_steps(output):  # whatever is published is whole
            Manifest.read(catalog.checkpoint_uri(output, step)).verify(
                catalog.checkpoint_uri(output, step), content=True
            )
        attempt += 1
        assert attempt < 5 * kills + 10
    seen = [json.loads(line) for line in Path(f"{notes}.jsonl").read_text().splitlines()]
    straight = {step: loss for step, loss, _ in trained(str(tmp_path / "straight"), [(2, 1, last)], **fields)}
    near = dict.fromkeys(straight, 1e-6)
    if resized:  # sums in another order: as far as another size alone has led by then, and some times more
        alone = {step: loss for step, loss, _ in trained(str(tmp_path / "alone"), [(1, 0, last)], **fields)}
        apart = accumulate((abs(alone[step] / straight[step] - 1) for step in range(last)), max)
        near = {step: 1e-6 + 10 * distance for step, distance in enumerate(apart)}
    assert killed == kills
    assert sorted({step for _, _, step, *_ in seen}) == list(range(last))
    for _, _, step, loss, _ in seen:  # every time that a step was taken, not only the last
        assert loss == pytest.approx(straight[step], rel=near[step]), f"step {step}"


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])  # twenty: more than a minute
def test_workers_killed_at_random_and_failing_storage_never_cost_a_step(
    tmp_path: Path, kills: int, resized: bool
) -> None:
    survives(tmp_path, str(tmp_path / "stage"), kills, resized)


@pytest.mark.slow  # uploads of tens of megabytes to a server in this process: a minute and more
def test_nor_do_kills_and_faults_within_uploads_in_parts(tmp_path: Path, s3: str) -> None:
    shape = SHAPE.model_copy(update={"width": 256, "ffn_width": 1024})
    survives(tmp_path, f"{s3}/stage", 3, model=shape.model_dump(exclude={"vocabulary_size"}))
