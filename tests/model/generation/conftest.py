"""Tiny random Transformers, and engines stepped to their end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, Event, Request
from calumma.model.transformer import Output, Transformer

MakeTransformer = Callable[..., Transformer]
RunEngine = Callable[..., dict[str, list[Event]]]


class BiasedOutput(Output):
    """Logits with a number added to some ids': a model that never stops, or likes to begin images."""

    def __init__(self, config: ModelConfig, bias: dict[int, float]) -> None:
        super().__init__(config)
        self.added = bias

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Tensor:
        logits = super().forward(input, **loss)
        for token, value in self.added.items():
            logits[..., token] += value
        return logits[..., columns or slice(None)]


@pytest.fixture(scope="session")
def make_transformer() -> MakeTransformer:
    """(size of the vocabulary, seed, bias of logits by id, **changes of the shape): weights large enough that a token's
    distribution depends on what precedes it."""

    def make(
        size: int, seed: int = 0, bias: dict[int, float] | None = None, std: float = 0.4, **changes: Any
    ) -> Transformer:
        shape: dict[str, Any] = dict(layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=64)
        config = ModelConfig(vocabulary_size=size, **shape | changes)
        transformer, generator = Transformer(config), torch.Generator().manual_seed(seed)
        if bias:
            transformer.output = BiasedOutput(config, bias)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=std, generator=generator)
        return transformer.eval()

    return make


@pytest.fixture(scope="session")
def run_engine() -> RunEngine:
    """Add all requests, step to the end; the events of each."""

    def run(engine: Engine, *requests: Request) -> dict[str, list[Event]]:
        events: dict[str, list[Event]] = {request.id: [] for request in requests}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for event in engine.step():
                events[event.request_id].append(event)
        return events

    return run
