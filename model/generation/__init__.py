"""Interleaved generation: continuous batching of text and image phases over one paged cache (paper, "Generation")."""

from calumma.model.generation.answers import generate
from calumma.model.generation.engine import Engine
from calumma.model.generation.parallel import Shard, read_part
from calumma.model.generation.request import Event, Logprob, PhaseSampling, PromptTooLong, Request, SamplingParams
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
