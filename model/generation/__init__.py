"""Interleaved generation: continuous batching of text and image phases over one paged cache (paper, "Generation").

Token ids in, token ids out; documents are answered by `calumma.model.generate`.
"""

from calumma.model.generation.engine import Engine
from calumma.model.generation.request import Event, Logprob, PhaseSampling, PromptTooLong, Request, SamplingParams
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
