"""The HTTP deployment, and how it reaches the engine replicas of each model."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from calumma.serve.deploy.continuation import ReplicaLost, ReplicasBusy, unbroken
from calumma.serve.deploy.control import ask_replicas
from calumma.serve.deploy.naming import ENGINE, WATCHER
from calumma.serve.http.access.drain import Drain
from calumma.serve.protocol import (
    FINAL_EVENTS,
    REQUEST_FAILED,
    EventBatch,
    GenerationRequest,
    OutputStream,
    RequestFailed,
)
from calumma.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle


log = logging.getLogger(__name__)

CATCH_UP_ATTEMPTS = 60


class RayBackend:
    """A `Backend` behind Ray Serve: the engine replicas of one application, wherever they are."""

    def __init__(self, application: str) -> None:
        self.application = application
        self.streams: Counter[str] = Counter()  # under way, by the application that they are at
        self._handle = self._find()

    def switch(self, application: str) -> None:
        """Send requests from now on to another application; those under way finish where they are."""
        self.application = application
        self._handle = self._find()

    def _find(self) -> DeploymentHandle:
        from ray import serve

        return serve.get_deployment_handle(ENGINE, self.application, _check_exists=False)  # it may be gone by now

    async def generate(self, request: GenerationRequest) -> OutputStream:
        """As `Backend.generate`. When the replica is lost that answers, another one goes on with it: of the same
        application, for what is begun stays with its version of the model."""
        application, handle = self.application, self._handle
        self.streams[application] += 1

        def ask(asked: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
            nonlocal application, handle
            if asked.continuation is None and application != self.application:
                self.streams[application] -= 1
                application, handle = self.application, self._handle
                self.streams[application] += 1
            return self._ask(handle, asked)

        try:
            async with aclosing(unbroken(request, ask)) as events:
                async for event in events:
                    yield event
        finally:
            self.streams[application] -= 1

    async def _ask(self, handle: DeploymentHandle, request: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
        """What a replica makes of a request. Raises ReplicaLost, ReplicasBusy."""
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        stream: Any = handle.options(stream=True).generate_batches.remote(request)
        ended = False
        try:
            async for batch in stream:
                ended = any(isinstance(event, FINAL_EVENTS) for event in batch.events)
                yield batch
            ended = True
        except BackPressureError as error:
            ended = True
            raise ReplicasBusy from error
        except DeploymentUnavailableError as error:
            ended = True
            if request.continuation is None:  # a new version takes over
                raise ReplicaLost(str(error)) from error
            message = "the model's version that was answering is gone, and another one cannot go on with its answer"
            yield EventBatch([RequestFailed(503, message, code="version_gone")])
        except Exception as error:  # of Ray, of gRPC, or the replica's own
            ended = True
            if isinstance(error, RayTaskError) and not isinstance(error.cause, RayActorError):
                log.exception("a replica failed to answer %s", request.id)
                message = f"the replica failed to answer ({type(error.cause or error).__name__})"
                yield EventBatch([RequestFailed(500, message, code=REQUEST_FAILED)])
                return
            raise ReplicaLost(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        finally:
            if not ended:
                stream.cancel()

    async def describe(self) -> dict[str, Any]:
        """Of a replica that is well. Raises LookupError where none is."""
        reports, wrong = await ask_replicas(self.application, ENGINE)
        if not reports:
            raise LookupError(f"no replica answers ({'; '.join(sorted(set(wrong))) or 'there is none now'})")
        return next(iter(reports.values()))["facts"]

    async def statistics(self) -> dict[str, dict[str, float]]:
        """Of all replicas that answer soon."""
        reports, _ = await ask_replicas(self.application, ENGINE)
        return {name: report["statistics"] for name, report in reports.items()}

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
        self._drain = Drain()
        self._backends = {name: RayBackend(application) for name, application in table.items()}
        # In the background: the constructor runs on the event loop, where nothing may wait for a deployment.
        self._catching_up = None if watch is None else asyncio.get_running_loop().create_task(self._catch_up(watch))

    def __serve_build_asgi_app__(self) -> FastAPI:
        from calumma.serve.http.app import create_app

        return create_app(self._backends, self._settings, self._drain)

    def switch(self, table: dict[str, str]) -> None:
        """Called by the watcher when a model has moved to another application."""
        for name, application in table.items():
            if self._backends[name].application != application:
                self._backends[name].switch(application)

    def streams(self, application: str) -> int:
        """How many outputs an application is at work on for this ingress."""
        return sum(backend.streams[application] for backend in self._backends.values())

    async def drain(self, seconds: float) -> int:
        """Take no new requests for so long; how many are under way."""
        return self._drain.hold(seconds)

    async def _catch_up(self, watch: str) -> None:
        """An ingress that replaces a lost one asks where the models are by now. Requests that come before the answer
        may find a version gone, and are sent again."""
        from ray import serve

        for _ in range(CATCH_UP_ATTEMPTS):
            try:
                if watch not in serve.status().applications:
                    return
                self.switch(await serve.get_deployment_handle(WATCHER, watch).table.remote())
            except Exception as error:
                log.warning("the watcher does not tell where the models are: %s", error)
                await asyncio.sleep(1)
            else:
                return
