"""The image tokenizer's training goes on after whatever interrupts it, on any number of workers, with the same losses.

One process takes the part of a lone worker; three more are a group. Nothing here starts a cluster.
"""

from __future__ import annotations

import copy
import math
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image
from calumma.model.images import to_image
from calumma.platform import storage
from calumma.platform.shards import documents as document_shards
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tracking.run import Run
from calumma.platform.training.assignment import ImageAssignment
from calumma.platform.training.checkpoints import catalog, resumption, saver
from calumma.platform.training.errors import Stopped, TrainingFailed
from calumma.platform.training.group import control, notice, supervisor
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.images import data
from calumma.platform.training.images.loop import Loop
from calumma.platform.training.images.objective import ImageTraining, StepMeasures
from calumma.platform.training.specification import ImageTokenizerSpecification

IMAGES, HELD_OUT, BATCH, STEPS = 23, 5, 7, 16  # three workers have unequal parts of all of them
LOSS = {  # everything that has state
    "codebook": "ema",
    "ema_decay": 0.9,
    "adversarial": 0.1,
    "adversarial_start": 4,
    "discriminator_channels": 4,
    "discriminator_layers": 2,
}
ALONE = Worker(0, 1, torch.device("cpu"))


def bars(count: int) -> torch.Tensor:
    """ByteTensor [N, 3, 16, 16]: bright bars at different places, no two alike."""
    images = torch.zeros(count, 3, 16, 16, dtype=torch.uint8)
    for i in range(count):
        images[i, i % 3, :, i % 13 : i % 13 + 3] = 255 - i
    return images


def area(image: Any) -> float:
    """A weight that some images have none of."""
    return float(image.getpixel((0, 0)) == (0, 0, 0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Curated images."""
    root = tmp_path_factory.mktemp("storage")
    for name, count in (("curated", IMAGES), ("held-out", HELD_OUT)):
        content = document_shards.to_parquet([Document((Image(to_image(data.as_floats(p))),)) for p in bars(count)])
        storage.write_bytes(f"{root}/{name}/documents.parquet", content)
        Manifest(kind="curated", files=[FileEntry.from_bytes("documents.parquet", content, rows=count)]).write(
            f"{root}/{name}"
        )
    return root


@contextmanager
def group_of_one() -> Iterator[None]:
    """This process as a torch.distributed group: only for a while, or it could not fork those of larger groups."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture
def alone() -> Iterator[None]:
    with group_of_one():
        yield


def specification(root: Path | str, **fields: Any) -> ImageTokenizerSpecification:
    values: dict[str, Any] = {
        "storage": str(root),
        "documents": ["curated"],
        "held_out": ["held-out"],
        "model": ImageTokenizerConfig(
            resolution=16, codebook_size=16, embedding=4, base_channels=8, multipliers=[1, 2], residual_blocks=1
        ),
        "steps": STEPS,
        "batch": BATCH,
        "learning_rate": 3e-3,
        "loss": LOSS,
        "checkpoint_every": 5,
        "held_out_every": 6,
    }
    return ImageTokenizerSpecification.model_validate(values | fields)


class Log:
    """Stands for MLflow: what the steps were told to be, the newest where one was taken twice."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.files: dict[str, Any] = {}
        self.checkpoints: dict[str, tuple[Any, ...]] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.metrics[step] = self.metrics.get(step, {}) | metrics

    def log_image(self, image: Any, path: str) -> None:
        self.files[path] = image.size

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        self.files[path] = values

    def log_checkpoint(self, name: str, *told: Any) -> None:
        self.checkpoints[name] = told

    def log_data(self, *given: Any) -> None: ...

    def back_up(self) -> None: ...

    def close(self) -> None: ...

    @property
    def losses(self) -> dict[int, float]:
        return {step: metrics["loss"] for step, metrics in self.metrics.items() if "loss" in metrics}


class Died(Exception):
    """What stands for kill -9: nothing is tidied up after it but this process's threads."""


def train(
    spec: ImageTokenizerSpecification,
    folder: Path | str,
    worker: Worker = ALONE,
    at: Callable[[Loop, supervisor.Supervisor, int], None] = lambda loop, keeper, step: None,
) -> tuple[Loop, Log]:
    """Train as a group does that starts now; `at` is called before each step."""
    log = Log()
    resume = resumption.agreed_checkpoint(str(folder), spec, {})
    loop = Loop(ImageAssignment(spec, Run("unused", "0"), str(folder), {}, resume), worker, log)  # type: ignore[arg-type]
    usual = loop._step

    def step(keeper: supervisor.Supervisor, number: int) -> None:
        at(loop, keeper, number)
        usual(keeper, number)

    loop._step = step  # type: ignore[method-assign]
    loop.run()
    return loop, log


def dying(when: int) -> Callable[[Loop, supervisor.Supervisor, int], None]:
    def at(loop: Loop, keeper: supervisor.Supervisor, step: int) -> None:
        if step == when:
            keeper.wait_until_published()
            raise Died

    return at


def equal(one: Any, other: Any) -> bool:
    """Whether two states are, to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loop, Log]:
    """A lone worker's run without interruption."""
    with group_of_one():
        return train(specification(root), tmp_path_factory.mktemp("straight"))


# -- one worker --


def test_a_run_that_died_goes_on_bit_for_bit_as_one_that_did_not(
    alone: None, root: Path, straight: tuple[Loop, Log], tmp_path: Path
) -> None:
    spec = specification(root)
    with pytest.raises(Died):
        train(spec, tmp_path, at=dying(13))
    assert catalog.newest_step(str(tmp_path)) == 10
    loop, log = train(spec, tmp_path)
    assert log.losses == {step: loss for step, loss in straight[1].losses.items() if step > 10}
    assert equal(loop.training.whole_state(), straight[0].training.whole_state())
    newest = catalog.newest(str(tmp_path))
    assert newest is not None
    assert [(group["step"], group["workers"]) for group in newest.manifest.report["groups"]] == [(0, 1), (10, 1)]


def test_so_does_one_with_muon(alone: None, root: Path, straight: tuple[Loop, Log], tmp_path: Path) -> None:
    spec = specification(root, optimizer={"kind": "muon"})
    whole, _ = train(spec, tmp_path / "whole")
    with pytest.raises(Died):
        train(spec, tmp_path / "died", at=dying(8))
    loop, _ = train(spec, tmp_path / "died")
    assert equal(loop.training.whole_state(), whole.training.whole_state())
    assert not equal(whole.training.whole_state()["tokenizer"], straight[0].training.whole_state()["tokenizer"])


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(alone: None, root: Path, tmp_path: Path) -> None:
    spec = specification(root)
    with pytest.raises(Died):
        train(spec, tmp_path, at=dying(13))
    (file,) = (tmp_path / "checkpoints/step-00000010").glob(f"*/{saver.REPLICATED_FILE}")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = resumption.agreed_checkpoint(str(tmp_path), spec, {})
    assert found is not None
    assert found.step == 5


def test_as_many_checkpoints_stay_as_are_to_be_kept(alone: None, root: Path, tmp_path: Path) -> None:
    train(specification(root, resources={"keep": {"last": 2, "every": 10}}), tmp_path)
    assert catalog.published_steps(str(tmp_path)) == [16, 15, 10]


def test_a_notice_ends_it_with_a_checkpoint_and_the_same_command_goes_on_to_the_same_end(
    alone: None, root: Path, straight: tuple[Loop, Log], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notice, "_POLL", 0.02)
    spec, line = specification(root, checkpoint_every=100), control.worker_control(str(tmp_path))

    def told(loop: Loop, keeper: supervisor.Supervisor, step: int) -> None:
        if step == 6:
            line.notify("stop", "SIGTERM")
            while keeper._notices is None or keeper._notices.pending is None:
                threading.Event().wait(0.01)

    with pytest.raises(Stopped, match=r"stopped after step 7 \(SIGTERM\).*the same command goes on"):
        train(spec, tmp_path, at=told)
    assert line.acknowledged()
    loop, _ = train(spec, tmp_path)
    assert equal(loop.training.whole_state(), straight[0].training.whole_state())


# -- bad steps --


def broken(
    steps: dict[int, float], usual: Callable[..., StepMeasures], norm: float = 1.0
) -> Callable[..., StepMeasures]:
    """`ImageTraining.look`, whose loss is another one at some steps (from 0)."""

    def look(training: ImageTraining, x: torch.Tensor, step: int) -> StepMeasures:
        found = usual(training, x, step)
        loss = steps.get(step, found.loss)
        changed = found.parts if step not in steps else found.parts | {"reconstruction": loss}
        return StepMeasures(loss, changed, norm if step in steps and math.isfinite(loss) else found.norm)

    return look


@pytest.mark.parametrize(
    ("loss", "norm", "cause"), [(math.nan, 1.0, "loss"), (9.0, 1.0, "spike"), (0.1, math.inf, "gradient")]
)
def test_a_bad_step_is_passed_over(
    alone: None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float, norm: float, cause: str
) -> None:
    states: dict[int, Any] = {}

    def keep(loop: Loop, keeper: supervisor.Supervisor, step: int) -> None:
        if step in (9, 10):
            networks = {name: loop.training.whole_state()[name] for name in ("tokenizer", "discriminator", "average")}
            states[step] = copy.deepcopy(networks)

    monkeypatch.setattr(ImageTraining, "compute_gradients", broken({9: loss}, ImageTraining.compute_gradients, norm))
    faults = {"spike_factor": 5.0, "window": 4}
    loop, log = train(specification(root, faults=faults, steps=13, held_out=[]), tmp_path, at=keep)
    assert equal(states[9], states[10])
    assert [(i["step"], i["cause"]) for i in loop.report["incidents"]] == [(10, cause)]
    assert log.metrics[13]["faults/skipped"] == 1
    assert log.files["faults/step-00000010.json"]["action"] == "skip"


def test_too_many_bad_steps_end_it_with_advice(
    alone: None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ImageTraining, "compute_gradients", broken(dict.fromkeys((3, 4, 5), math.nan), ImageTraining.compute_gradients)
    )
    with pytest.raises(
        TrainingFailed, match=r"before step 6: more than 2 bad steps.*\n.*\n.*\n.*\nLower learning_rate \("
    ):
        train(specification(root, faults={"in_a_row": 2}), tmp_path)


def test_a_roll_back_returns_to_the_last_checkpoint_and_goes_on_with_other_images(
    alone: None, root: Path, straight: tuple[Loop, Log], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[Any] = []

    def keep(loop: Loop, keeper: supervisor.Supervisor, step: int) -> None:
        if step == 14:
            after.append(copy.deepcopy(loop.training.whole_state()))

    monkeypatch.setattr(ImageTraining, "compute_gradients", broken({12: math.nan}, ImageTraining.compute_gradients))
    faults = {"action": "roll_back", "around": 1}
    loop, log = train(specification(root, faults=faults), tmp_path, at=keep)
    (incident,) = loop.report["incidents"]
    assert (incident["step"], incident["back_to"], incident["resumed_after"]) == (13, 10, 14)
    found = catalog.newest(str(tmp_path), lambda manifest: manifest.report["step"] == 10)
    assert found is not None
    kept = resumption.read_whole(found)
    assert all(equal(after[0][name], kept[name]) for name in ("tokenizer", "discriminator", "average", "used"))
    assert not equal(after[0]["generator"], kept["generator"])
    assert 14 not in log.losses
    assert log.losses[12] == straight[1].losses[12]
    assert log.losses[STEPS] != straight[1].losses[STEPS]


def test_metrics_pictures_and_checkpoints_are_told(root: Path, straight: tuple[Loop, Log]) -> None:
    loop, log = straight
    names = {"loss", "reconstruction", "adversarial_loss", "discriminator_loss", "learning_rate", "gradient_norm"}
    names |= {"images_per_second", "codes_in_use", "memory/host_gib", "workers", "seconds_left", "faults/skipped"}
    names |= {"seconds/data", "seconds/compute", "seconds/checkpoint", "seconds/evaluation"}
    assert names <= log.metrics[STEPS].keys()
    assert [step for step, metrics in log.metrics.items() if "image_reconstruction_error" in metrics] == [6, 12]
    pictures = [f"samples/step-{step:08d}/reconstructions.png" for step in (6, 12)]
    assert [path for path in log.files if path.endswith(".png")] == pictures
    assert list(log.checkpoints) == [f"step-{step:08d}" for step in (5, 10, 15, 16)]
    uri, step, metrics, _ = log.checkpoints["step-00000010"]
    assert (uri, step) == (catalog.checkpoint_uri(loop.assignment.output, 10), 10)
    assert metrics == {"loss": log.losses[10], "held_out_loss": log.metrics[6]["image_reconstruction_error"]}


def work(rank: int, world: int, root: str, folder: str, kind: str) -> None:
    """One of a group's workers: all steps straight, and the second half of what a lone worker has begun."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    worker = Worker(rank, world, torch.device("cpu"))
    spec = specification(root, sampling_weight=f"{__name__}:area", steps=10, optimizer={"kind": kind})
    pool = data.Pool(data.read_pool(spec, spec.documents, worker), worker)
    taken = [pool.take(drawn) for drawn in draws()]
    told = {}
    for name in ("together", "half"):
        loop, log = train(spec, f"{folder}/{name}", worker)
        told[name] = {
            "metrics": log.metrics,
            "measured": loop._measured(),
            "codebook": loop.training.tokenizer.codebook.weight.detach(),
        }
    torch.save({"taken": taken, "told": told}, f"{folder}/{rank}.pt")


COMPARED = {"loss", "reconstruction", "discriminator_loss", "adversarial_weight", "codes_in_use", "gradient_norm"}


def draws() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(IMAGES, (batch,), generator=generator) for batch in (BATCH, 3, 12)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])  # whose matrices are divided among the workers
def test_three_workers_take_the_steps_of_one_and_go_on_with_its_checkpoint(
    root: Path, tmp_path: Path, kind: str
) -> None:
    # few steps, since rounding grows from one to the next
    spec = specification(root, sampling_weight=f"{__name__}:area", steps=10, optimizer={"kind": kind})
    with group_of_one():
        loop, log = train(spec, tmp_path / "alone")
        with pytest.raises(Died):
            train(spec, tmp_path / "half", at=dying(7))
    torch.multiprocessing.start_processes(work, (3, str(root), str(tmp_path), kind), nprocs=3, start_method="fork")
    workers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]

    images = data.read_pool(spec, spec.documents, ALONE)
    for turn, drawn in enumerate(draws()):
        assert torch.equal(torch.cat([worker["taken"][turn] for worker in workers]), images[drawn])

    for name, first in (("together", 0), ("half", 5)):
        told = [worker["told"][name] for worker in workers]
        assert all(torch.equal(other["codebook"], told[0]["codebook"]) for other in told)
        assert list(told[0]["metrics"]) == list(range(first + 1, 11))
        for step, metrics in told[0]["metrics"].items():
            assert metrics.keys() == log.metrics[step].keys()
            for key in COMPARED & metrics.keys():
                assert metrics[key] == pytest.approx(log.metrics[step][key], rel=1e-3), (name, step, key)
        assert told[1]["measured"] == told[0]["measured"] | {"measured_images": HELD_OUT}
        expected = loop._measured()["image_reconstruction_error"]
        assert told[0]["measured"]["image_reconstruction_error"] == pytest.approx(expected, rel=1e-3)
