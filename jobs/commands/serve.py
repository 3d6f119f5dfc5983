"""`calumma serve`: serve a model over HTTP from this machine, or on a Ray cluster that runs already."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from calumma.jobs.commands import serve_keys
from calumma.jobs.commands.serve_options import (
    adapters_of,
    additional_model,
    read_keys,
    read_settings,
    read_yaml,
    replica_range,
    served_name,
)
from calumma.platform.cluster import capacity
from calumma.platform.cluster import head as ray_head
from calumma.platform.cluster.capacity import ClusterError
from calumma.platform.cluster.head import Service
from calumma.platform.cluster.progress import format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from calumma.serve.settings import ServeSettings

app = typer.Typer(help="Serve a model over HTTP.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(serve_keys.app, name="keys")

EXAMPLE = {"messages": [{"role": "user", "content": "Draw a seven."}]}


@app.command()
def start(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model directory, s3://…, or models:/NAME@ALIAS.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with fields of ServeSettings (limits, safety, …); options override it.")
    ] = None,
    also: Annotated[list[str] | None, typer.Option(help="A further model, NAME=MODEL; repeats.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server of models:/…; default: ./mlflow.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; 0.0.0.0 for every interface.  [default: 127.0.0.1]")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at.  [default: 8000]")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; default: its registered one.")] = None,
    replicas: Annotated[
        str | None, typer.Option(help="Engine replicas: a number, or a range like 1..3.  [default: 1]")
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="CPUs of a replica.  [default: 1]")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of a replica.  [default: 0]")] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(help="Processes that hold a replica together, a GPU each with as many --gpus.  [default: 1]"),
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Requests a replica answers together.  [default: 16]")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="Share of a GPU that replicas may fill; the cache has what is left of it.  [default: 0.9]"),
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Positions of a replica's KV cache.  [default: as many as there is memory for]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or int8.  [default: float32 on CPUs; on GPUs bfloat16, int8 for want of room]"
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="File with the API keys' hashes (see `serve keys`), read again when it changes, but with --address "
            "read once; also $CALUMMA_API_KEYS."
        ),
    ] = None,
    open: Annotated[
        bool, typer.Option("--open", help="Let everybody who reaches --host use the server without keys.")
    ] = False,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file with the server's certificate; with --tls-key: HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with the certificate's key.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name by which clients may call the server, say example.org; repeats.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Whose web pages may use it, say https://example.org; repeats.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A low-rank adapter (PEFT's) to serve beside MODEL under this name; repeats."
        ),
    ] = None,
    watch: Annotated[
        float, typer.Option(help="Seconds between looks for a new version of models:/NAME@ALIAS; 0: never.")
    ] = 30.0,
    block: Annotated[
        bool, typer.Option("--block", help="Stay until SIGTERM or Ctrl-C; then let answers in flight finish, and end.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster: auto or ray://HOST:10001. Default: one of its own.")
    ] = None,
) -> None:
    """Serve models until `calumma serve stop`. Returns when they answer."""
    from rich.console import Console

    console = Console(stderr=True)
    with _errors_as_messages(console):
        options = {
            "model": model,
            "tracking": {"uri": tracking_uri} if tracking_uri else None,
            "name": name or (served_name(model) if model else None),
            "host": host,
            "port": port,
            "cpus_per_replica": cpus,
            "gpus_per_replica": gpus,
            "tensor_parallel": tensor_parallel,
            "max_sequences": max_sequences,
            "open": open or None,
            "tls_certificate": str(tls_certificate.absolute()) if tls_certificate else None,
            "tls_key": str(tls_key.absolute()) if tls_key else None,
            "allowed_hosts": allowed_host,
            "allowed_origins": allowed_origin,
            "memory": memory,
            "cache_tokens": cache_tokens,
            "dtype": dtype,
        }
        values = read_yaml(config) | {key: value for key, value in options.items() if value is not None}
        if replicas is not None:
            values["min_replicas"], values["max_replicas"] = replica_range(replicas)
        values.setdefault("watch_seconds", watch or None)
        values["adapters"] = values.get("adapters", {}) | adapters_of(adapter or [])
        values["also"] = [*values.get("also", []), *(additional_model(text, tracking_uri) for text in also or [])]
        read_keys(values, keys, here=address is None)
        _require_none_running()
        service = _start_on_cluster(values, address, console) if address else _start_on_own_head(values, console)
        asked = _on_signal() if block else None
        _print_endpoints(service)
        if asked is not None:
            while not asked.wait(3600):
                pass
            _stop(service, console)
            typer.echo(f"stopped {service.name}")


@app.command()
def key(name: Annotated[str, typer.Argument(help="Whose it is; shown in errors and logs.")]) -> None:
    """Make an API key: show it once, and the line that goes into the file of `serve start --keys`."""
    from calumma.serve.http.access.api_keys import hash_key, new_key

    secret = new_key()
    typer.echo(f"key   {secret}")
    typer.echo(f"line  {hash_key(secret)} {name}")


@app.command()
def status() -> None:
    """Show what is being served. Exit code 1: nothing, or it does not answer."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    with _errors_as_messages(console):
        service = Service.read()
    if service is None:
        typer.echo("nothing is being served; start with: calumma serve start MODEL")
        raise typer.Exit(1)
    state, facts = health(service)
    table = Table(show_header=False, box=None)
    rows = {
        "state": state,
        "url": service.url,
        "model": f"{service.name} ({service.model})",
        "cluster": f"{service.address}" + (f", process {service.pid}" if service.pid else ""),
        "for": format_duration(time.time() - service.started),
        **{
            key.replace("_", " "): str(value)
            for key, value in facts.items()
            if key not in ("status", "model", "source", "keys")
        },
    }
    for key, value in rows.items():
        table.add_row(f"[dim]{key}", value)
    Console().print(table)
    if state != "answering":
        raise typer.Exit(1)


@app.command()
def stop(
    now: Annotated[bool, typer.Option("--now", help="Do not wait for answers in flight.")] = False,
) -> None:
    """Stop what `calumma serve start` started, and nothing else. Answers in flight finish."""
    from rich.console import Console

    console = Console(stderr=True)
    with _errors_as_messages(console):
        service = Service.read()
        if service is None:
            typer.echo("nothing is being served")
            return
        _stop(service, console, now)
    typer.echo(f"stopped {service.name} at {service.url}")


def _stop(service: Service, console: Console, now: bool = False) -> None:
    """Let answers in flight finish, where the head lives; then end what is ours."""
    from rich.markup import escape

    try:
        with console.status("stopping: waiting for answers in flight"):
            if service.pid is None or (not now and service.listens):
                from calumma.serve.deploy.endpoint import undeploy

                with ray_head.connected(service.address, ours=service.pid is not None):
                    _ignore_sigterm()
                    undeploy(service.name, service.drain_seconds)
    except Exception as error:  # whatever it is, our head is not left running
        if service.pid is None:
            raise
        console.print(f"[yellow]not drained: {escape(str(error))}", highlight=False, soft_wrap=True)
    service.end()


def _ignore_sigterm() -> None:
    """Whoever sends it again gets what they asked for already; the handler that Ray has just installed would end this
    command before the answers have."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _interrupt_on_sigterm() -> None:
    """SIGTERM ends this command as Ctrl-C does, in order, instead of by the handler that Ray has just installed."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def _on_signal() -> threading.Event:
    """Set when this process is asked to end."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    return asked


def health(service: Service) -> tuple[str, dict[str, Any]]:
    """A word on a service's state, and what its /health tells."""
    import requests

    from calumma.serve.http.access.tls import session_for

    if not service.alive:
        return "ended unexpectedly (`calumma serve stop` clears it away)", {}
    try:
        session = session_for(service.certificate)
        facts = session.get(f"{service.url}/health", timeout=30).json()
        ready = session.get(f"{service.url}/ready", timeout=30).json()
    except (requests.RequestException, OSError, ValueError) as error:
        return f"not answering: {error}", {}
    if ready.get("draining"):
        return "stopping: answers in flight finish", facts
    wrong = "; ".join(f"{name}: {reason}" for name, reason in ready.get("unavailable", {}).items())
    return (f"unwell: {wrong}", facts) if wrong else ("answering", facts)


def _require_none_running() -> None:
    running = Service.read()
    if running is None:
        return
    if running.alive:
        raise ClusterError(f"{running.model} is being served at {running.url} already; first: calumma serve stop")
    running.end()


def _start_on_own_head(values: dict[str, Any], console: Console) -> Service:
    """On a Ray head of our own."""
    settings = read_settings(values)
    with console.status("looking at the model"):
        from calumma.serve.deploy.endpoint import deploy
        from calumma.serve.deploy.preparation import locate_servable, require_memory, require_port
        from calumma.serve.http.access.key_file import KeyFile
        from calumma.serve.http.access.tls import require_certificate

        if settings.keys_file:
            KeyFile(Path(settings.keys_file), settings.keys)
        if settings.tls_certificate and settings.tls_key:
            require_certificate(settings.tls_certificate, settings.tls_key)
        for one in settings.models:
            require_memory(one, locate_servable(one))
        require_port(settings.host, settings.port)
    needed = settings.ingress_cpus
    devices = capacity.gpus()
    for model in settings.models:  # with a model's next version beside it for as long as the old one has work
        versions = 2 if settings.watch_seconds else 1
        needed += model.cpus_per_replica * versions * (model.max_replicas + model.image_coders)
        if model.min_replicas * model.gpus_per_replica > devices:
            raise ClusterError(
                f"{model.min_replicas} replicas with {model.gpus_per_replica:g} GPUs each were asked for; "
                f"this machine has {devices} GPUs"
            )
    with console.status("starting Ray"):
        head = ray_head.start_head(max(capacity.cores(), math.ceil(needed)), devices)
    service = Service(
        url=settings.url,
        model=settings.model,
        name=settings.name,
        started=time.time(),
        address=head.address,
        pid=head.process.pid,
        born=head.process.create_time(),
        temporary=str(head.temporary),
        drain_seconds=_drain_seconds(settings),
        certificate=settings.tls_certificate,
    )
    try:
        service.write()  # before it answers: whatever happens to this command, `serve stop` ends the head
        with console.status(f"loading {settings.model}"), ray_head.connected(head.address, ours=True):
            _interrupt_on_sigterm()
            deploy(settings)
    except BaseException:
        service.end()
        raise
    return service


def _start_on_cluster(values: dict[str, Any], address: str, console: Console) -> Service:
    """On a cluster that runs already."""
    settings = read_settings(values)
    with console.status(f"loading {settings.model} on {address}"), ray_head.connected(address, ours=False):
        from calumma.serve.deploy.endpoint import deploy

        url = deploy(settings, wait=False)
    certificate = settings.tls_certificate
    service = Service(
        url=url,
        model=settings.model,
        name=settings.name,
        started=time.time(),
        address=address,
        drain_seconds=_drain_seconds(settings),
        certificate=certificate if certificate and Path(certificate).exists() else None,  # it may be on another machine
    )
    service.write()
    return service


def _drain_seconds(settings: ServeSettings) -> float:
    return max(model.drain_seconds for model in settings.models)


def _print_endpoints(service: Service) -> None:
    request = json.dumps({"model": service.name, **EXAMPLE})
    typer.echo(f"{service.name} is served at {service.url}")
    typer.echo(f"  playground  {service.url}/")
    typer.echo(f"  terminal    calumma chat --url {service.url}")
    typer.echo(
        f"  curl        curl {service.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'"
    )
    typer.echo("  end         calumma serve stop")


@contextlib.contextmanager
def _errors_as_messages(console: Console) -> Iterator[None]:
    """Errors of the person who typed the command: one message, exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        _exit_with_error(console, "stopped; nothing was left running")
    except (ValueError, RuntimeError, OSError) as error:  # of ours: Serve-, Cluster-, Tracking-, StorageError
        _exit_with_error(console, str(error))


def _exit_with_error(console: Console, message: str) -> NoReturn:
    from rich.markup import escape

    console.print(f"[red]{escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)
