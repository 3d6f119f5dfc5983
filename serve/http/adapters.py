"""Adapters as models of their own towards clients: a request for one goes to its model's replicas with its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from calumma.serve.protocol import Backend, GenerationRequest, OutputStream
from calumma.serve.settings import ModelSettings


class AdaptedBackend:
    """A `Backend`: another one's, with one of its adapters."""

    def __init__(self, backend: Backend, adapter: str) -> None:
        self._backend, self._adapter = backend, adapter

    def generate(self, request: GenerationRequest) -> OutputStream:
        return self._backend.generate(replace(request, adapter=self._adapter))

    async def describe(self) -> dict[str, Any]:
        return await self._backend.describe()

    async def statistics(self) -> dict[str, dict[str, float]]:
        """None of its own: its model's replicas tell theirs."""
        return {}

    async def tokenize(self, text: str) -> list[int]:
        return await self._backend.tokenize(text)

    async def detokenize(self, ids: list[int]) -> str:
        return await self._backend.detokenize(ids)


def adapted_models(models: Iterable[ModelSettings]) -> dict[str, ModelSettings]:
    """By the name of each adapter, what its model's settings are under that name."""
    return {name: model.model_copy(update={"name": name}) for model in models for name in model.adapters}


def adapted_backends(backends: Mapping[str, Backend], models: Iterable[ModelSettings]) -> dict[str, Backend]:
    """By the name of each adapter, its model's backend with it."""
    return {name: AdaptedBackend(backends[model.name], name) for model in models for name in model.adapters}
