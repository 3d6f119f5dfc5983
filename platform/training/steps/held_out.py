"""Losses on held-out token shards, measured by all workers together, each on its share of the row groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.steps.engine import losses, sum_over_workers


@dataclass(frozen=True)
class HeldOutBatch:
    """One row group: LongTensor, BoolTensor and LongTensor [B, T+1] (B is 0 where a worker has none left)."""

    tokens: Tensor
    mask: Tensor
    segments: Tensor


def measure(
    engine: Any, uri: str, image_mask_V: Tensor, rank: int, world: int, beat: Callable[[], None] | None = None
) -> dict[str, float]:
    """Mean loss (nats a token) over the trained tokens below `uri`: `loss`, and `loss_text`, `loss_image` where there
    are such tokens. Every worker calls it, runs as many forward passes and gets the same answer. `beat` is called after
    each of them."""
    groups = row_groups(uri)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad():
        for turn in range(-(-len(groups) // world)):
            index = turn * world + rank
            batch = read_row_group(*groups[index]) if index < len(groups) else _EMPTY
            loss_sums = losses(engine, batch, image_mask_V).sums
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


def row_groups(uri: str) -> list[tuple[str, int]]:
    """(shard URI, row group) of published token shards. Raises StorageError when nothing is published there."""
    manifest = Manifest.read(uri)
    return [(storage.join(uri, f.path), group) for f in manifest.files for group in range(f.row_groups)]


def read_row_group(shard: str, row_group: int) -> HeldOutBatch:
    """One row group of a token shard (its columns: shards/tokens.py)."""
    import pyarrow.parquet as pq

    with storage.open_read(shard) as file:
        table = pq.ParquetFile(cast(BinaryIO, file)).read_row_group(row_group)
    tokens = torch.from_numpy(np.array(table["tokens"].to_pylist(), dtype=np.int64))
    segments = torch.from_numpy(np.array(table["segments"].to_pylist(), dtype=np.int64))
    masks = [[True] * tokens.shape[1] if row is None else row for row in table["loss_mask"].to_pylist()]
    mask = torch.from_numpy(np.array(masks, dtype=bool)) & (segments >= 0)
    return HeldOutBatch(tokens, mask, segments)


_NONE = torch.zeros(0, 3, dtype=torch.long)
_EMPTY = HeldOutBatch(_NONE, _NONE.bool(), _NONE)
