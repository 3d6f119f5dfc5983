"""What an engine has done and how full it is, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calumma.model.generation.cache.below import below_statistics

if TYPE_CHECKING:
    from calumma.model.generation.cache.block_manager import BlockManager
    from calumma.model.generation.cache.host_blocks import HostBlocks
    from calumma.model.generation.passes.runner import ModelRunner
    from calumma.model.generation.request import Request
    from calumma.model.generation.scheduler import Scheduler


@dataclass
class Counters:
    """Counts since the engine was made. Each request's tokens count once, however often they were computed.

    text_tokens, image_tokens: of answers, forced ones included. prompt_tokens: of prompts taken in. computed_tokens:
    that went through the model, those of guidance branches, recomputed and rejected ones included. steps: forward
    passes. failed: requests that went wrong (see Failure). preemptions: requests that gave their room back to
    others. drafted, accepted: image codes that speculative decoding proposed, and those it kept.
    """

    prompt_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    computed_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Statistics:
    """A snapshot of an engine: what is going on now, then `Counters`.

    blocks_used: referenced by sequences; blocks_cached: referenced by none, but kept for their content; blocks_free:
    neither. running_text, running_image: requests by the phase they are in. prefix_hit_tokens: of contexts, found
    in the cache instead of computed, of all `prefix_tokens` that were looked up; restored_tokens: those of them that
    were in the host's memory or on a disk, disk_restored_tokens: on a disk. evictions: cached blocks given up for
    others. host_cache_bytes, disk_cache_bytes: held there; disk_damaged: files that were not sound.
    """

    blocks: int
    block_size: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    running_text: int
    running_image: int
    waiting: int
    waiting_tokens: int
    prefix_hit_tokens: int
    prefix_tokens: int
    restored_tokens: int
    disk_restored_tokens: int
    host_cache_bytes: int
    disk_cache_bytes: int
    disk_damaged: int
    evictions: int
    counters: Counters

    @property
    def acceptance(self) -> float:
        """Share of drafted image codes that were kept; 0 where none was drafted."""
        return self.counters.accepted / self.counters.drafted if self.counters.drafted else 0.0


def snapshot(
    counters: Counters,
    runner: ModelRunner,
    blocks: BlockManager,
    below: HostBlocks | None,
    scheduler: Scheduler,
    added: list[Request],
) -> Statistics:
    """Of an engine's parts; `added` are requests that the scheduler does not know yet. From any thread."""
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    drawing = sum(state.drawing for state in running)
    return Statistics(
        blocks=blocks.count,
        block_size=blocks.size,
        blocks_used=blocks.used,
        blocks_cached=blocks.idle,
        blocks_free=blocks.free,
        running_text=len(running) - drawing,
        running_image=drawing,
        waiting=len(waiting) + len(added),
        waiting_tokens=sum(len(s.full.tokens) for s in waiting) + sum(len(request.tokens) for request in added),
        prefix_hit_tokens=blocks.hit_tokens,
        evictions=blocks.evictions,
        prefix_tokens=blocks.looked_up_tokens,
        restored_tokens=blocks.restored_tokens,
        **below_statistics(below, blocks.size),
        counters=replace(
            counters,
            computed_tokens=runner.computed,
            preemptions=scheduler.preemptions,
            drafted=runner.drafted,
            accepted=runner.accepted,
        ),
    )
