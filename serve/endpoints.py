"""The HTTP application over any backends: the API, health, metrics, the playground page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from calumma.model.document import Document
from calumma.serve import answer, conversation, gate, responses, safety, streams, wire
from calumma.serve.answer import Answer, Label, Pieces
from calumma.serve.errors import add_errors
from calumma.serve.metrics import CONTENT_TYPE, Metrics
from calumma.serve.pictures import Pictures
from calumma.serve.pieces import Backend, Job
from calumma.serve.replica import BOS, EOS
from calumma.serve.settings import ModelSettings, ServeSettings
from calumma.serve.wire import WireError

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("playground.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """The contents of the page's elements of one kind, as a Content-Security-Policy names them."""
    inner = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inner)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


# The page loads nothing from elsewhere and runs no script but its own; pictures are data URLs.
PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
SCRAPE_SECONDS = 3.0  # the engines get so long to tell their numbers before a page shows the last known ones


class Served:
    """The models of an endpoint, and what a request goes through on its way to one of them and back."""

    def __init__(self, backends: Mapping[str, Backend], settings: ServeSettings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.backends = backends
        self.models = {model.name: model for model in settings.models}
        self.pictures = Pictures(settings.limits, settings.remote_images)
        self._policy = safety.policy_of(settings.safety)

    def model(self, name: str | None) -> ModelSettings:
        """The model a request names; the first one where it names none. Raises WireError 404."""
        found = self.models.get(name or self.settings.name)
        if found is None:
            known = ", ".join(repr(one) for one in self.models)
            raise WireError(
                f"there is no model {name!r} here; this server has {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return found

    def begin(self, job: Job, model: str) -> Pieces:
        """The answer to a job, under the safety policy, the deadline and the eyes of the metrics."""
        pieces = safety.guarded(job, self.backends[model].generate, self._policy)
        return answer.watched(pieces, self.metrics, model, self.settings.limits.seconds)

    def limited(self, tokens: int | None, param: str) -> int | None:
        """The most tokens an answer may have. Raises WireError on more than the server allows."""
        most = self.settings.limits.tokens
        if most is not None and tokens is not None and tokens > most:
            raise WireError(f"an answer may have {most} tokens here, {tokens} were asked for", param=param)
        return most if tokens is None else tokens

    def require_choices(self, number: int, stops: int = 0) -> None:
        """Raises WireError on more answers, or stop strings, than a request may ask for."""
        limits = self.settings.limits
        if number > limits.choices:
            raise WireError(f"a request may ask for {limits.choices} answers here, found {number}", param="n")
        if stops > limits.stops:
            raise WireError(f"a request may have {limits.stops} stop strings here, found {stops}", param="stop")


def create_app(backends: Backend | Mapping[str, Backend], settings: ServeSettings) -> FastAPI:
    """The application that answers over HTTP with what the backends generate; one alone is the settings' first model.

    Raises ValueError when the settings name a safety policy that cannot be made.
    """
    served = Served(backends if isinstance(backends, Mapping) else {settings.name: backends}, settings)
    app = FastAPI(title="calumma", docs_url=None, redoc_url=None)
    app.add_middleware(gate.Gate, metrics=served.metrics, settings=settings)
    add_errors(app)
    _add_pages(app, served)
    _add_chat(app, served)
    _add_completions(app, served)
    _add_images(app, served)
    _add_tokenizer(app, served)
    return app


def _label(kind: str, model: ModelSettings) -> Label:
    return Label(f"{kind}-{uuid.uuid4().hex}", model.name)


def _add_chat(app: FastAPI, served: Served) -> None:
    @app.post("/v1/chat/completions", response_model=responses.ChatCompletion)
    async def chat(request: wire.ChatRequest) -> Any:
        model = served.model(request.model)
        served.require_choices(request.n, len(request.stops))
        label = _label("chatcmpl", model)
        job = Job(
            label.id,
            await asyncio.to_thread(conversation.chat_prompt, request, served.pictures),
            conversation.sampling_params(request, request.modalities, model.sampling),
            served.limited(request.limit, "max_completion_tokens" if request.max_completion_tokens else "max_tokens"),
            progress=True,
            previews=request.options.partial_images if request.stream else 0,
            stop=request.stops,
            logprobs=request.alternatives,
            begin_with_image=request.begin_with == "image",
        )
        jobs = conversation.numbered(job, request.n)
        if not request.stream:
            return answer.chat_completion(label, await _whole(served, jobs, model.name), request.logprobs)
        begun = [served.begin(one, model.name) for one in jobs]
        started = await answer.all_accepted(begun)
        return _events(answer.events(begun, *streams.chat(label, started, request)))


def _add_completions(app: FastAPI, served: Served) -> None:
    @app.post("/v1/completions", response_model=responses.Completion)
    async def complete(request: wire.CompletionRequest) -> Any:
        model = served.model(request.model)
        served.require_choices(request.n * len(request.prompts), len(request.stops))
        label = _label("cmpl", model)
        params = conversation.sampling_params(request, ["text"], model.sampling)
        most = served.limited(request.max_tokens, "max_tokens")
        jobs = []
        for number, prompt in enumerate(request.prompts):
            read: Document | tuple[int, ...] = conversation.plain_prompt(prompt) if isinstance(prompt, str) else prompt
            job = Job(
                f"{label.id}-{number}", read, params, most, True, 0, request.stops, request.logprobs, echo=request.echo
            )
            jobs += conversation.numbered(job, request.n)
        if not request.stream:
            answers = await _whole(served, jobs, model.name)
            return answer.completion(label, answers, request.n, request.logprobs is not None)
        begun = [served.begin(one, model.name) for one in jobs]
        started = await answer.all_accepted(begun)
        return _events(answer.events(begun, *streams.completion(label, started, request)))


def _add_images(app: FastAPI, served: Served) -> None:
    @app.post("/v1/images/generations", response_model=responses.Images, response_model_exclude_none=True)
    async def draw(request: wire.ImageRequest) -> Any:
        model = served.model(request.model)
        label = _label("img", model)
        side = 0
        if request.stream or request.size not in (None, "auto"):
            side = int((await served.backends[model.name].describe())["image_size"])
            if request.size not in (None, "auto", f"{side}x{side}"):
                raise WireError(f"this model draws {side}x{side}; found size {request.size}", param="size")
        params = conversation.sampling_params(request, ["image"], model.sampling)
        job = Job(
            label.id,
            conversation.drawing_prompt(request.prompt),
            params,
            progress=True,
            previews=request.partial_images if request.stream else 0,
        )
        jobs = conversation.numbered(job, request.n)
        if not request.stream:
            return answer.images(label, await _whole(served, jobs, model.name), request)
        begun = [served.begin(one, model.name) for one in jobs]
        started = await answer.all_accepted(begun)
        chunks, tail = streams.images(label, started, request, side)
        return _events(answer.events(begun, [], chunks, tail))


def _add_tokenizer(app: FastAPI, served: Served) -> None:
    """The tokenizer over HTTP, as vLLM has it: lm-evaluation-harness needs no copy of it then."""

    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        return {"tokenizer_class": "calumma", "bos_token": BOS, "eos_token": EOS, "pad_token": None}

    @app.post("/tokenize")
    async def tokenize(request: wire.TokenizeRequest) -> dict[str, Any]:
        backend = served.backends[served.model(request.model).name]
        tokens = await backend.tokenize(conversation.well_formed(request.prompt, "prompt"))
        if request.add_special_tokens:
            tokens = [*(await backend.tokenize(BOS)), *tokens]
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(request: wire.DetokenizeRequest) -> dict[str, Any]:
        backend = served.backends[served.model(request.model).name]
        try:
            return {"prompt": await backend.detokenize(request.tokens)}
        except LookupError as error:
            raise WireError("the tokens hold an id that is none of the model's", param="tokens") from error


async def _whole(served: Served, jobs: list[Job], model: str) -> list[Answer]:
    """The answers to several jobs at once; the first failure stops the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer.collected(served.begin(job, model))) for job in jobs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _events(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers=UNBUFFERED)


def _add_pages(app: FastAPI, served: Served) -> None:
    settings, metrics = served.settings, served.metrics
    created = Label("", "").created
    cards = {name: responses.ModelCard(id=name, created=created) for name in served.models}

    @app.get("/v1/models")
    async def models() -> responses.ModelList:
        return responses.ModelList(data=list(cards.values()))

    @app.get("/v1/models/{name}")
    async def model(name: str) -> responses.ModelCard:
        return cards[served.model(name).name]

    async def facts(name: str) -> dict[str, Any]:
        found = await served.backends[name].describe()
        source = {} if settings.keys else {"source": served.models[name].model}
        return {"model": name, **source, "sampling": served.models[name].sampling.model_dump(), **found}

    @app.get("/health")
    async def health(model: str | None = None) -> Response:
        """Facts about a model, and whether it answers."""
        try:
            about = await facts(served.model(model).name)
        except WireError:
            raise
        except Exception as error:  # whatever keeps a replica from answering is what the caller wants to know
            log.warning("not healthy: %s", error)
            return JSONResponse({"status": "unavailable", "reason": str(error)}, 503)
        return JSONResponse({"status": "ok", "models": list(cards), "keys": bool(settings.keys), **about})

    @app.get("/ready")
    async def ready() -> Response:
        """Whether every model can answer now."""
        found = await asyncio.gather(*(facts(name) for name in cards), return_exceptions=True)
        wrong = {name: str(one) for name, one in zip(cards, found, strict=True) if isinstance(one, BaseException)}
        return JSONResponse({"ready": not wrong, "unavailable": wrong}, 503 if wrong else 200)

    @app.get("/metrics")
    async def numbers() -> Response:
        await _renew(served)
        return Response(metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)


async def _renew(served: Served) -> None:
    """Ask every engine for its numbers; of those that do not answer soon, the last known ones stay."""

    async def ask(name: str) -> dict[tuple[str, str], dict[str, float]]:
        async with asyncio.timeout(SCRAPE_SECONDS):
            found = await served.backends[name].statistics()
        return {(name, replica): numbers for replica, numbers in found.items()}

    names = list(served.backends)
    for name, found in zip(names, await asyncio.gather(*map(ask, names), return_exceptions=True), strict=True):
        if isinstance(found, BaseException):
            log.warning("the engines of %s do not tell their numbers: %s", name, found)
            continue
        others = {key: numbers for key, numbers in served.metrics.engines.items() if key[0] != name}
        served.metrics.engines = others | found
