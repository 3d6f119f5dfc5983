"""The Ray Serve application: an HTTP ingress before autoscaled engine replicas, and how it is deployed and taken down.

Ray Serve routes each request to the least busy replica, starts and stops replicas with the load, replaces those that
fail, and cancels the work of clients that have gone.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.model.directory import missing_files
from calumma.platform import storage, tracking
from calumma.platform.config import Tracking
from calumma.serve.pieces import Job, Piece, Refused
from calumma.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

APPLICATION_PREFIX = "calumma-"
PATIENCE = 300.0  # seconds from deployed to answering; it takes one or two


class ServeError(RuntimeError):
    """Serving cannot start as asked; the message says what was found and what to do."""


class RayBackend:
    """A `Backend` behind a Ray Serve handle: the engine replicas, wherever they are."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, RayServeException

        stream: Any = self._handle.options(stream=True).generate.remote(job)
        ended = False
        try:
            async for piece in stream:
                yield piece
            ended = True
        except BackPressureError:
            ended = True
            yield Refused(503, "all replicas are busy and the queue is full; try again shortly", code="overloaded")
        except (RayError, RayServeException) as error:
            ended = True
            yield Refused(
                503, f"the replica was lost while answering ({type(error).__name__}); try again", code="unavailable"
            )
        finally:
            if not ended:
                stream.cancel()

    async def describe(self) -> dict[str, Any]:
        return await self._handle.describe.remote()


class Ingress:
    """The HTTP deployment: checks and converts, never touches a tensor of the model."""

    def __init__(self, replicas: DeploymentHandle, settings: ServeSettings) -> None:
        self._replicas = replicas
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        from calumma.serve.endpoints import create_app

        return create_app(RayBackend(self._replicas), self._settings)


def build(settings: ServeSettings, source: str | None = None) -> Application:
    """The application, not yet deployed. `source` is where the model directory is, if that is known already."""
    from ray import serve

    from calumma.serve.replica import Replica

    engine = serve.deployment(
        name="Engine",
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        max_ongoing_requests=2 * settings.max_sequences,  # those beyond the engine's slots wait in its own queue
        max_queued_requests=settings.max_queued,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
        },
        max_constructor_retry_count=2,
        health_check_timeout_s=120,
    )(Replica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=1,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        max_ongoing_requests=1000,
        health_check_timeout_s=120,
    )(serve.ingress()(Ingress))
    return ingress.bind(engine.bind(settings, source or locate(settings.model, settings.tracking)), settings)


def locate(model: str, settings: Tracking | None = None) -> str:
    """The URI or absolute path of the model directory that `model` names, proven to be a whole one.

    Raises TrackingError, StorageError or ServeError, each saying what was looked for.
    """
    source = tracking.model_source(model, settings)
    if "://" not in source:
        source = str(Path(source).expanduser().resolve())
    elif not source.startswith(("s3://", "file://")):
        return source  # an artifact of an MLflow server: the replica downloads it
    origin = "" if source == model else f" ({model} leads there)"
    if not storage.exists(source):
        raise ServeError(f"there is no model directory at {source}{origin}")
    missing = missing_files(lambda name: storage.exists(storage.join(source, name)))
    if missing:
        raise ServeError(f"{source}{origin} is not a whole model directory: {', '.join(missing)} missing")
    return source


def require_port(host: str, port: int) -> None:
    """Raises ServeError when somebody listens at the port already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen at {host}:{port} ({error.strerror}); choose another with --port, or see who has it: "
                f"ss -ltnp 'sport = :{port}'"
            ) from error


def deploy(settings: ServeSettings, wait: bool = True) -> str:
    """Deploy in the Ray cluster this process is connected to; with `wait`, until it answers. Returns the base URL.

    It outlives this process if the cluster does. Deploying the same name again replaces it without a gap. The address
    is one of the cluster's head, so do not wait from another machine.
    Raises ServeError, TrackingError, StorageError.
    """
    from ray import serve

    source = locate(settings.model, settings.tracking)
    _quiet()
    _start_http(settings)
    try:
        serve.run(build(settings, source), name=APPLICATION_PREFIX + settings.name, route_prefix="/")
    except Exception as error:
        reason = _failure(settings.name) or str(error)
        with contextlib.suppress(Exception):
            undeploy(settings.name)
        raise ServeError(f"the model {settings.model} did not come up: {reason}") from error
    if wait:
        await_health(settings.url)
    return settings.url


def await_health(url: str, patience: float = PATIENCE) -> None:
    """Wait until a server answers as healthy. Raises ServeError with its last word after `patience` seconds."""
    import requests

    end = time.monotonic() + patience
    while True:
        try:
            answer = requests.get(f"{url}/health", timeout=30)
            if answer.ok:
                return
            last = f"status {answer.status_code}: {answer.text[:300]}"
        except requests.RequestException as error:
            last = str(error)
        if time.monotonic() > end:
            raise ServeError(f"{url}/health is not well after {patience:.0f} s ({last})")
        time.sleep(0.5)


def undeploy(name: str = "calumma") -> None:
    """Take the application down, and Ray Serve with it when nothing else runs there."""
    from ray import serve

    _quiet()
    serve.delete(APPLICATION_PREFIX + name)
    if not serve.status().applications:
        serve.shutdown()


def _quiet() -> None:
    """Ray Serve's notes on every deployment stay in its log files; the terminal gets warnings."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _start_http(settings: ServeSettings) -> None:
    """Start Ray Serve's proxy at the wanted address, or check that the one that runs is there."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        client = _get_global_client()
    except RayServeException:
        client = None
    if client is None:
        require_port(settings.host, settings.port)
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
        return
    running = client.http_config
    if (running.host, running.port) != (settings.host, settings.port):
        raise ServeError(
            f"Ray Serve runs in this cluster already and listens at {running.host}:{running.port}, "
            f"not at {settings.host}:{settings.port}; use that address, or stop it first"
        )


def _failure(name: str) -> str:
    """What Ray Serve says about an application that did not come up: the last line is the exception's."""
    from ray import serve

    with contextlib.suppress(Exception):
        overview = serve.status().applications[APPLICATION_PREFIX + name]
        said = [d.message for d in overview.deployments.values() if d.message] or [overview.message]
        return "; ".join(message.strip().splitlines()[-1] for message in said if message.strip())
    return ""
