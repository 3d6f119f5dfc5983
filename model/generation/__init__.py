"""Interleaved generation: continuous batching of text and image phases over one paged cache (paper, "Generation").

Token ids in, token ids out; documents are answered by `calumma.model.generate`. torch is imported with the first use of
the engine: sampling parameters need none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calumma.model.generation.request import Event, Logprob, PhaseSampling, PromptTooLong, Request, SamplingParams

if TYPE_CHECKING:
    from calumma.model.generation.engine import Engine
    from calumma.model.generation.statistics import Counters, Statistics
    from calumma.model.generation.tensor_parallel import Shard, read_shard

__all__ = [
    "Counters",
    "Engine",
    "Event",
    "Logprob",
    "PhaseSampling",
    "PromptTooLong",
    "Request",
    "SamplingParams",
    "Shard",
    "Statistics",
    "read_shard",
]

_MODULES = {
    "Counters": "statistics",
    "Engine": "engine",
    "Shard": "tensor_parallel",
    "Statistics": "statistics",
    "read_shard": "tensor_parallel",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
