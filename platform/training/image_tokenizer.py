"""Training of the VQ image tokenizer under Ray Train: the losses of `model/image_losses.py`, AdamW, cosine decay, and
restarts of unused codes (VQ-VAE, arXiv 1711.00937; Jukebox, arXiv 2005.00341, section 3.2; paper 2.1).

Shape suffixes: N images, B a batch of them, C channels, H height, W width, K codebook.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image as PILImage
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from calumma.model.document import Document
from calumma.model.image_losses import CodebookAverage, ImageObjective, PerceptualLoss, discriminator_loss
from calumma.model.image_tokenizer import ImageTokenizer, Reconstruction, preprocess, to_image
from calumma.platform import cluster, storage
from calumma.platform.config import ImageTokenizerSpecification, Schedule, SpecificationError
from calumma.platform.data.manifest import FileEntry, Manifest, entries, fingerprints
from calumma.platform.data.shards import curated, read_documents
from calumma.platform.named import named
from calumma.platform.progress import Progress
from calumma.platform.tracking import BackgroundWriter, Run
from calumma.platform.training import workers
from calumma.platform.training.schedule import learning_rate
from calumma.platform.training.text_tokenizer import check_output, clear
from calumma.platform.training.workers import Worker

logger = logging.getLogger(__name__)
KIND = "image_tokenizer"
_MEMORY = 2 << 30  # bytes of decoded images a worker holds; of a larger set, a random sample
_MEASURED = 20_000  # training images, at most, that count the codes in use
_SHOWN = 16  # held-out images in the picture of reconstructions
_RESTARTING = 0.7  # share of the steps in which unused codes are moved; then the codebook settles


def train_image_tokenizer(spec: ImageTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    """Train and publish the image tokenizer. Raises SpecificationError, TrainingFailed, StorageError."""
    given, spec = spec, workers.absolute(spec)
    number = cluster.require(spec.resources)
    if spec.batch < number:
        raise SpecificationError(f"batch: {spec.batch} images cannot be shared by {number} workers")
    read_from = [spec.locate(uri) for uri in [*spec.documents, *spec.held_out]]
    for uri in read_from:
        curated(uri)
    _weigh(spec)
    _perceptual(spec)
    output = spec.locate(spec.output)
    check_output(spec, output, read_from, KIND)
    report = workers.fit(
        _train,
        {"spec": spec, "run": run},
        workers=number,
        resources=spec.resources,
        name=spec.job,
        run=run,
        steps=spec.steps,
        progress=progress,
    )
    files = [FileEntry.model_validate(entry) for entry in report.pop("files")]
    manifest = Manifest(
        kind=KIND,
        files=files,
        specification=given.model_dump(mode="json"),
        report={**report, "workers": number, "run": run.id},
        inputs=fingerprints(read_from),
    )
    manifest.write(output)
    return manifest


def read_images(
    documents: Iterable[Document],
    resolution: int,
    share: tuple[int, int] = (0, 1),
    seed: int = 0,
    memory: int = _MEMORY,
) -> Tensor:
    """ByteTensor [N, 3, H, W]: every image whose number is `rank` modulo `world`, or, if these take more than `memory`
    bytes, a random sample of as many as fit (reservoir sampling)."""
    rank, world = share
    most = max(1, memory // (3 * resolution**2))
    chance = random.Random(f"{seed} {rank}")
    kept: list[Tensor] = []
    mine = (image for number, image in enumerate(_images(documents)) if number % world == rank)
    seen = 0
    for seen, image in enumerate(mine, start=1):
        place = len(kept) if len(kept) < most else chance.randrange(seen)
        if place >= most:
            continue
        pixels = ((preprocess(image.open(), resolution) + 1) * 127.5).round().byte()
        kept[place : place + 1] = [pixels]
    if seen > most:
        logger.warning("%d images are more than fit in memory; training on a random %d of them", seen, most)
    return torch.stack(kept) if kept else torch.zeros(0, 3, resolution, resolution, dtype=torch.uint8)


def _images(documents: Iterable[Document]) -> Iterator[Any]:
    for document in documents:
        yield from document.images


def sampling_weights(images_NCHW: Tensor, weigh: Callable[[PILImage.Image], float]) -> Tensor:
    """DoubleTensor [N]: how often each image (ByteTensor [N, 3, H, W]) is drawn, relative to the others.

    Raises SpecificationError when a weight is below 0 or not finite, or all are 0.
    """
    weights_N = torch.empty(len(images_NCHW), dtype=torch.double)
    for i, pixels in enumerate(images_NCHW):
        weight = float(weigh(to_image(as_floats(pixels))))
        if not 0 <= weight < math.inf:
            raise SpecificationError(f"sampling_weight: image {i} got the weight {weight}; it must be 0 or more")
        weights_N[i] = weight
    if not weights_N.any():
        raise SpecificationError("sampling_weight: every image got the weight 0, so none can be drawn")
    return weights_N


def _weigh(spec: ImageTokenizerSpecification) -> Callable[[PILImage.Image], float] | None:
    """The function of `sampling_weight`. Raises SpecificationError."""
    return None if spec.sampling_weight is None else named(spec.sampling_weight, "sampling_weight")


def _perceptual(spec: ImageTokenizerSpecification) -> PerceptualLoss | None:
    """The perceptual network, where its weights are given. Raises SpecificationError."""
    if spec.loss.perceptual_weights is None:
        return None
    uri = spec.locate(spec.loss.perceptual_weights)
    if not storage.exists(uri):
        raise SpecificationError(f"loss.perceptual_weights: there is no file {uri}")
    try:
        return PerceptualLoss.of(load(storage.read_bytes(uri)), uri)
    except (SafetensorError, ValueError) as error:
        raise SpecificationError(f"loss.perceptual_weights: {uri}: {error}") from error


def as_floats(pixels_BCHW: Tensor) -> Tensor:
    """ByteTensor -> FloatTensor in [-1, 1], same shape."""
    return pixels_BCHW.float() / 127.5 - 1


class Measured(NamedTuple):
    """How well images are reconstructed: mean squared error of values in [-1, 1], and mean absolute error a pixel and
    channel in 0..255; and which codes they used (BoolTensor [K])."""

    squared: float
    absolute: float
    used_K: Tensor


@torch.inference_mode()
def measure(tokenizer: ImageTokenizer, images_NCHW: Tensor, batch: int = 64) -> Measured:
    """Encode and decode every image (ByteTensor [N, 3, H, W]) as serving does: clamped to what a picture can hold."""
    device = tokenizer.codebook.weight.device
    used_K = torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool)
    squared, absolute = 0.0, 0.0
    for pixels in images_NCHW.split(batch):
        x = as_floats(pixels.to(device))
        codes = tokenizer.encode(x)
        used_K[codes.flatten().cpu()] = True
        difference = tokenizer.decode(codes).clamp(-1, 1) - x
        squared += difference.square().sum().item()
        absolute += difference.abs().sum().item() * 127.5
    values = max(1, images_NCHW.numel())
    return Measured(squared / values, absolute / values, used_K)


def comparison(tokenizer: ImageTokenizer, images_NCHW: Tensor, enlarge: int = 2) -> PILImage.Image:
    """A picture of images (ByteTensor [N, 3, H, W]) above their reconstructions."""
    device = tokenizer.codebook.weight.device
    x = as_floats(images_NCHW.to(device))
    rows = [x, tokenizer.decode(tokenizer.encode(x))]
    size = tokenizer.config.resolution
    canvas = PILImage.new("RGB", (size * len(x), size * len(rows)), "white")
    for y, row in enumerate(rows):
        for x_at, image in enumerate(row):
            canvas.paste(to_image(image), (x_at * size, y * size))
    return canvas.resize((canvas.width * enlarge, canvas.height * enlarge), PILImage.Resampling.NEAREST)


def _train(config: dict[str, Any]) -> dict[str, Any]:
    """The worker's loop; the report (on rank 0, elsewhere empty)."""
    spec: ImageTokenizerSpecification = config["spec"]
    worker = workers.join()
    images = _read(spec, spec.documents, worker)
    torch.manual_seed(spec.seed)  # equal weights on every worker
    tokenizer = ImageTokenizer(spec.model).to(worker.device)
    writer = BackgroundWriter(config["run"]) if worker.leads else None
    try:
        began = time.monotonic()
        _steps(spec, worker, tokenizer, images, writer)
        if writer is None:
            return {"steps": spec.steps}
        report: dict[str, Any] = {"steps": spec.steps, "seconds": time.monotonic() - began}
        report |= _report(spec, tokenizer.eval(), images, writer)
        with tempfile.TemporaryDirectory(prefix="calumma-image-tokenizer-") as folder:
            tokenizer.save(folder)
            report["files"] = [entry.model_dump(mode="json") for entry in entries(folder)]
            clear(spec.locate(spec.output), KIND)
            storage.upload(folder, spec.locate(spec.output))
        return report
    finally:
        if writer is not None:
            writer.close()


def _read(spec: ImageTokenizerSpecification, uris: list[str], worker: Worker | None) -> Tensor:
    documents = (document for uri in uris for document in read_documents(spec.locate(uri)))
    share = (worker.rank, worker.world) if worker else (0, 1)
    images = read_images(documents, spec.model.resolution, share, spec.seed)
    if not len(images):
        found = ", ".join(spec.locate(uri) for uri in uris)
        raise SpecificationError(f"too few images for {share[1]} workers in {found}")
    return images


def _steps(
    spec: ImageTokenizerSpecification,
    worker: Worker,
    tokenizer: ImageTokenizer,
    images: Tensor,
    writer: BackgroundWriter | None,
) -> None:
    schedule = Schedule(kind="cosine", warmup_steps=min(100, spec.steps // 10), final=0.02)
    weigh = _weigh(spec)
    weights_N = None if weigh is None else sampling_weights(images, weigh)
    objective = ImageObjective(spec.loss, spec.commitment, _perceptual(spec)).to(worker.device)
    total = dist.all_reduce if worker.world > 1 else None
    average: CodebookAverage | None = None
    if spec.loss.codebook == "ema":
        tokenizer.codebook.requires_grad_(False)
        average = CodebookAverage(tokenizer.codebook.weight.detach(), spec.loss.ema_decay, total)
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    model = DistributedDataParallel(tokenizer) if worker.world > 1 else tokenizer
    critic = _Critic(spec, objective.discriminator, worker) if objective.discriminator is not None else None
    batch = spec.batch // worker.world + (worker.rank < spec.batch % worker.world)
    share = batch * worker.world / spec.batch  # the mean over the workers weighs every image alike
    generator = torch.Generator().manual_seed(spec.seed * worker.world + worker.rank)
    every = max(1, spec.steps // 50)
    used_K = torch.zeros(spec.model.codebook_size, device=worker.device)
    began = time.monotonic()
    for step in range(spec.steps):
        if weights_N is None:
            pick = torch.randint(len(images), (batch,), generator=generator)
        else:
            pick = torch.multinomial(weights_N, batch, replacement=True, generator=generator)
        x = as_floats(images[pick].to(worker.device))
        if step == 0:  # the codebook starts on latents of real images
            _restart(tokenizer, used_K, x, generator, worker)
        rate = learning_rate(step, spec.learning_rate, schedule, spec.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = model(x)
        losses = objective.tokenizer(found, x, step, tokenizer.last_layer)
        optimizer.zero_grad(set_to_none=True)
        (losses.total * share).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if average is not None:
            average.update(tokenizer.codebook.weight.detach(), found.latents_BNE, found.codes_BN)
        parts = dict(losses.parts)
        if critic is not None and objective.judges(step):
            parts["discriminator_loss"] = critic.step(found, x, rate / spec.learning_rate, share)
        used_K[found.codes_BN.flatten()] = 1.0
        done = step + 1
        if done % every and done != spec.steps:
            continue
        if worker.world > 1:
            dist.all_reduce(used_K)
        if writer is not None:
            seconds = time.monotonic() - began
            metrics = {
                "loss": losses.total.item(),
                **{name: part.item() for name, part in parts.items()},
                "codes_in_use": (used_K > 0).float().mean().item(),
                "learning_rate": rate,
                "images_per_second": done * spec.batch / max(seconds, 1e-9),
                "step": done,
            }
            writer.log(metrics, done)
        if not torch.isfinite(losses.total):
            raise workers.TrainingFailed(f"training diverged before step {done}: lower learning_rate")
        if done < _RESTARTING * spec.steps:
            _restart(tokenizer, used_K, x, generator, worker)
            if average is not None:
                average.forget(used_K == 0)
        used_K.zero_()


class _Critic:
    """Trains the patch discriminator beside the tokenizer."""

    def __init__(self, spec: ImageTokenizerSpecification, discriminator: nn.Module, worker: Worker) -> None:
        self._peak = spec.loss.discriminator_learning_rate or spec.learning_rate
        self._parameters = list(discriminator.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=self._peak, betas=(0.5, 0.9), weight_decay=1e-4)
        self._model = DistributedDataParallel(discriminator) if worker.world > 1 else discriminator

    def step(self, found: Reconstruction, x_BCHW: Tensor, rate: float, share: float) -> Tensor:
        """One optimizer step at `rate` times the peak learning rate; the loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._peak
        loss = discriminator_loss(self._model, found, x_BCHW)
        self._optimizer.zero_grad(set_to_none=True)
        (loss * share).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return loss.detach()


def _restart(
    tokenizer: ImageTokenizer, used_K: Tensor, x_BCHW: Tensor, generator: torch.Generator, worker: Worker
) -> None:
    """Move unused codes onto latents of the first worker's batch, on every worker alike."""
    if worker.leads:
        tokenizer.restart_dead_codes(used_K > 0, x_BCHW, generator)
    if worker.world > 1:
        dist.broadcast(tokenizer.codebook.weight.data, src=0)


def _report(
    spec: ImageTokenizerSpecification, tokenizer: ImageTokenizer, images: Tensor, writer: BackgroundWriter
) -> dict[str, Any]:
    """Reconstruction on held-out images (of training images where there are none) and the share of codes in use."""
    trained = measure(tokenizer, images[:_MEASURED])
    shown = _read(spec, spec.held_out, None) if spec.held_out else images
    held_out = measure(tokenizer, shown) if spec.held_out else trained
    report = {
        "image_reconstruction_error": held_out.squared,
        "pixel_error": held_out.absolute,
        "measured_on": "held_out" if spec.held_out else "documents",
        "measured_images": len(shown),
        "codebook_used": (trained.used_K | held_out.used_K).float().mean().item(),
        "training_images": len(images),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
    }
    writer.log({key: value for key, value in report.items() if isinstance(value, float)}, spec.steps)
    writer.log_image(comparison(tokenizer, shown[:_SHOWN]), "samples/reconstructions.png")
    return report
