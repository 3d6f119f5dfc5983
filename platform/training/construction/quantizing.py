"""Quantized weights from their source: each worker reads some, all get each in full, and quantize it alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from calumma.platform import storage
from calumma.platform.training.checkpoints.agreement import raise_on_all
from calumma.platform.training.construction.sources import Wanted, WeightSource
from calumma.platform.training.trainable import quantized


def fill_quantized(
    model: nn.Module, source: WeightSource, device: torch.device, beat: Callable[[], object] = lambda: None
) -> None:
    """Fill a model's quantized weights, in place, two of them in full at a time. Every worker calls it. Raises
    StorageError on all of them."""
    weights = list(quantized.weights_of(model).items())
    if not weights:
        return
    dtype = next(model.parameters()).dtype
    rank, world = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(weights), world):
        several, failed = weights[first : first + world], None
        own = None
        if rank < len(several):
            name, weight = several[rank]
            own = torch.empty(weight.shape, dtype=dtype, device=device)
            try:
                source.fill([Wanted(name, 0, own.view(-1))], beat)
            except storage.StorageError as error:
                failed = error
        raise_on_all(failed)
        for owner, (_, weight) in enumerate(several):
            full = own if owner == rank and own is not None else torch.empty(weight.shape, dtype=dtype, device=device)
            if world > 1:
                dist.broadcast(full, owner)
            weight.store(full)
            beat()
