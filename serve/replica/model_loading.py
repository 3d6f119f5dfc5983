"""How the processes of a replica load their model: device and dtype, a shard of the weights, or none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calumma.model.adapters.files import CONFIG, FOLDER, read_adapter
from calumma.model.config import ModelConfig
from calumma.model.generation import Shard, read_shard
from calumma.model.loading import described, with_context
from calumma.model.ops.adapter import Adapter
from calumma.model.transformer import Transformer
from calumma.platform import storage
from calumma.serve.settings import ModelSettings


def device_and_dtype(settings: ModelSettings) -> tuple[str, torch.dtype]:
    """Of a replica's Transformer: bfloat16 on GPUs and float32 on CPUs where the settings name no dtype."""
    device, usual = ("cuda", "bfloat16") if settings.gpus_per_replica else ("cpu", "float32")
    return device, dtype_of(settings.dtype or usual)


def dtype_of(name: str) -> torch.dtype:
    """What is computed in; matrices in int8 are multiplied fastest with bfloat16."""
    found: torch.dtype = getattr(torch, "bfloat16" if name == "int8" else name)
    return found


def read_own_weights(directory: str | Path, settings: ModelSettings, shard: Shard | None = None) -> Transformer:
    """The Transformer, or this rank's shard of it."""
    device, dtype = device_and_dtype(settings)
    return read_shard(directory, shard or Shard(), device, dtype, settings.dtype == "int8", settings.context)


def read_adapters(settings: ModelSettings, config: ModelConfig) -> dict[str, Adapter]:
    """The model's adapters by name. Raises AdapterError, StorageError."""
    found = {}
    for name, place in settings.adapters.items():
        if not storage.exists(storage.join(place, CONFIG)) and storage.exists(storage.join(place, FOLDER, CONFIG)):
            place = storage.join(place, FOLDER)
        with storage.local_copy(place) as folder:
            found[name] = read_adapter(folder, config)
    return found


def without_weights(directory: Path, *_: Any, context: int | None = None) -> Transformer:
    """The Transformer without its weights: they are in the engine's process."""
    return described(with_context(ModelConfig.read(directory), context))
