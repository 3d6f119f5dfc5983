"""Whether a replica fits its devices, and in what dtype, by arithmetic; and what each of its engines may fill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER
from calumma.model.generation.cache.device_memory import (
    CudaMemory,
    DeviceMemory,
    HostMemory,
    MemoryBudget,
    gigabytes,
)
from calumma.model.generation.cache.sizing import (
    BRANCHES,
    PROCESS_BYTES,
    Footprint,
    Workload,
)
from calumma.model.loading import with_context
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.serve.replica.image_coder import BATCH_PIXELS
from calumma.serve.replica.model_loading import dtype_of
from calumma.serve.settings import ModelSettings

SHARE = 0.9  # of a device, unless told
KEPT = 4  # contexts a request, beyond which more cache is of no use: its own, its branches', and what is kept of others
SHORTEST = 256  # context that is worth suggesting


class DoesNotFit(ValueError):
    """The model does not fit the device; says what is needed, what there is, and what would fit."""


@dataclass(frozen=True)
class MemoryPlan:
    """What one process of a replica needs of its device, and how many positions of cache are left. `available`: bytes
    of the device for a replica. `coder`: of the image tokenizer, with its process."""

    dtype: str
    footprint: Footprint
    coder: int
    available: int

    @property
    def fixed(self) -> int:
        return self.footprint.fixed + self.coder

    @property
    def positions(self) -> int:
        return self.footprint.positions(self.available - self.fixed)

    def __str__(self) -> str:
        parts = {
            "weights": self.footprint.weights,
            "image tokenizer": self.coder,
            "activations": self.footprint.activations,
            "reserved": self.footprint.margin,
        }
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())


def plan(settings: ModelSettings, config: ModelConfig, images: ImageTokenizerConfig, total: int) -> MemoryPlan:
    """In the dtype that the settings ask for, on a device of so many bytes; where they ask for none, in int8 on a GPU
    that beside bfloat16 has no room for a request with its branches, and for contexts of a quarter of the requests.
    Raises DoesNotFit."""
    config = with_context(config, settings.context)
    plans = [_plan_in(dtype, settings, config, images, total) for dtype in _dtypes(settings)]
    needed = settings.cache_tokens or config.context
    for one in plans[:-1]:
        if one.positions >= max(needed, BRANCHES * config.context, settings.max_sequences // 4 * config.context):
            return one
    if plans[-1].positions >= needed:
        return plans[-1]
    raise DoesNotFit(_refusal(plans[-1], settings, config, images, total))


def fitting(settings: ModelSettings, directory: str | Path, total: int | None = None) -> ModelSettings:
    """The settings, with the dtype in which the model of a directory fits the device. Raises DoesNotFit."""
    config, images = ModelConfig.read(directory), ImageTokenizerConfig.read(Path(directory) / IMAGE_TOKENIZER)
    found = plan(settings, config, images, device_memory(settings).total if total is None else total)
    return settings.model_copy(update={"dtype": found.dtype})


def _dtypes(settings: ModelSettings) -> list[str]:
    if settings.dtype is not None:
        return [settings.dtype]
    return ["bfloat16", "int8"] if settings.gpus_per_replica else ["float32"]


def _plan_in(
    dtype: str, settings: ModelSettings, config: ModelConfig, images: ImageTokenizerConfig, total: int
) -> MemoryPlan:
    gpu = settings.gpus_per_replica > 0
    own = _own_part(settings) if gpu else 1.0
    footprint = Footprint.of(
        config, dtype_of(dtype), dtype == "int8", _workload(settings), settings.tensor_parallel, gpu
    )
    coder = coder_bytes(settings, images) + PROCESS_BYTES * gpu
    return MemoryPlan(dtype, footprint, coder, int(total * (settings.memory or SHARE) * own))


def coder_bytes(settings: ModelSettings, images: ImageTokenizerConfig) -> int:
    """What the image tokenizer takes of a replica's device, in a process of its own, where it is there."""
    if settings.image_coders:
        return 0
    return image_tokenizer_bytes(images, BATCH_PIXELS) + PROCESS_BYTES * (settings.gpus_per_replica > 0)


def image_tokenizer_bytes(config: ImageTokenizerConfig, pixels: int) -> int:
    """Of the image tokenizer, in float32, which codes so many pixels at once, or an image: its weights, and some maps
    of full size."""
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in ImageTokenizer(config).parameters())
    most = max(pixels, config.resolution**2)
    return 4 * (weights + 8 * most * config.base_channels * max(1, config.multipliers[0]))


def _workload(settings: ModelSettings) -> Workload:
    graphs = settings.gpus_per_replica > 0 and settings.tensor_parallel == 1
    return Workload(
        settings.max_sequences,
        settings.prefill_tokens,
        graphs if settings.cuda_graphs is None else settings.cuda_graphs,
    )


def _own_part(settings: ModelSettings) -> float:
    """Of a GPU: all of it, or the fraction that was asked for."""
    return min(1.0, settings.gpus_per_replica / settings.tensor_parallel)


def device_memory(settings: ModelSettings) -> DeviceMemory:
    return CudaMemory() if settings.gpus_per_replica else HostMemory()


def memory_budget(settings: ModelSettings, config: ModelConfig, images: ImageTokenizerConfig) -> MemoryBudget:
    """Of an engine's process. On CPUs a cache of `max_sequences` contexts, where there is room, unless a share of
    memory is asked for."""
    contexts = settings.max_sequences * -(-config.context // 32) * 32
    share = settings.memory or SHARE
    if settings.gpus_per_replica:
        part = _own_part(settings)
        reserved = coder_bytes(settings, images) + PROCESS_BYTES
        return MemoryBudget(CudaMemory(), share, part, part == 1, reserved, KEPT * contexts)
    part = 1 / (settings.min_replicas * settings.tensor_parallel)
    most = contexts if settings.memory is None else KEPT * contexts
    reserved = coder_bytes(settings, images) + settings.engine_options["host_cache"]
    return MemoryBudget(HostMemory(), share, part, False, reserved, most)


def _refusal(
    found: MemoryPlan, settings: ModelSettings, config: ModelConfig, images: ImageTokenizerConfig, total: int
) -> str:
    needed = settings.cache_tokens or config.context
    what = f"cache_tokens {needed}" if settings.cache_tokens else f"a cache for one context of {needed}"
    cache = found.footprint.cache(needed)
    ways = "; ".join(_ways(settings, config, images, total)) or "nothing: use a device with more memory"
    device = "GPU" if settings.gpus_per_replica else "machine"
    return (
        f"{settings.model} does not fit a {device} of {gigabytes(total)}, of which a replica may fill "
        f"{gigabytes(found.available)} (memory: {settings.memory or SHARE:g}). In {found.dtype}: {found}, {what} "
        f"{gigabytes(cache)}; {gigabytes(found.fixed + cache)} together. What would fit: {ways}"
    )


def _ways(settings: ModelSettings, config: ModelConfig, images: ImageTokenizerConfig, total: int) -> Iterator[str]:
    """Changes of the settings, each by itself, with which it fits."""
    needed = settings.cache_tokens or config.context

    def fits(dtype: str, shape: ModelConfig = config, positions: int = needed, **changes: object) -> bool:
        changed = settings.model_copy(update=changes)
        return _plan_in(dtype, changed, shape, images, total).positions >= positions

    current = _dtypes(settings)[-1]
    for dtype in ("bfloat16", "int8"):
        if dtype != current and current != "int8" and fits(dtype):
            yield f"dtype: {dtype}"
    least = _plan_in(current, settings, config, images, total).positions
    if settings.cache_tokens and least >= config.context:
        yield f"cache_tokens: {least}"
    context = config.context // 2
    while context >= SHORTEST and not settings.cache_tokens:
        if fits(current, config.model_copy(update={"context": context}), context):
            yield f"context: {context}"
            break
        context //= 2
    for parts in (2, 4, 8):
        if settings.gpus_per_replica and settings.tensor_parallel < parts <= config.heads:
            for dtype in dict.fromkeys(("bfloat16", current)):
                if fits(dtype, tensor_parallel=parts, gpus_per_replica=float(parts)):
                    yield f"tensor_parallel: {parts}, gpus_per_replica: {parts} ({dtype})"
                    return
