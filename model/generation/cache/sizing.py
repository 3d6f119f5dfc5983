"""How much memory an engine needs, by arithmetic, and how many positions of the cache are worth how many bytes.

A pass gathers the blocks of the sequences that attend together, of one layer at a time (attention/paged.py), so every
position of the cache costs a little more than it takes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from calumma.model.config import ModelConfig
from calumma.model.generation.tensor_parallel import Shard
from calumma.model.loading import described
from calumma.model.weights import sliced

BRANCHES = 3  # sequences of a request within an image: its context, and two of guidance
LOGIT_ROWS = 256  # of prompts that are scored (passes/prompt_scores.py), more than ever draw
GRAPHS_BYTES = 2**30  # of recorded passes, but for what they gather
MARGIN_BYTES = 2**28  # of the allocator's gaps, tables of the sampler and libraries' work space
HOST_BYTES = 3 * 2**28  # on CPUs, of copies that make products and attention fast (decoder.py, contiguous.py)
PROCESS_BYTES = 600 * 2**20  # that CUDA takes for a process before it holds anything


@dataclass(frozen=True)
class Workload:
    """What is asked of an engine, as far as memory depends on it. graphs: passes are recorded."""

    max_sequences: int
    prefill_tokens: int
    graphs: bool

    @property
    def sequences(self) -> int:
        return BRANCHES * self.max_sequences


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process of an engine. activations: of the largest pass. position: of a position of the cache;
    gathered: of one that a pass gathers, of which there are `most_gathered` at most. margin: see above."""

    weights: int
    activations: int
    position: int
    gathered: int
    most_gathered: int
    margin: int

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: torch.dtype, int8: bool, workload: Workload, parts: int = 1, gpu: bool = True
    ) -> Footprint:
        """Of the largest of so many shards."""
        weights = max(weight_bytes(config, dtype, int8, Shard(index, parts)) for index in {0, parts - 1})
        kv = 2 * -(-config.kv_heads // parts) * config.head_size * dtype.itemsize
        return cls(
            weights,
            pass_bytes(config, dtype, int8, workload, parts),
            config.layers * kv,
            kv * (3 + 2 * workload.graphs) // 2,  # a buffer that grows by halves, and a recorded pass's own
            workload.sequences * config.context,
            MARGIN_BYTES + GRAPHS_BYTES * workload.graphs if gpu else min(HOST_BYTES, 4 * weights),
        )

    def cache(self, positions: int) -> int:
        """Bytes of so many positions. Sequences of one pass are filled up to the longest, to twice their length at
        most."""
        return positions * self.position + min(2 * positions, self.most_gathered) * self.gathered

    def positions(self, left: int) -> int:
        """How many positions so many bytes are worth."""
        few = left // (self.position + 2 * self.gathered)
        many = (left - self.most_gathered * self.gathered) // self.position
        return max(0, few, many)

    @property
    def fixed(self) -> int:
        """Bytes of all but the cache."""
        return self.weights + self.activations + self.margin


@cache
def weight_bytes(config: ModelConfig, dtype: torch.dtype, int8: bool = False, shard: Shard = Shard()) -> int:
    """Of a shard of the Transformer, as `read_shard` makes it."""
    total = 0
    for name, weight in described(config, int8).named_parameters():
        size = prod(sliced(tuple(weight.shape), shard.slices(name, config)[: weight.dim()]))
        own = weight.dtype == torch.int8 or name.endswith(".scale")
        total += size * (weight.dtype if own else dtype).itemsize
    return total


def pass_bytes(config: ModelConfig, dtype: torch.dtype, int8: bool, workload: Workload, parts: int = 1) -> int:
    """Of the largest pass: a whole budget of prompt tokens at the end of a context, then logits."""
    D, H, V, b = config.width, config.head_size, config.vocabulary_size, dtype.itemsize
    N, K, F = (-(-whole // parts) for whole in (config.heads, config.kv_heads, config.ffn_width))
    tokens = workload.prefill_tokens + workload.sequences
    rotated = (N + K) * H * (4 * b + 8)  # normalized, and turned in float32
    attention = 4 * D * b + (2 * N + 2 * K) * H * b + rotated
    feed_forward = 4 * D * b + 4 * F * b
    mask = 2 * workload.prefill_tokens * config.context * (b + 1)
    repeated = 2 * config.context * N * H * b if K != N else 0
    logits = 4 * V * max(3 * LOGIT_ROWS, 4 * workload.sequences)
    copied = max(D * F, D * N * H) * b if int8 else 0
    return max(tokens * max(attention, feed_forward) + mask + repeated, tokens * D * b + logits) + copied
