"""The HTTP deployment, and how it reaches the engine replicas of each model."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calumma.serve.deploy.naming import ENGINE, WATCHER
from calumma.serve.protocol import ENGINE_FAILED, FINAL_EVENTS, GenerationRequest, OutputStream, RequestFailed, Started
from calumma.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle


log = logging.getLogger(__name__)

ATTEMPTS = 3  # at a request, while the replicas that get it are lost before they have output
REPLICA_GONE_SECONDS = 2.0  # until Ray Serve knows that a replica is lost, or has failed
SCRAPE_SECONDS = 3.0  # replicas that take longer to send their statistics are left out


class _EngineFailedError(Exception):
    """A replica's engine has failed, as the message says; the replica is about to end."""


class RayBackend:
    """A `Backend` behind Ray Serve: the engine replicas of one application, wherever they are."""

    def __init__(self, application: str) -> None:
        self.application = application
        self._handle = self._find()

    def switch(self, application: str) -> None:
        """Send requests from now on to another application; those under way finish where they are."""
        self.application = application
        self._handle = self._find()

    def _find(self) -> DeploymentHandle:
        from ray import serve

        return serve.get_deployment_handle(ENGINE, self.application)

    async def generate(self, request: GenerationRequest) -> OutputStream:
        """As `Backend.generate`. While there is no output, a request whose replica is lost goes to another replica;
        later, or after ATTEMPTS, it fails."""
        from ray.serve.exceptions import BackPressureError

        started = begun = False
        for attempt in range(1, ATTEMPTS + 1):
            retry = replace(request, id=f"{request.id}-{attempt}")  # a replica may still work on the last attempt
            stream: Any = self._handle.options(stream=True).generate_batches.remote(retry)
            ended = False
            try:
                async for events in stream:
                    for event in events:
                        if isinstance(event, Started) and started:
                            continue
                        last_attempt = begun or attempt == ATTEMPTS
                        if isinstance(event, RequestFailed) and event.code == ENGINE_FAILED and not last_attempt:
                            raise _EngineFailedError(event.message)
                        started, begun = True, begun or not isinstance(event, Started)
                        ended = isinstance(event, FINAL_EVENTS)
                        yield event
                ended = True
                return
            except BackPressureError:
                ended = True
                yield RequestFailed(
                    429, "all replicas are busy and the queue is full; try again shortly", code="overloaded"
                )
                return
            except Exception as error:  # of Ray, of gRPC, or the replica's own
                ended = True
                log.warning("lost a replica of %s: %s: %s", self.application, type(error).__name__, error)
                if begun or attempt == ATTEMPTS:
                    yield RequestFailed(
                        503,
                        f"the replica was lost while answering ({type(error).__name__}); try again",
                        code="unavailable",
                    )
                    return
                await asyncio.sleep(REPLICA_GONE_SECONDS)
            finally:
                if not ended:
                    stream.cancel()

    async def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = await self._handle.describe.remote()
        return facts

    async def statistics(self) -> dict[str, dict[str, float]]:
        """Of all replicas that answer in SCRAPE_SECONDS."""
        found = await self._handle.broadcast("statistics").results_async(
            timeout_s=SCRAPE_SECONDS, return_exceptions=True
        )
        return {name: numbers for one in found if isinstance(one, dict) for name, numbers in one.items()}

    async def tokenize(self, text: str) -> list[int]:
        ids: list[int] = await self._handle.tokenize.remote(text)
        return ids

    async def detokenize(self, ids: list[int]) -> str:
        text: str = await self._handle.detokenize.remote(ids)
        return text


class Ingress:
    """The HTTP deployment. It validates and converts, and imports no torch.

    table: the application of each model. watch: that of the watcher, which may have moved some of them since.
    """

    def __init__(self, settings: ServeSettings, table: dict[str, str], watch: str | None = None) -> None:
        self._settings = settings
        self._backends = {name: RayBackend(application) for name, application in table.items()}
        self._catch_up(watch)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from calumma.serve.http.app import create_app

        return create_app(self._backends, self._settings)

    def switch(self, table: dict[str, str]) -> None:
        """Called by the watcher when a model has moved to another application."""
        for name, application in table.items():
            if self._backends[name].application != application:
                self._backends[name].switch(application)

    def _catch_up(self, watch: str | None) -> None:
        """An ingress that replaces a lost one asks where the models are by now."""
        from ray import serve

        if watch is not None and watch in serve.status().applications:
            self.switch(serve.get_deployment_handle(WATCHER, watch).table.remote().result(timeout_s=30))
