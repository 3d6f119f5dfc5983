"""How an endpoint is deployed on Ray Serve and taken down: an application with the HTTP ingress, and one for each
model, so that its next version can start beside it and take over when it answers.

Ray Serve starts and stops replicas with the load, replaces those that fail, and cancels the work of clients that have
gone.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.model.directory import missing_files
from calumma.platform import storage
from calumma.platform.specification import Tracking
from calumma.platform.tracking import registry
from calumma.serve import ranks
from calumma.serve.backend import CODER, ENGINE, INGRESS, WATCHER, Ingress
from calumma.serve.rollout import Placed, Watcher
from calumma.serve.safety import policy_of
from calumma.serve.settings import ModelSettings, ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

APPLICATION_PREFIX = "calumma-"
PATIENCE = 300.0  # seconds from deployed to answering; it takes one or two


class ServeError(RuntimeError):
    """Serving cannot start as asked; the message says what was found and what to do."""


def place(model: ModelSettings, source: str, endpoint: str) -> Placed:
    """Start a model as an application of its own, beside whatever runs, and wait until it is up. Its name is new each
    time. Raises ServeError, and leaves nothing of it behind."""
    from ray import serve

    try:
        ranks.require_room(model, ranks.nodes_of_cluster())
    except ValueError as error:
        raise ServeError(str(error)) from error
    application = f"{APPLICATION_PREFIX}{endpoint}:{model.name}:{secrets.token_hex(4)}"
    try:
        serve.run(build_model(model, source), name=application, route_prefix=None)
    except Exception as error:
        reason = _failure(application) or str(error)
        with contextlib.suppress(Exception):
            serve.delete(application)
        raise ServeError(f"the model {model.model} did not come up: {reason}") from error
    return Placed(application, source)


def build_model(model: ModelSettings, source: str) -> Application:
    """A model's application, not yet deployed: engine replicas, and replicas that code images where asked for."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    from calumma.serve.coding import CodingReplica
    from calumma.serve.replica import Replica
    from calumma.serve.scaling import QueuedTokens

    each = ranks.bundle(model)
    several: dict[str, Any] = {
        "placement_group_bundles": [each] * model.tensor_parallel,
        "placement_group_strategy": "STRICT_PACK",
    }
    engine = serve.deployment(
        name=ENGINE,
        ray_actor_options={"num_cpus": each["CPU"], "num_gpus": each.get("GPU", 0)},
        **(several if model.tensor_parallel > 1 else {}),
        max_ongoing_requests=2 * model.max_sequences,  # those beyond the engine's slots wait in its own queue
        max_queued_requests=model.max_queued,
        autoscaling_config=AutoscalingConfig(
            min_replicas=model.min_replicas,
            max_replicas=model.max_replicas,
            target_ongoing_requests=model.target_ongoing_requests,
            upscale_delay_s=model.busy_seconds,
            downscale_delay_s=model.idle_seconds,
            look_back_period_s=max(11.0, min(30.0, model.busy_seconds)),
            policy=AutoscalingPolicy(
                policy_function=QueuedTokens,
                policy_kwargs={
                    "requests_per_replica": model.target_ongoing_requests,
                    "tokens_per_replica": model.queued_tokens,
                },
            ),
        ),
        request_router_config={"request_router_class": "calumma.serve.routing.PrefixRouter"},
        max_constructor_retry_count=2,
        health_check_period_s=2,  # a failed engine is replaced after three looks
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=model.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )(Replica)
    if not model.image_coders:
        return engine.bind(model, source)
    coder = serve.deployment(
        name=CODER,
        ray_actor_options={"num_cpus": model.cpus_per_replica, "num_gpus": model.image_coder_gpus},
        max_ongoing_requests=64,
        autoscaling_config=AutoscalingConfig(
            min_replicas=1,
            max_replicas=model.image_coders,
            target_ongoing_requests=8,
            upscale_delay_s=model.busy_seconds,
            downscale_delay_s=model.idle_seconds,
        ),
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=model.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )(CodingReplica)
    return engine.bind(model, source, coder.bind(model, source))


def build_ingress(settings: ServeSettings, table: dict[str, str]) -> Application:
    """The endpoint's application, not yet deployed; `table` says which application has each model."""
    from ray import serve

    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=1,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        max_ongoing_requests=2 * settings.limits.running,  # the limit itself is told by the application, as 429
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, table, _watch_name(settings.name) if settings.watch_seconds else None)


def locate(model: str, settings: Tracking | None = None) -> str:
    """The URI or absolute path of the model directory that `model` names, proven to be a whole one.

    Raises TrackingError, StorageError or ServeError, each saying what was looked for.
    """
    source = registry.model_source(model, settings)
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


def find(model: ModelSettings) -> str:
    """`locate`, of a model that can be held as asked. Raises ServeError too where it cannot."""
    source = locate(model.model, model.tracking)
    try:
        ranks.require_heads(model, source)
    except ValueError as error:
        raise ServeError(str(error)) from error
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

    It outlives this process if the cluster does. Deploying the same name again replaces it: the new models start beside
    the old ones, which finish what they have begun. The address is one of the cluster's head, so do not wait from
    another machine. Raises ServeError, TrackingError, StorageError.
    """
    from ray import serve

    sources = {model.name: find(model) for model in settings.models}
    policy_of(settings.safety)
    _quiet()
    _start_http(settings)
    name = APPLICATION_PREFIX + settings.name
    old = [application for application in serve.status().applications if application.startswith(f"{name}:")]
    placed: dict[str, Placed] = {}
    try:
        for model in settings.models:
            placed[model.name] = place(model, sources[model.name], settings.name)
        table = {model: one.application for model, one in placed.items()}
        _delete([_watch_name(settings.name)])
        serve.run(build_ingress(settings, table), name=name, route_prefix="/")
        if settings.watch_seconds:
            watcher = serve.deployment(name=WATCHER, num_replicas=1, ray_actor_options={"num_cpus": 0})(Watcher)
            bound = watcher.bind(settings, placed, name, settings.watch_seconds)
            serve.run(bound, name=_watch_name(settings.name), route_prefix=None)
    except Exception as error:
        reason = str(error) if isinstance(error, ServeError) else _failure(name) or str(error)
        with contextlib.suppress(Exception):
            _delete([one.application for one in placed.values()])
            if not old:
                undeploy(settings.name)
        raise ServeError(reason) from error
    _delete([application for application in old if application != _watch_name(settings.name)])
    if wait:
        await_health(settings.url)
    return settings.url


def _watch_name(name: str) -> str:
    return f"{APPLICATION_PREFIX}{name}:watch"


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


def undeploy(name: str = "calumma", patience: float = PATIENCE) -> None:
    """Take the endpoint down, and Ray Serve with it when nothing else runs there. New requests are turned away at once;
    answers in flight get up to `patience` seconds."""
    from ray import serve

    _quiet()
    _forget_the_dead()
    endpoint = APPLICATION_PREFIX + name
    _delete([_watch_name(name)])
    _delete([endpoint], patience)  # its streams need the models until they end
    _delete([application for application in serve.status().applications if application.startswith(f"{endpoint}:")])
    if not serve.status().applications:
        serve.shutdown()


def _delete(applications: list[str], patience: float = PATIENCE) -> None:
    """Delete those that are there, and wait until they are gone."""
    from ray import serve

    there = set(applications) & set(serve.status().applications)
    for application in there:
        serve.delete(application, _blocking=False)
    end = time.monotonic() + patience
    while there & set(serve.status().applications) and time.monotonic() < end:
        time.sleep(0.2)


def _quiet() -> None:
    """Ray Serve's notes on every deployment stay in its log files; the terminal gets warnings."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _forget_the_dead() -> None:
    """This process may have a handle of a Ray Serve that another process has shut down since."""
    from ray.serve.context import _check_cached_client_alive

    _check_cached_client_alive()


def _start_http(settings: ServeSettings) -> None:
    """Start Ray Serve's proxy at the wanted address, or check that the one that runs is there."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    _forget_the_dead()
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


def _failure(application: str) -> str:
    """What Ray Serve says about an application that did not come up: the last line is the exception's."""
    from ray import serve

    with contextlib.suppress(Exception):
        overview = serve.status().applications[application]
        said = [d.message for d in overview.deployments.values() if d.message] or [overview.message]
        return "; ".join(message.strip().splitlines()[-1] for message in said if message.strip())
    return ""
