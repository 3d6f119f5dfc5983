"""Losses on held-out token shards, measured by all workers together, each on its share of the row groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calumma.model.ops.loss import Loss
from calumma.platform.shards.row_groups import MicroBatch, RowGroupReader, all_micro_batches, context_of
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.steps.engine import losses, sum_over_workers


@dataclass(frozen=True)
class HeldOutBatch:
    """One row group: LongTensor, BoolTensor and LongTensor [B, T+1] (B is 0 where a worker has none left)."""

    tokens: Tensor
    mask: Tensor
    segments: Tensor
    number: int = 0
    """Its number in a global batch, where it is trained on."""


def measure(
    engine: Any,
    uri: str,
    image_mask_V: Tensor,
    rank: int,
    world: int,
    beat: Callable[[], None] | None = None,
    reader: RowGroupReader = RowGroupReader(),
    losses_of: Callable[..., Loss] = losses,
) -> dict[str, float]:
    """Mean loss (nats a token) over the trained tokens below `uri`: `loss`, and `loss_text`, `loss_image` where there
    are such tokens. Every worker calls it, runs as many forward passes and gets the same answer. `beat` is called after
    each of them. `losses_of`: what is measured, in place of `losses`. Raises StorageError, ManifestError, and
    ShardError for what is not as its manifest says."""
    manifest = Manifest.read(uri)
    micro_batches, reader = all_micro_batches(uri, manifest), replace(reader, context=context_of(manifest))
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad():
        for turn in range(-(-len(micro_batches) // world)):
            index = turn * world + rank
            batch = read_row_group(reader, micro_batches[index]) if index < len(micro_batches) else _EMPTY
            loss_sums = losses_of(engine, batch, image_mask_V).sums
            sums += torch.stack(
                [loss_sums.text_nll, loss_sums.text_count, loss_sums.image_nll, loss_sums.image_count]
            ).double()
            if beat is not None:
                beat()
    engine.train()
    text_nll, text, image_nll, image = sum_over_workers(sums).tolist()
    return mean_losses(text_nll, text, image_nll, image)


def mean_losses(text_nll: float, text: float, image_nll: float, image: float) -> dict[str, float]:
    """Mean losses from sums and counts; a modality without tokens has none."""
    means = {
        "loss": (text_nll + image_nll, text + image),
        "loss_text": (text_nll, text),
        "loss_image": (image_nll, image),
    }
    return {name: total / number for name, (total, number) in means.items() if number > 0}


def finite(values: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in values.values())


def read_row_group(reader: RowGroupReader, micro_batch: MicroBatch) -> HeldOutBatch:
    """One row group of a token shard as tensors. Raises ShardError and StorageError."""
    group = reader.read(micro_batch)
    tokens, segments = (torch.from_numpy(values.astype(np.int64)) for values in (group.tokens, group.segments))
    return HeldOutBatch(tokens, torch.from_numpy(group.mask), segments)


_NONE = torch.zeros(0, 3, dtype=torch.long)
_EMPTY = HeldOutBatch(_NONE, _NONE.bool(), _NONE)
