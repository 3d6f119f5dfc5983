"""What the endpoints share: models, settings, metrics, limits, the safety policy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from calumma.serve import safety
from calumma.serve.http import moderation, streams
from calumma.serve.http.image_loader import ImageLoader
from calumma.serve.http.metrics import Metrics
from calumma.serve.http.streams import GenerationOutput, OutputStream
from calumma.serve.http.wire.errors import APIError
from calumma.serve.protocol import Backend, GenerationRequest
from calumma.serve.settings import ModelSettings, ServeSettings


class ServingContext:
    """The models of an endpoint, and what a request goes through on its way to one of them and back."""

    def __init__(self, backends: Mapping[str, Backend], settings: ServeSettings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.backends = backends
        self.models = {model.name: model for model in settings.models}
        self.pictures = ImageLoader(settings.limits, settings.remote_images)
        self._policy = safety.policy_of(settings.safety)

    def model(self, name: str | None) -> ModelSettings:
        """The model a request names; the first one where it names none. Raises WireError 404."""
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

    def begin(self, job: GenerationRequest, model: str) -> OutputStream:
        """The answer to a job, under the safety policy, the deadline and the eyes of the metrics."""
        pieces = moderation.guarded(job, self.backends[model].generate, self._policy)
        return streams.watched(pieces, self.metrics, model, self.settings.limits.seconds)

    def limited(self, tokens: int | None, param: str) -> int | None:
        """The most tokens an answer may have. Raises WireError on more than the server allows."""
        most = self.settings.limits.tokens
        if most is not None and tokens is not None and tokens > most:
            raise APIError(f"an answer may have {most} tokens here, {tokens} were asked for", param=param)
        return most if tokens is None else tokens

    def require_choices(self, number: int, stops: int = 0) -> None:
        """Raises WireError on more answers, or stop strings, than a request may ask for."""
        limits = self.settings.limits
        if number > limits.choices:
            raise APIError(f"a request may ask for {limits.choices} answers here, found {number}", param="n")
        if stops > limits.stops:
            raise APIError(f"a request may have {limits.stops} stop strings here, found {stops}", param="stop")


async def generate_all(served: ServingContext, jobs: list[GenerationRequest], model: str) -> list[GenerationOutput]:
    """The answers to several jobs at once; the first failure stops the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(streams.collected(served.begin(job, model))) for job in jobs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
