"""Models, health, readiness, metrics, and the playground's page."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response

from calumma.serve.http.context import ServingContext
from calumma.serve.http.metrics import CONTENT_TYPE
from calumma.serve.http.playground.page import PAGE, PAGE_HEADERS
from calumma.serve.http.wire import responses

log = logging.getLogger(__name__)

SCRAPE_SECONDS = 3.0  # the engines get so long to answer before /metrics shows what they said last


def add_status(app: FastAPI, context: ServingContext) -> None:
    settings, metrics = context.settings, context.metrics
    created = int(time.time())
    cards = {name: responses.ModelCard(id=name, created=created) for name in context.models}

    @app.get("/v1/models")
    async def models() -> responses.ModelList:
        """The models of this endpoint."""
        return responses.ModelList(data=list(cards.values()))

    @app.get("/v1/models/{name}")
    async def model(name: str) -> responses.ModelCard:
        """One of them."""
        return cards[context.model(name).name]

    @app.get("/health")
    async def health(model: str | None = None) -> Response:
        """That the server lives, whatever it is busy with, and what a model has told about itself last."""
        found = context.model(model)
        source = {} if settings.keys_needed else {"source": found.model}
        about = {"model": found.name, **source, "sampling": found.sampling.model_dump()}
        known = await context.facts.known(found.name)
        return JSONResponse({"status": "ok", "models": list(cards), "keys": settings.keys_needed, **about, **known})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether every model answered when it was last asked, and new requests are taken."""
        wrong = await context.facts.unavailable()
        state: dict[str, Any] = {"ready": not wrong and not context.drain.active, "unavailable": wrong}
        if context.drain.active:
            state["draining"] = True
        return JSONResponse(state, 200 if state["ready"] else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        """Metrics of the endpoint and of every engine behind it, for Prometheus."""
        await _refresh_engine_statistics(context)
        return Response(metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)


async def _refresh_engine_statistics(context: ServingContext) -> None:
    """Ask every engine for its statistics; of those that do not answer soon, the last known ones stay."""

    async def ask(name: str) -> dict[tuple[str, str], dict[str, float]]:
        async with asyncio.timeout(SCRAPE_SECONDS):
            found = await context.backends[name].statistics()
        return {(name, replica): numbers for replica, numbers in found.items()}

    names = list(context.backends)
    for name, found in zip(names, await asyncio.gather(*map(ask, names), return_exceptions=True), strict=True):
        if isinstance(found, BaseException):
            log.warning("the engines of %s do not tell their numbers: %s", name, found)
            continue
        others = {key: numbers for key, numbers in context.metrics.engines.items() if key[0] != name}
        context.metrics.engines = others | found
