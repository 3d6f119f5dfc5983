"""What an engine has done and how full it is, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


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
