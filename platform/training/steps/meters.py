"""What training measures about itself: losses of an interval, where the time goes, memory, model FLOP utilization."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calumma.model.devices import find_gpu
from calumma.model.transformer import Transformer
from calumma.platform.training.steps import engine, held_out
from calumma.platform.training.trainable import quantized

_PROBE_SIZE = 1024  # rows of the square matrices that measure a device without an entry
_PROBE_PRODUCTS, _PROBE_SECONDS = 5, 2.0  # products, or as many as there is time for
ACTIVITIES = ("data", "compute", "checkpoint", "evaluation")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a device can reach: its data sheet's, or the fastest of a few matrix products, on the threads that
    this process has."""
    if device.type == "cuda":
        found = find_gpu(torch.cuda.get_device_name(device))
        if found is not None:
            return found[1].bfloat16 if dtype == torch.bfloat16 else found[1].float32
    turns = _PROBE_PRODUCTS
    square = torch.randn(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype, device=device, generator=torch.Generator(device))
    best, over = math.inf, time.monotonic() + _PROBE_SECONDS
    while best == math.inf or (turns > 0 and time.monotonic() < over):
        turns -= 1
        _synchronize(device)
        began = time.perf_counter()
        square @ square
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * _PROBE_SIZE**3 / best


def flops_per_token(model: Transformer, context: int) -> float:
    """Model FLOPs of training on one token, forward and backward, as torchtitan counts them: 2 a weight and pass, the
    embedding none, attention over the whole context without a discount for its mask, recomputation not counted.

    Of frozen weights no gradient is computed; nor of states below the first layer that has something to train.
    """
    config, total, below = model.config, 0.0, _any_trained(model.embedding)
    layers: list[nn.Module] = [*model.blocks, model.output]
    for layer in layers:
        whole = sum(_parameter_count(p) for p in layer.parameters() if p.dim() > 1)
        whole += sum(weight.numel for weight in quantized.weights_of(layer).values())
        trained = sum(_parameter_count(p) for p in layer.parameters() if p.dim() > 1 and p.requires_grad)
        attention = 0 if layer is model.output else 2 * config.heads * config.head_size * context
        below_or_within = below or _any_trained(layer)
        total += 2 * whole + 2 * attention
        if below_or_within:
            total += 2 * whole + 4 * attention + 2 * trained
        below = below_or_within
    return total


def _any_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _parameter_count(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO 3 leaves an empty tensor behind


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ActivityClock:
    """Seconds by activity since it was last read. What runs on a GPU counts where the host waits for it."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(ACTIVITIES, 0.0)

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[activity] += time.monotonic() - began

    def read(self) -> dict[str, float]:
        """`seconds/<activity>` of each, and start anew."""
        seconds = {f"seconds/{name}": value for name, value in self._spent.items()}
        self._spent = dict.fromkeys(ACTIVITIES, 0.0)
        return seconds


class Utilization:
    """Model FLOP utilization of a group of equal workers."""

    def __init__(self, model: Transformer, device: torch.device, precision: str, world: int) -> None:
        self._model, self._device, self._world = model, device, world
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._flops = flops_per_token(model, model.config.context)
        self._peak = 0.0

    def measure(self, known: float | None = None) -> float:
        """The peak FLOP/s, `known` or found out, by a few matrix products where the device has no entry."""
        self._peak = peak_flops(self._device, self._dtype) if known is None else known
        return self._peak

    def metrics(self, tokens_per_second: float) -> dict[str, float]:
        """`mfu`, and the FLOP/s a worker that it is made of; none before `measure`."""
        if not self._peak:
            return {}
        flops = self._flops * tokens_per_second / self._world
        return {"mfu": flops / self._peak, "flops_per_second": flops, "peak_flops_per_second": self._peak}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak GiB of this process, and of its device since the last call."""
    unit = 1 if sys.platform == "darwin" else 1024
    metrics = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        metrics["memory/device_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return metrics


@dataclass
class LossInterval:
    """Sums since the last report: this worker's losses, all workers' counts."""

    device: torch.device
    began: float = field(default_factory=time.monotonic)
    local: Tensor = field(init=False)
    text: float = 0.0
    image: float = 0.0
    tokens: float = 0.0
    first_step: int = 0
    paused: float = 0.0
    """Seconds that went into checkpoints and evaluation."""

    def __post_init__(self) -> None:
        self.local = torch.zeros(3, dtype=torch.float64, device=self.device)

    def add(self, local: Tensor, counts: engine.Counts) -> None:
        self.local += local
        self.text += counts.text
        self.image += counts.image
        self.tokens += counts.tokens

    def metrics(self, z_loss: float) -> dict[str, float]:
        """Means over the interval and all workers (every worker must call it): losses in nats a token without the
        z-loss, their perplexities; `z` is the mean of log(Z)^2 and `z_loss` what it adds to what is minimized."""
        text_nll, image_nll, z_sum = engine.sum_over_workers(self.local).tolist()
        metrics = held_out.mean_losses(text_nll, self.text, image_nll, self.image)
        metrics |= {name.replace("loss", "perplexity"): exponential(loss) for name, loss in metrics.items()}
        metrics["z"] = z_sum / max(self.text + self.image, 1.0)
        metrics["z_loss"] = z_loss * metrics["z"]
        metrics["tokens_per_second"] = self.tokens / max(time.monotonic() - self.began - self.paused, 1e-9)
        return metrics


def exponential(value: float) -> float:
    """exp, infinite where it is too large."""
    return math.exp(value) if value < 700 else math.inf
