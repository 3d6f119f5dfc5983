"""Interleaved generation: continuous batching of text and image phases over one paged cache (paper, "Generation").

Token ids in, token ids out; documents are answered by `calumma.model.generate`.
"""

from calumma.model.generation.constraint import Constraint, ConstraintCompiler, TokenConstraint
from calumma.model.generation.engine import Engine
from calumma.model.generation.faults import StepFailed
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
