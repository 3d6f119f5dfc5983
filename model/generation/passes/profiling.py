"""The largest pass an engine may run, to see what memory it takes, and the cache that the rest is worth (vLLM's way:
https://docs.vllm.ai/en/latest/configuration/conserving_memory.html)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from calumma.model.generation.cache.device_memory import MemoryBudget, gigabytes
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.cache.sizing import LOGIT_ROWS, Footprint, Workload
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout

log = logging.getLogger(__name__)


class MemoryShort(ValueError):
    """What is left of the device does not hold one context."""


def largest_pass(decoder: Decoder, cache: PagedCache, workload: Workload) -> None:
    """A whole budget of prompt tokens, the last of contexts that stand in the same blocks; then logits."""
    context, size = decoder.transformer.config.context, cache.block_size
    counts = [context] * (workload.prefill_tokens // context)
    counts += [workload.prefill_tokens % context] if workload.prefill_tokens % context else []
    blocks = list(range(cache.blocks))
    pairs = [(Sequence([0] * context, cached=context - count, blocks=blocks), count) for count in counts]
    layout = BatchLayout(pairs, size)
    device = cache.store.device
    tokens_T = torch.zeros(len(layout.tokens), dtype=torch.long, device=device)
    x_TD = decoder.hidden(tokens_T, layout.step(cache, 0, device))
    decoder.logits(x_TD[:LOGIT_ROWS]).log_softmax(-1)


@torch.inference_mode()
def positions_that_fit(decoder: Decoder, memory: MemoryBudget, workload: Workload, block_size: int) -> int:
    """Positions of a cache that fills what `memory` leaves, whole blocks; in a group what all have room for. Raises
    MemoryShort."""
    config, weights = decoder.transformer.config, list(decoder.transformer.parameters())
    dtype, device = decoder.embedding.dtype, decoder.embedding.device
    int8 = any(weight.dtype == torch.int8 for weight in weights)
    parts = decoder.shard.count
    needed = Footprint.of(config, dtype, int8, workload, parts, gpu=device.type != "cpu")
    held = sum(weight.numel() * weight.element_size() for weight in weights)
    left = memory.left(held)
    blocks = -(-config.context // block_size)
    least = needed.cache(blocks * block_size)
    if left >= least + needed.activations + needed.margin or parts > 1:  # less is not tried, but by all of a group
        taken = memory.device.peak(_profiled(decoder, blocks, block_size, dtype, workload))
        if taken is not None:
            needed = replace(needed, activations=max(0, taken - blocks * block_size * needed.position))
    room = needed.positions(left - needed.activations - needed.margin)
    room = min(room, room if memory.most is None else memory.most)
    count = decoder.shard.least(room // block_size)
    told = (
        f"weights {gigabytes(held)}, activations {gigabytes(needed.activations)}, reserved {gigabytes(needed.margin)}; "
        f"{gigabytes(max(0, left))} were left of {memory.share:g} of {gigabytes(memory.device.total)}"
    )
    if count < blocks:
        raise MemoryShort(
            f"the cache has room for {count * block_size} positions, less than a context of {config.context}, which "
            f"takes {gigabytes(least)}: {told}"
        )
    log.info("a cache of %d positions, %s: %s", count * block_size, gigabytes(needed.cache(count * block_size)), told)
    return count * block_size


def _profiled(
    decoder: Decoder, blocks: int, block_size: int, dtype: torch.dtype, workload: Workload
) -> Callable[[], object]:
    def work() -> None:
        device, config = decoder.embedding.device, decoder.transformer.config
        largest_pass(decoder, PagedCache(config, blocks, block_size, device, dtype, decoder.kv_heads), workload)

    return work
