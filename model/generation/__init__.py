"""Interleaved generation: continuous batching of text and image phases over one paged cache (paper, "Generation").

torch is imported with the first use of the engine: sampling parameters need none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calumma.model.generation.request import Event, Logprob, PhaseSampling, PromptTooLong, Request, SamplingParams

if TYPE_CHECKING:
    from calumma.model.generation.answers import generate
    from calumma.model.generation.engine import Engine
    from calumma.model.generation.parallel import Shard, read_part
    from calumma.model.generation.statistics import Counters, Statistics

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
    "generate",
    "read_part",
]

_MODULES = {
    "Counters": "statistics",
    "Engine": "engine",
    "Shard": "parallel",
    "Statistics": "statistics",
    "generate": "answers",
    "read_part": "parallel",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
