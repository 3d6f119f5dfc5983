"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): every matrix is cut over the processes of a group.

Query, key, value, gate and up are cut by rows (heads stay whole, and so do their norms), output and down by columns,
after which the processes' results are summed and biases added; embedding and output projection by the vocabulary,
whose results are summed and put together. Nothing must divide: shards differ by a head or a column, and where there are
more processes than key-value heads, those that share one hold it each, with the queries of theirs alone. `read_shard`
reads a process's shard from a model directory, and no more; the engine also cuts it from whole weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.loading import read_transformer
from calumma.model.transformer import Transformer


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`, one a process of `group`; see the head of the module for what a shard holds."""

    index: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Shard:
        """This process's shard in a group, torch.distributed's default one for None."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may hold what the group's processes say to each other."""
        return self.count == 1 or dist.get_backend(self.group) == "nccl"

    def heads(self, config: ModelConfig) -> tuple[slice, slice]:
        """This shard's heads, and the key-value heads they attend to. Raises ValueError where one would have none."""
        K, grouped = config.kv_heads, config.heads // config.kv_heads
        if self.count > config.heads:
            raise ValueError(
                f"the model's {config.heads} heads cannot be cut into {self.count} parts: use at most "
                f"{config.heads} processes, a head each"
            )
        if self.count <= K:
            own = _even(K, self.index, self.count)
            return slice(own.start * grouped, own.stop * grouped), own
        shared = [index * K // self.count for index in range(self.count)]  # the key-value head of each shard
        head = shared[self.index]
        queries = _even(grouped, self.index - shared.index(head), shared.count(head))
        first = head * grouped
        return slice(first + queries.start, first + queries.stop), slice(head, head + 1)

    def vocabulary(self, config: ModelConfig) -> slice:
        """This shard's ids; the last shards may have fewer, or none."""
        size = -(-config.vocabulary_size // self.count)
        begin, end = (min(at * size, config.vocabulary_size) for at in (self.index, self.index + 1))
        return slice(begin, end)

    def slices(self, name: str, config: ModelConfig) -> tuple[slice, ...]:
        """What this shard has of a weight of the Transformer, by its rows, or its rows and columns."""
        heads, kv_heads = self.heads(config)
        module, _, attribute = name.rpartition(".")
        layer, _, kind = module.rpartition(".")
        if attribute == "bias" and (kind == "down" or (kind == "output" and layer)):
            return ()  # added to the sum of all parts
        if config.query_key_norm == "rms" and kind in ("query_norm", "key_norm"):
            return ()  # one for all heads
        rows = {"query_norm": heads, "key_norm": kv_heads, "query": _of_heads(heads, config)}
        rows |= dict.fromkeys(("key", "value"), _of_heads(kv_heads, config))
        rows |= dict.fromkeys(("gate", "up"), _even(config.ffn_width, self.index, self.count))
        if kind == "down":
            return slice(0, config.width), rows["up"]
        if kind == "output" and layer:
            return slice(0, config.width), rows["query"]
        if kind in ("embedding", "output"):
            return (self.vocabulary(config),)
        return (rows[kind],) if kind in rows else ()

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts, in place."""
        if self.count > 1:
            dist.all_reduce(part, group=self.group)
        return part

    def broadcast(self, values: Tensor) -> Tensor:
        """The first process's values, in place: what is drawn must not hang on anybody's rounding."""
        if self.count > 1:
            dist.broadcast(values, group=self.group, group_src=0)
        return values

    def broadcast_object(self, message: Any) -> Any:
        """The first process's message, to all."""
        if self.count == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        if self.count == 1:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def gather(self, part: Tensor) -> Tensor:
        """All processes' parts side by side, in the last dimension."""
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


def read_shard(
    directory: str | Path,
    shard: Shard,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    int8: bool = False,
    context: int | None = None,
) -> Transformer:
    """The Transformer of a model directory with a shard of its weights alone, for an Engine of that shard: it
    cannot compute by itself. No more is read, or in memory, than the shard. Raises what `read_transformer` does, and
    ValueError where the model cannot be cut so."""
    return read_transformer(directory, device, dtype, int8, shard.slices, context).eval().requires_grad_(False)


def _even(size: int, index: int, count: int) -> slice:
    """Part `index` of `size` in `count` parts that differ by one at most."""
    return slice(index * size // count, (index + 1) * size // count)


def _of_heads(heads: slice, config: ModelConfig) -> slice:
    return slice(heads.start * config.head_size, heads.stop * config.head_size)
