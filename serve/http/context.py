"""What the endpoints share: models, settings, metrics, limits, the safety policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from calumma.serve.batches.store import OwnerStore, Store
from calumma.serve.http.access.caller import current_caller
from calumma.serve.http.access.drain import Drain
from calumma.serve.http.adapters import adapted_backends, adapted_models
from calumma.serve.http.facts import ModelFacts
from calumma.serve.http.image_loader import ImageLoader, ImageSource, LoadedImages
from calumma.serve.http.metrics import Metrics
from calumma.serve.http.moderation import moderated
from calumma.serve.http.streams import GenerationOutput, collect, metered
from calumma.serve.http.tool_calls import AnswerStream, with_tool_calls
from calumma.serve.http.wire.errors import APIError
from calumma.serve.protocol import Backend, GenerationRequest
from calumma.serve.safety import load_policy
from calumma.serve.settings import ModelSettings, ServeSettings


class ServingContext:
    """The served models, and what every generation goes through: limits, the safety policy, metrics."""

    def __init__(self, backends: Mapping[str, Backend], settings: ServeSettings, drain: Drain) -> None:
        """backends: by the model's name. Raises ValueError on a safety policy that cannot be made."""
        self.settings, self.metrics, self.drain = settings, Metrics(), drain
        self.models = {model.name: model for model in settings.models} | adapted_models(settings.models)
        self.backends = {**backends, **adapted_backends(backends, settings.models)}
        self.facts = ModelFacts(self.backends)
        self.image_loader = ImageLoader(settings.limits, settings.remote_images)
        self._policy = load_policy(settings.safety)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """For as long as the application takes requests."""
        async with self.facts.refreshing():
            try:
                yield
            finally:
                self.image_loader.close()

    def model(self, name: str | None) -> ModelSettings:
        """The model a request names; the first one where it names none. Raises APIError 404."""
        found = self.models.get(name or self.settings.name)
        if found is None:
            known = ", ".join(repr(one) for one in self.models)
            raise APIError(
                f"there is no model {name!r} here; this server has {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return found

    def generate(self, request: GenerationRequest, model: str) -> AnswerStream:
        """The output of the current caller's request to a model, under the safety policy and the deadline, and
        measured."""
        caller = current_caller()
        salt, priority = caller.salt_for(request.salt), caller.priority + request.priority
        request = replace(request, salt=salt, tenant=caller.name, priority=priority)
        stream = moderated(request, self.backends[model].generate, self._policy)
        measured = metered(stream, self.metrics, model, self.settings.limits.seconds)
        constraint = request.params.constraint
        return measured if constraint is None or constraint.kind != "tools" else with_tool_calls(measured)

    def files(self, owner: str | None) -> OwnerStore:
        """Whose files and batches. Raises APIError 404 where the server keeps none."""
        location = self.settings.batches.location
        if location is None:
            raise APIError(
                "this server keeps no files; its operator may set `batches.location`", status=404, code="unsupported"
            )
        return Store(location).of(owner)

    async def generate_all(self, requests: list[GenerationRequest], model: str) -> list[GenerationOutput]:
        """The whole outputs of several requests at once; the first failure stops the others. Raises APIError."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(collect(self.generate(request, model))) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def load_images(self, sources: Sequence[ImageSource], model: str) -> LoadedImages:
        """The images of the current caller's request, as the model sees them. Raises APIError."""
        if not sources:
            return {}
        side = (await self.facts.known(model)).get("image_size")
        return await self.image_loader.load(sources, side, current_caller().name)

    def max_tokens(self, asked: int | None, param: str) -> int | None:
        """The most tokens an output may have. Raises APIError on more than the server allows."""
        most = self.settings.limits.tokens
        if most is not None and asked is not None and asked > most:
            raise APIError(f"an answer may have {most} tokens here, {asked} were asked for", param=param)
        return most if asked is None else asked

    def require_choices(self, choices: int, stops: int = 0) -> None:
        """Raises APIError on more choices, or stop strings, than a request may ask for."""
        limits = self.settings.limits
        if choices > limits.choices:
            raise APIError(f"a request may ask for {limits.choices} answers here, found {choices}", param="n")
        if stops > limits.stops:
            raise APIError(f"a request may have {limits.stops} stop strings here, found {stops}", param="stop")
