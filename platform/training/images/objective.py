"""An image tokenizer in training: the losses of `model/tokenizers/image_losses.py`, AdamW or Muon, and restarts of
unused codes (VQ-VAE, arXiv 1711.00937; Jukebox, arXiv 2005.00341, section 3.2; paper 2.1), with all the state that the
next step depends on.

Shape suffixes: B a batch of images, C channels, H height, W width, K codebook.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from calumma.model.tokenizers.image import ImageTokenizer, Reconstruction
from calumma.model.tokenizers.image_losses import CodebookAverage, ImageObjective, PerceptualLoss, discriminator_loss
from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.images.data import batch_shares
from calumma.platform.training.sections import ImageOptimizer
from calumma.platform.training.specification import ImageTokenizerSpecification
from calumma.platform.training.steps.muon import Muon, convolution_groups


def load_perceptual_loss(spec: ImageTokenizerSpecification) -> PerceptualLoss | None:
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


class StepMeasures(NamedTuple):
    """Of one step, over all workers: the loss, its parts and the gradient's norm before clipping, the largest of both
    networks."""

    loss: float
    parts: dict[str, float]
    norm: float


class ImageTraining:
    """The image tokenizer and, where the losses ask for one, its discriminator, with their optimizers.

    A step is `compute_gradients` and then `take_step`, unless the gradients are to be passed over. Every worker has the
    same state, and calls everything with its share of the same global batch.
    """

    def __init__(self, spec: ImageTokenizerSpecification, worker: Worker) -> None:
        self.spec, self.worker = spec, worker
        sizes = batch_shares(spec.batch, worker.world)
        self._first, self._batch = sum(sizes[: worker.rank]), sizes[worker.rank]
        alone = worker.world == 1
        self.all_reduce = None if alone else dist.all_reduce
        torch.manual_seed(spec.seed)
        self.tokenizer = ImageTokenizer(spec.model).to(worker.device)
        mean = None if alone else self._mean
        objective = ImageObjective(spec.loss, spec.commitment, load_perceptual_loss(spec), mean)
        self.objective = objective.to(worker.device)
        self.average: CodebookAverage | None = None
        if spec.loss.codebook == "ema":
            self.tokenizer.codebook.requires_grad_(False)
            self.average = CodebookAverage(
                self.tokenizer.codebook.weight.detach(), spec.loss.ema_decay, self.all_reduce
            )
        betas = (spec.optimizer.beta1, spec.optimizer.beta2)
        self._networks = {"tokenizer": _Network(self.tokenizer, spec.learning_rate, betas, alone, spec.optimizer)}
        if objective.discriminator is not None:
            peak = spec.loss.discriminator_learning_rate or spec.learning_rate
            self._networks["discriminator"] = _Network(objective.discriminator, peak, (0.5, 0.9), alone, spec.optimizer)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.used_K = torch.zeros(spec.model.codebook_size, device=worker.device)
        """Above 0: codes used in this period (see `begin_period`), at least by this worker's images."""
        self.started = False
        """Whether the codebook was moved onto latents of real images."""
        self._reconstruction: Reconstruction | None = None
        self._discriminated = False

    @property
    def first(self) -> int:
        """The place of this worker's first image in the global batch."""
        return self._first

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.precision == "bfloat16")

    @property
    def device(self) -> torch.device:
        return self.worker.device

    def compute_gradients(self, x_BCHW: Tensor, step: int) -> StepMeasures:
        """The gradients of a step (the first is 0) for this worker's images; nothing is moved but, before the first
        step, the codebook."""
        if not self.started:
            self.restart(x_BCHW)
            self.started = True
        main, critic = self._networks["tokenizer"], self._networks.get("discriminator")
        with self._precision():
            reconstruction = main.model(x_BCHW)
        losses = self.objective.tokenizer(reconstruction, x_BCHW, step, self.tokenizer.last_layer)
        parts, norms = dict(losses.parts), [main.backward(losses.total * self._weight)]
        self._reconstruction, self._discriminated = (
            reconstruction,
            critic is not None and self.objective.discriminator_active(step),
        )
        if critic is not None and self._discriminated:
            with self._precision():
                loss = discriminator_loss(critic.model, reconstruction, x_BCHW)
            norms.append(critic.backward(loss * self._weight))
            parts["discriminator_loss"] = loss.detach()
        values = torch.stack([losses.total.detach(), *parts.values()])
        if self.worker.world > 1:
            self._mean(values)
        loss_, *rest = values.tolist()
        return StepMeasures(loss_, dict(zip(parts, rest, strict=True)), torch.stack(norms).max().item())

    def take_step(self, rate: float) -> None:
        """Apply the gradients just computed; the discriminator's learning rate follows the tokenizer's."""
        assert self._reconstruction is not None
        self._networks["tokenizer"].step(rate)
        if self._discriminated:
            critic = self._networks["discriminator"]
            critic.step(rate / self.spec.learning_rate * critic.peak)
        if self.average is not None:
            weight_KE = self.tokenizer.codebook.weight.detach()
            self.average.update(weight_KE, self._reconstruction.latents_BNE, self._reconstruction.codes_BN)
        self.used_K[self._reconstruction.codes_BN.flatten()] = 1.0

    def codes_in_use(self) -> float:
        """The share of codes that any worker has used in this period; every worker calls it."""
        return (self._used_anywhere() > 0).float().mean().item()

    def restart(self, x_BCHW: Tensor) -> None:
        """Move codes that were unused in this period onto latents of the global batch, on every worker alike."""
        used_K = self._used_anywhere() > 0
        self.tokenizer.restart_dead_codes(used_K, x_BCHW, self.generator, self._first, self.spec.batch, self.all_reduce)
        if self.average is not None and self.started:
            self.average.reset(~used_K)

    def begin_period(self) -> None:
        """Forget which codes were used."""
        self.used_K.zero_()

    # -- what a checkpoint holds (checkpoints/saver.py, Replicated) --

    def zero_optimization_stage(self) -> int:
        return 0

    def whole_state(self) -> dict[str, Any]:
        """Every worker calls it."""
        state: dict[str, Any] = {
            name: {"weights": network.module.state_dict(), "optimizer": network.optimizer.state_dict()}
            for name, network in self._networks.items()
        }
        if self.average is not None:
            state["average"] = {"counts": self.average.counts_K, "sums": self.average.sums_KE}
        return state | {"generator": self.generator.get_state(), "used": self._used_anywhere(), "started": self.started}

    def load(self, state: dict[str, Any], draws: bool = True) -> None:
        """The inverse of `whole_state`; without `draws`, what is drawn next stays as it would be."""
        for name, network in self._networks.items():
            network.module.load_state_dict(state[name]["weights"])
            network.optimizer.load_state_dict(state[name]["optimizer"])
        if self.average is not None:
            self.average.counts_K.copy_(state["average"]["counts"])
            self.average.sums_KE.copy_(state["average"]["sums"])
        if draws:
            self.generator.set_state(state["generator"])
        self.used_K.copy_(state["used"])
        self.started = state["started"]

    def _used_anywhere(self) -> Tensor:
        if self.all_reduce is not None:
            self.all_reduce(self.used_K)
        return self.used_K

    @property
    def _weight(self) -> float:
        """What makes the mean over the workers weigh every image alike."""
        return self._batch * self.worker.world / self.spec.batch

    def _mean(self, value: Tensor) -> None:
        value.mul_(self._batch / self.spec.batch)
        dist.all_reduce(value)


class _Network:
    """A network with its optimizer, and its gradients averaged over the workers."""

    def __init__(
        self, module: nn.Module, peak: float, betas: tuple[float, float], alone: bool, settings: ImageOptimizer
    ) -> None:
        self.module, self.peak, self._clip = module, peak, settings.gradient_clip
        self._trained = [p for p in module.parameters() if p.requires_grad]
        of_muon = settings.kind == "muon" and isinstance(module, ImageTokenizer)
        self.optimizer = (Muon if of_muon else torch.optim.AdamW)(
            convolution_groups(module, settings.momentum) if of_muon else self._trained,
            lr=peak,
            betas=betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.model: nn.Module = module if alone else DistributedDataParallel(module)

    def backward(self, loss: Tensor) -> Tensor:
        """The gradient, clipped; its norm before."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return torch.nn.utils.clip_grad_norm_(self._trained, self._clip)

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
