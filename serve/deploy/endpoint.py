"""How an endpoint is deployed on Ray Serve and taken down.

Its models are applications of their own, so that a model's next version can start beside it and take over when it
answers. Ray Serve starts and stops replicas with the load, replaces those that fail, and cancels the work of clients
that have gone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

from calumma.platform.storage import check_writable, is_remote, local_path
from calumma.serve.deploy.applications import ModelApplication, build_ingress, failure_reason, start_model
from calumma.serve.deploy.batches import build_batches
from calumma.serve.deploy.naming import (
    APPLICATION_PREFIX,
    INGRESS,
    WATCHER,
    batches_application,
    watcher_application,
)
from calumma.serve.deploy.preparation import ServeError, locate_servable, require_port
from calumma.serve.deploy.rollout import AliasWatcher
from calumma.serve.http.access.connections import ConnectionLimits, publish
from calumma.serve.http.access.tls import session_for
from calumma.serve.safety import load_policy
from calumma.serve.settings import ServeSettings

log = logging.getLogger(__name__)

DRAIN_LEASE = 20.0  # seconds that an ingress refuses requests for, unless it is told so again
ESTABLISHED = "01"  # in /proc/net/tcp
LOOKS = 2  # that find nothing unsent, before the proxy is ended
LOOK_SECONDS = 0.5  # between looks at what is under way
SETTLE_SECONDS = 10.0  # what is under way gets so long to be told that it is ended
UNHEARD_SECONDS = 60.0  # until an ingress that tells nothing is taken down with what it may have under way
PATIENCE = 300.0  # seconds; a deployed endpoint answers after one or two


def deploy(settings: ServeSettings, wait: bool = True) -> str:
    """Deploy in the Ray cluster this process is connected to; with `wait`, until it answers. Returns the base URL.

    It outlives this process if the cluster does. Deploying the same name again replaces it: the new models start beside
    the old ones, which finish what they have begun. The address is one of the cluster's head, so do not wait from
    another machine. Raises ServeError, TrackingError, StorageError.
    """
    from ray import serve

    sources = {model.name: locate_servable(model) for model in settings.models}
    load_policy(settings.safety)
    settings = _with_batches_at_hand(settings)
    _quiet_logs()
    start_http(settings)
    name = APPLICATION_PREFIX + settings.name
    old = [application for application in serve.status().applications if application.startswith(f"{name}:")]
    started: dict[str, ModelApplication] = {}
    try:
        for model in settings.models:
            started[model.name] = start_model(model, sources[model.name], settings.name)
        table = {model: one.application for model, one in started.items()}
        beside = [watcher_application(settings.name), batches_application(settings.name)]
        _delete(beside)
        serve.run(build_ingress(settings, table), name=name, route_prefix="/")
        if settings.batches.location is not None:
            watch = watcher_application(settings.name) if settings.watch_seconds else None
            serve.run(build_batches(settings, table, watch), name=beside[1], route_prefix=None)
        if settings.watch_seconds:
            watcher = serve.deployment(name=WATCHER, num_replicas=1, ray_actor_options={"num_cpus": 0})(AliasWatcher)
            bound = watcher.bind(settings, started, name, settings.watch_seconds)
            serve.run(bound, name=watcher_application(settings.name), route_prefix=None)
    except Exception as error:
        reason = str(error) if isinstance(error, ServeError) else failure_reason(name) or str(error)
        with contextlib.suppress(Exception):
            _delete([one.application for one in started.values()])
            if not old:
                undeploy(settings.name)
        raise ServeError(reason) from error
    _delete([application for application in old if application not in beside])
    if wait:
        await_health(settings.url, certificate=settings.tls_certificate)
    return settings.url


def _with_batches_at_hand(settings: ServeSettings) -> ServeSettings:
    """With a location of files that every process finds and may write to. Raises StorageError."""
    location = settings.batches.location
    if location is None:
        return settings
    if not is_remote(location):
        location = str(local_path(location).resolve())
    check_writable(location)
    return settings.model_copy(update={"batches": settings.batches.model_copy(update={"location": location})})


def await_health(url: str, patience: float = PATIENCE, certificate: str | None = None) -> None:
    """Wait until every model of a server answers. certificate: the server's, where it speaks TLS. Raises ServeError
    with the last reply after `patience` seconds."""
    import requests

    end, session = time.monotonic() + patience, session_for(certificate)
    while True:
        try:
            answer = session.get(f"{url}/ready", timeout=30)
            if answer.ok:
                return
            last = f"status {answer.status_code}: {answer.text[:300]}"
        except requests.RequestException as error:
            last = str(error)
        if time.monotonic() > end:
            raise ServeError(f"{url}/ready is not well after {patience:.0f} s ({last})")
        time.sleep(0.5)


def undeploy(name: str = "calumma", seconds: float = PATIENCE) -> None:
    """Take the endpoint down, and Ray Serve with it when nothing else runs there. New requests are turned away at once;
    answers in flight get up to `seconds`."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    _quiet_logs()
    _drop_stale_client()
    endpoint = APPLICATION_PREFIX + name
    end = time.monotonic() + seconds
    if endpoint in serve.status().applications:
        _drain(endpoint, end)
    _delete([watcher_application(name), batches_application(name)])
    _delete([endpoint], max(SETTLE_SECONDS, end - time.monotonic()))  # its streams need the models until they end
    _delete([application for application in serve.status().applications if application.startswith(f"{endpoint}:")])
    if not serve.status().applications:
        with contextlib.suppress(RayServeException):  # another process has shut it down
            if (client := _get_global_client()) is not None:
                _await_sent(client.http_config.port, end)
        serve.shutdown()


def _drain(endpoint: str, end: float) -> None:
    """Let the ingress refuse new requests with status 503, and wait until those under way have ended, at most until
    `end`, and as long as an ingress tells of them."""
    from ray import serve

    handle = serve.get_deployment_handle(INGRESS, endpoint)
    heard = time.monotonic()
    while time.monotonic() < min(end, heard + UNHEARD_SECONDS):
        try:
            under_way = sum(handle.broadcast("drain", DRAIN_LEASE).results(timeout_s=DRAIN_LEASE / 2))
        except Exception as error:  # one that was lost is replaced
            log.warning("an ingress does not tell its requests: %s", error)
        else:
            heard = time.monotonic()
            if not under_way:
                return
        time.sleep(LOOK_SECONDS)


def _await_sent(port: int, end: float) -> None:
    """Wait until the proxy of this machine has sent all it has, or has given up clients that do not read: what it holds
    for them is lost with it."""
    clear = 0
    while clear < LOOKS and time.monotonic() < end:
        clear = 0 if unsent_bytes(port) else clear + 1
        time.sleep(LOOK_SECONDS)


def unsent_bytes(port: int) -> int:
    """Of this machine's TCP connections at a port: what their clients have not taken yet (Linux; elsewhere 0)."""
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, queues, *_ = line.split()
                if state == ESTABLISHED and int(local.rpartition(":")[2], 16) == port:
                    found += int(queues.partition(":")[0], 16)
    return found


def _delete(applications: list[str], patience: float = PATIENCE) -> None:
    """Delete those that are there, and wait until they are gone."""
    from ray import serve

    there = set(applications) & set(serve.status().applications)
    for application in there:
        serve.delete(application, _blocking=False)
    end = time.monotonic() + patience
    while there & set(serve.status().applications) and time.monotonic() < end:
        time.sleep(0.2)


def _quiet_logs() -> None:
    """Ray Serve's messages on every deployment stay in its log files; the terminal gets warnings."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _drop_stale_client() -> None:
    """This process may have a handle of a Ray Serve that another process has shut down since."""
    from ray.serve.context import _check_cached_client_alive

    _check_cached_client_alive()


def start_http(settings: ServeSettings) -> None:
    """Start Ray Serve's proxy at the wanted address, or check that the one that runs is there."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    _drop_stale_client()
    try:
        client = _get_global_client()
    except RayServeException:
        client = None
    if client is None:
        require_port(settings.host, settings.port)
        limits = settings.limits
        publish(ConnectionLimits(limits.header_seconds, limits.body_seconds, limits.unread_seconds))
        options = {
            "host": settings.host,
            "port": settings.port,
            "ssl_keyfile": settings.tls_key,
            "ssl_certfile": settings.tls_certificate,
        }
        serve.start(proxy_location="HeadOnly", http_options=options)
        return
    running = client.http_config
    if (running.host, running.port) != (settings.host, settings.port):
        raise ServeError(
            f"Ray Serve runs in this cluster already and listens at {running.host}:{running.port}, "
            f"not at {settings.host}:{settings.port}; use that address, or stop it first"
        )
    if running.ssl_certfile != settings.tls_certificate:
        raise ServeError(
            f"Ray Serve runs in this cluster already, with {running.ssl_certfile or 'no certificate'} and not with "
            f"{settings.tls_certificate or 'plain HTTP'}; stop it first"
        )
