"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): every matrix is cut over the processes of a group.

Query, key, value, gate and up are cut by rows (heads stay whole, and so do their norms), output and down by columns,
after which the processes' parts are summed; the output projection by the vocabulary, whose parts are put together.
Each process cuts its own part of whole weights, so any checkpoint goes on any number of processes that divides its
key-value heads and feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from calumma.model.config import ModelConfig


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, one a process of `group`."""

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Shard:
        """This process's part in a group, torch.distributed's default one for None."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where a model cannot be cut into so many parts."""
        for name in ("kv_heads", "ffn_width"):
            if getattr(config, name) % self.count:
                raise ValueError(
                    f"the model's {name}, {getattr(config, name)}, cannot be cut into {self.count} equal parts; use a "
                    f"number of processes that divides it"
                )

    def rows(self, weight: Tensor) -> Tensor:
        """This part of the rows; the last part is filled up with zeros where they do not divide."""
        if self.count == 1:
            return weight
        size = -(-len(weight) // self.count)
        part = weight.detach()[self.index * size : (self.index + 1) * size]
        return F.pad(part, (0, 0, 0, size - len(part))) if len(part) < size else part.clone()

    def columns(self, weight: Tensor) -> Tensor:
        return weight if self.count == 1 else weight.detach().chunk(self.count, dim=1)[self.index].clone()

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts, in place."""
        if self.count > 1:
            dist.all_reduce(part, group=self.group)
        return part

    def agree(self, values: Tensor) -> Tensor:
        """The first process's values, in place: what is drawn must not hang on anybody's rounding."""
        if self.count > 1:
            dist.broadcast(values, group=self.group, group_src=0)
        return values

    def tell(self, message: Any) -> Any:
        """The first process's message, to all."""
        if self.count == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def gather(self, part: Tensor) -> Tensor:
        """All processes' parts side by side, in the last dimension."""
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)
