"""How the processes of a replica load their model: device and dtype, a shard of the weights, or none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calumma.model.config import ModelConfig
from calumma.model.generation import Shard, read_shard
from calumma.model.transformer import Transformer
from calumma.serve.settings import ModelSettings


def device_and_dtype(settings: ModelSettings) -> tuple[str, torch.dtype]:
    """Of a replica's Transformer: bfloat16 on GPUs and float32 on CPUs where the settings name no dtype."""
    device, usual = ("cuda", "bfloat16") if settings.gpus_per_replica else ("cpu", "float32")
    return device, getattr(torch, settings.dtype or usual)


def read_own_shard(directory: str, shard: Shard, settings: ModelSettings) -> Transformer:
    """This rank's shard of the Transformer."""
    return read_shard(directory, shard, *device_and_dtype(settings))


def without_weights(directory: Path, *_: Any) -> Transformer:
    """The Transformer without its weights: they are in the engine's process."""
    with torch.device("meta"):
        return Transformer(ModelConfig.read(directory))
