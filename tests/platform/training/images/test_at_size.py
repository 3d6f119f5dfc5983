"""What training the image tokenizer at size needs: streamed images, bfloat16, augmentation, several resolutions, its
optimizer and schedule from the specification."""

from __future__ import annotations

import hashlib
import io
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.platform import storage
from calumma.platform.shards import documents as document_shards
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.images import data, measure
from calumma.platform.training.images.augmentation import seen_in_step
from calumma.platform.training.images.objective import ImageTraining
from calumma.platform.training.images.streaming import ImageStream, image_order
from calumma.platform.training.specification import ImageTokenizerSpecification
from calumma.platform.training.steps.muon import Muon
from tests.platform.training.images import test_resume as interrupted

ALONE = Worker(0, 1, torch.device("cpu"))
SHAPE = ImageTokenizerConfig(
    resolution=16, codebook_size=16, embedding=4, base_channels=8, multipliers=[1, 2], residual_blocks=1
)
IMAGES, SHARDS = 23, 3


def specification(root: Path | str = "/nowhere", **values: Any) -> ImageTokenizerSpecification:
    given = {"storage": str(root), "documents": ["pictures"], "steps": 60, "batch": 5, "model": SHAPE}
    return ImageTokenizerSpecification(**(given | values))


def picture(number: int) -> Image:
    buffer = io.BytesIO()
    PILImage.new("RGB", (16, 16), (number * 10, 0, 0)).save(buffer, "PNG")
    return Image(buffer.getvalue())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Documents of 23 images in three shards; image n has the red value 10 n."""
    entries = []
    for shard in range(SHARDS):
        data = document_shards.to_parquet([Document((picture(n),)) for n in range(shard, IMAGES, SHARDS)])
        name = f"{shard:05d}.parquet"
        storage.write_bytes(f"{tmp_path}/pictures/{name}", data)
        entries.append(FileEntry.from_bytes(name, data, rows=1, row_groups=1))
        assert entries[-1].sha256 == hashlib.sha256(data).hexdigest()
    Manifest(kind="curated", files=entries).write(f"{tmp_path}/pictures")
    return tmp_path


def shards(root: Path) -> list[tuple[str, str]]:
    return [(f"{root}/pictures/{entry.path}", entry.sha256) for entry in Manifest.read(f"{root}/pictures").files]


def reds(batch: torch.Tensor) -> list[int]:
    return [int(value) // 10 for value in batch[:, 0, 0, 0]]


@pytest.mark.parametrize("window", [1, 4, 100])
def test_a_pass_has_every_image_once_in_an_order_of_its_own(root: Path, window: int) -> None:
    order = [image.data for image in islice(image_order(shards(root), 7, window), 3 * IMAGES)]
    passes = [order[at : at + IMAGES] for at in range(0, 3 * IMAGES, IMAGES)]
    everything = {picture(n).data for n in range(IMAGES)}
    assert all(set(each) == everything for each in passes)
    assert passes[0] != passes[1]
    assert order == [image.data for image in islice(image_order(shards(root), 7, window), 3 * IMAGES)]
    assert order != [image.data for image in islice(image_order(shards(root), 8, window), 3 * IMAGES)]


def taken(spec: ImageTokenizerSpecification, worker: Worker, first: int, steps: int) -> list[list[int]]:
    stream = ImageStream(spec, worker, first)
    try:
        return [reds(stream.take()) for _ in range(steps)]
    finally:
        stream.close()


def test_any_number_of_workers_takes_the_same_batches_and_goes_on_where_one_was(root: Path) -> None:
    spec = specification(root, stream=True, stream_window=6)
    alone = taken(spec, ALONE, 0, 9)
    assert [len(batch) for batch in alone] == [5] * 9
    parts = [taken(spec, Worker(rank, 3, torch.device("cpu")), 0, 9) for rank in range(3)]
    assert [[n for part in step for n in part] for step in zip(*parts, strict=True)] == alone
    assert taken(spec, ALONE, 4, 5) == alone[4:]


def test_a_streamed_run_that_died_goes_on_bit_for_bit_and_leaves_the_tokenizer_it_measured(
    root: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"steps": 12, "checkpoint_every": 4, "held_out": ["pictures"], "output": "tokenizer"}
    spec = specification(root, stream=True, stream_window=6, **values)
    with interrupted.group_of_one():
        straight, log = interrupted.train(spec, tmp_path / "straight")
        with pytest.raises(interrupted.Died):
            interrupted.train(spec, tmp_path / "died", at=interrupted.dying(9))
        again, rest = interrupted.train(spec, tmp_path / "died")
        assert rest.losses == {step: loss for step, loss in log.losses.items() if step > 8}
        assert interrupted.equal(again.training.whole_state(), straight.training.whole_state())
        report = again.publish()
        for loop in (straight, again):
            assert isinstance(loop.pool, ImageStream)
            loop.pool.close()
    assert report["training_images"] == 12 * 5  # seen, before it died too
    read = ImageTokenizer.read(root / "tokenizer")
    pixels = data.read_images(document_shards.read_documents(f"{root}/pictures"), 16)
    measured = measure.measure_reconstruction(read, pixels).squared
    assert measured == pytest.approx(report["image_reconstruction_error"], rel=1e-3)


def test_what_a_step_sees_hangs_on_the_place_in_the_batch_alone() -> None:
    spec = specification(
        augmentation={"mirror": 0.5, "smallest_crop": 0.5}, resolutions=[8, 12, 16], loss={"pixels": "l1"}
    )
    x = torch.rand(6, 3, 16, 16)
    whole = [seen_in_step(x, spec, step, 0) for step in range(8)]
    for step, seen in enumerate(whole):
        parts = torch.cat([seen_in_step(x[:2], spec, step, 0), seen_in_step(x[2:], spec, step, 2)])
        assert torch.equal(parts, seen)
    assert {seen.shape[-1] for seen in whole} == {8, 12, 16}
    assert torch.equal(seen_in_step(x, specification(), 3, 0), x)
    mirrored = seen_in_step(x, specification(augmentation={"mirror": 1.0}), 0, 0)
    assert torch.equal(mirrored, x.flip(-1))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", [{}, {"codebook": "ema", "adversarial": 0.1, "discriminator_layers": 1}])
def test_it_learns_at_several_resolutions(precision: str, loss: dict[str, Any]) -> None:
    spec = specification(precision=precision, resolutions=[8, 16], learning_rate=3e-3, batch=8, loss=loss)
    training = ImageTraining(spec, ALONE)
    x = torch.zeros(8, 3, 16, 16)
    for i in range(8):
        x[i, i % 3, :, i : i + 6] = 1
    losses = []
    for step in range(40):
        measures = training.compute_gradients(seen_in_step(x, spec, step, training.first), step)
        training.take_step(3e-3)
        losses.append(measures.parts["reconstruction"])
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert {p.dtype for p in training.tokenizer.parameters()} == {torch.float32}


def test_optimizer_and_schedule_are_those_of_the_specification() -> None:
    optimizer = {"beta1": 0.5, "beta2": 0.8, "eps": 1e-5, "weight_decay": 0.3, "gradient_clip": 1e-9}
    training = ImageTraining(specification(optimizer=optimizer, learning_rate=0.1), ALONE)
    [group] = training._networks["tokenizer"].optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.8), 1e-5, 0.3)
    training.compute_gradients(torch.rand(5, 3, 16, 16), 0)
    norm = torch.stack([p.grad.norm() for p in training.tokenizer.parameters() if p.grad is not None]).norm()
    assert norm < 2e-9


def test_muon_is_the_tokenizers_with_its_momentum_and_a_discriminator_has_adamw() -> None:
    loss = {"adversarial": 0.1, "discriminator_channels": 4, "discriminator_layers": 2}
    for given, momentum in (({}, 0.9), ({"momentum": 0.7}, 0.7)):
        training = ImageTraining(specification(optimizer={"kind": "muon"} | given, loss=loss), ALONE)
        of_tokenizer, of_critic = (training._networks[name].optimizer for name in ("tokenizer", "discriminator"))
        assert type(of_tokenizer) is Muon
        assert type(of_critic) is torch.optim.AdamW
        [own] = [group for group in of_tokenizer.param_groups if group["muon"]]
        assert own["momentum"] == momentum
        assert len(own["params"]) > 5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optimizer": {"momentum": 0.8}}, "`momentum` is Muon's: set `kind: muon`, or `beta1`"),
        ({"resolutions": [15]}, "resolutions: 15 must be a multiple of 2 from 2 to model.resolution, 16"),
        ({"resolutions": [32]}, "resolutions: 32 must be a multiple of 2"),
        ({"stream": True, "sampling_weight": "a:b"}, "leave `stream` out"),
        ({"augmentation": {"mirror": 2}}, "augmentation.mirror"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        specification(**values)
