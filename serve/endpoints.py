"""The HTTP application over any backend: endpoints, errors in OpenAI's format, the playground page."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from calumma.serve import answer, conversation, gate, wire
from calumma.serve.answer import Label, Pieces
from calumma.serve.metrics import CONTENT_TYPE, Metrics
from calumma.serve.pieces import Backend, Job
from calumma.serve.settings import ServeSettings
from calumma.serve.wire import WireError

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("playground.html")
# The page loads nothing from elsewhere; pictures are data URLs.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(backend: Backend, settings: ServeSettings) -> FastAPI:
    """The application that answers over HTTP with what `backend` generates."""
    metrics = Metrics()
    app = FastAPI(title="calumma", docs_url=None, redoc_url=None)
    app.add_middleware(gate.Gate, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    _add_errors(app)
    _add_pages(app, backend, settings, metrics)
    _add_generation(app, backend, settings, metrics)
    return app


def _add_generation(app: FastAPI, backend: Backend, settings: ServeSettings, metrics: Metrics) -> None:
    def begin(job: Job) -> Pieces:
        return answer.watched(backend.generate(job), metrics)

    def label(kind: str, model: str | None) -> Label:
        if model is not None and model != settings.name:
            raise WireError(
                f"there is no model {model!r} here; this server has {settings.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return Label(f"{kind}-{uuid.uuid4().hex}", settings.name)

    @app.post("/v1/chat/completions", response_model=wire.ChatCompletion)
    async def chat(request: wire.ChatRequest) -> Any:
        named = label("chatcmpl", request.model)
        prompt = await asyncio.to_thread(conversation.chat_prompt, request)
        params = conversation.sampling_params(request, request.modalities, settings.sampling)
        pieces = begin(
            Job(named.id, prompt, params, request.limit, request.stream and request.options.include_progress)
        )
        if not request.stream:
            return answer.chat_completion(named, await answer.collected(pieces))
        return _events(answer.chat_events(named, await answer.accepted(pieces), pieces, request.options))

    @app.post("/v1/completions", response_model=wire.Completion)
    async def complete(request: wire.CompletionRequest) -> Any:
        named = label("cmpl", request.model)
        params = conversation.sampling_params(request, ["text"], settings.sampling)
        pieces = begin(Job(named.id, conversation.plain_prompt(request.prompt), params, request.max_tokens))
        if not request.stream:
            return answer.completion(named, await answer.collected(pieces))
        return _events(answer.completion_events(named, await answer.accepted(pieces), pieces, request.options))

    @app.post("/v1/images/generations", response_model=wire.Images)
    async def draw(request: wire.ImageRequest) -> Any:
        named = label("img", request.model)
        prompt = conversation.drawing_prompt(request.prompt)
        params = conversation.sampling_params(request, ["image"], settings.sampling)
        jobs = [
            Job(f"{named.id}-{k}", prompt, params if params.seed is None else replace(params, seed=params.seed + k))
            for k in range(request.n)
        ]
        return answer.images(named, await _all(jobs, begin))


async def _all(jobs: list[Job], begin: Any) -> list[answer.Answer]:
    """The answers to several jobs at once; the first failure stops the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer.collected(begin(job))) for job in jobs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _events(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers=UNBUFFERED)


def _add_pages(app: FastAPI, backend: Backend, settings: ServeSettings, metrics: Metrics) -> None:
    card = wire.ModelCard(id=settings.name, created=Label("", "").created)

    @app.get("/v1/models")
    async def models() -> wire.ModelList:
        return wire.ModelList(data=[card])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> wire.ModelCard:
        if name != card.id:
            raise WireError(
                f"there is no model {name!r} here; this server has {card.id!r}", status=404, code="model_not_found"
            )
        return card

    @app.get("/health")
    async def health() -> Response:
        try:
            facts = await backend.describe()
        except Exception as error:  # whatever keeps a replica from answering is what the caller wants to know
            log.warning("not healthy: %s", error)
            return JSONResponse({"status": "unavailable", "reason": str(error)}, 503)
        return JSONResponse({"status": "ok", "model": settings.name, "source": settings.model, **facts})

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)


def _add_errors(app: FastAPI) -> None:
    """Every error leaves as OpenAI's error object."""

    def response(error: WireError) -> JSONResponse:
        headers = {"Retry-After": "5"} if error.status == 503 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(WireError)
    async def wire_error(request: Request, error: WireError) -> Response:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return response(_validation(request, error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is nothing at {request.url.path}; the API is below /v1, the playground at /",
            405: f"{request.url.path} does not take {request.method}",
        }
        code = gate.CODE if error.status_code == 413 else None
        message = messages.get(error.status_code, str(error.detail))
        return response(WireError(message, status=error.status_code, code=code))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("failed to answer %s", request.url.path, exc_info=error)
        return response(WireError("the server failed to answer; its log has the details", status=500))


def _validation(request: Request, error: RequestValidationError) -> WireError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return WireError(f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if tuple(first["loc"]) == ("body",):
        if "json" not in request.headers.get("content-type", ""):
            return WireError("send the body as JSON, with the header Content-Type: application/json")
        return WireError("the body must be a JSON object")
    message, param = wire.describe_errors(error.errors())
    return WireError(message, param=param, code="invalid_value")
