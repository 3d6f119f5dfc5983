"""Interleaved generation: continuous batching of text and image phases over one paged cache (paper, "Generation").

Token ids in, token ids out; documents are answered by `calumma.model.generate`. torch is imported with the first use of
the engine: sampling parameters need none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from calumma.model.generation.constraint import Constraint, ConstraintCompiler, TokenConstraint
from calumma.model.generation.request import (
    Event,
    Failure,
    Logprob,
    PhaseSampling,
    PromptTooLong,
    Request,
    SamplingParams,
    nth_seed,
)

if TYPE_CHECKING:
    from calumma.model.generation.engine import Engine
    from calumma.model.generation.faults import StepFailed
    from calumma.model.generation.statistics import Counters, Statistics
    from calumma.model.generation.tensor_parallel import Shard, read_shard

__all__ = [
    "Constraint",
    "ConstraintCompiler",
    "Counters",
    "Engine",
    "Event",
    "Failure",
    "Logprob",
    "PhaseSampling",
    "PromptTooLong",
    "Request",
    "SamplingParams",
    "Shard",
    "Statistics",
    "StepFailed",
    "TokenConstraint",
    "nth_seed",
    "read_shard",
]

_MODULES = {
    "Counters": "statistics",
    "Engine": "engine",
    "StepFailed": "faults",
    "Shard": "tensor_parallel",
    "Statistics": "statistics",
    "read_shard": "tensor_parallel",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
