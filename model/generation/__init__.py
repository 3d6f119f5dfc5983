"""Interleaved generation: continuous batching of text and image phases over one KV cache (paper, "Generation")."""

from calumma.model.generation.answers import generate
from calumma.model.generation.engine import Engine
from calumma.model.generation.request import Event, PhaseSampling, PromptTooLong, Request, SamplingParams

__all__ = ["Engine", "Event", "PhaseSampling", "PromptTooLong", "Request", "SamplingParams", "generate"]
