"""`calumma serve`: serve a model over HTTP from this machine, or on a Ray cluster that runs already."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from calumma.platform import cluster, service
from calumma.platform.cluster import ClusterError
from calumma.platform.progress import spoken
from calumma.platform.service import Service

if TYPE_CHECKING:
    from rich.console import Console

    from calumma.serve.settings import ServeSettings

app = typer.Typer(help="Serve a model over HTTP.", no_args_is_help=True, pretty_exceptions_enable=False)

EXAMPLE = {"messages": [{"role": "user", "content": "Draw a seven."}]}


@app.command()
def start(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model directory, s3://…, or models:/NAME@ALIAS.")],
    tracking_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow server of models:/…; default: ./mlflow.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; default: its registered one.")] = None,
    replicas: Annotated[str, typer.Option(help="Engine replicas: a number, or a range like 1..3.")] = "1",
    cpus: Annotated[float, typer.Option(help="CPUs of a replica.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs of a replica.")] = 0.0,
    max_sequences: Annotated[int, typer.Option(help="Sequences a replica decodes together.")] = 16,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster: auto or ray://HOST:10001. Default: one of its own.")
    ] = None,
) -> None:
    """Serve a model until `calumma serve stop`. Returns when it answers."""
    from rich.console import Console

    console = Console(stderr=True)
    with _explained(console):
        least, most = replica_range(replicas)
        values: dict[str, Any] = {
            "model": model,
            "tracking": {"uri": tracking_uri},
            "name": name or served_name(model),
            "host": host,
            "port": port,
            "min_replicas": least,
            "max_replicas": most,
            "cpus_per_replica": cpus,
            "gpus_per_replica": gpus,
            "max_sequences": max_sequences,
        }
        _none_running()
        begun = _start_elsewhere(values, address, console) if address else _start_here(values, console)
    _tell(begun)


@app.command()
def status() -> None:
    """Show what is being served. Exit code 1: nothing, or it does not answer."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    with _explained(console):
        service_ = Service.recorded()
    if service_ is None:
        typer.echo("nothing is being served; start with: calumma serve start MODEL")
        raise typer.Exit(1)
    state, facts = health(service_)
    table = Table(show_header=False, box=None)
    rows = {
        "state": state,
        "url": service_.url,
        "model": f"{service_.name} ({service_.model})",
        "cluster": f"{service_.address}" + (f", process {service_.pid}" if service_.pid else ""),
        "for": spoken(time.time() - service_.started),
        **{
            key.replace("_", " "): str(value)
            for key, value in facts.items()
            if key not in ("status", "model", "source")
        },
    }
    for key, value in rows.items():
        table.add_row(f"[dim]{key}", value)
    Console().print(table)
    if state != "answering":
        raise typer.Exit(1)


@app.command()
def stop() -> None:
    """Stop what `calumma serve start` started, and nothing else."""
    from rich.console import Console

    console = Console(stderr=True)
    with _explained(console):
        service_ = Service.recorded()
        if service_ is None:
            typer.echo("nothing is being served")
            return
        with console.status("stopping"):
            if service_.pid is None:
                from calumma.serve.app import undeploy

                with service.connected(service_.address, ours=False):
                    undeploy(service_.name)
            service_.end()
    typer.echo(f"stopped {service_.name} at {service_.url}")


def replica_range(text: str) -> tuple[int, int]:
    """ "2" -> (2, 2), "1..3" -> (1, 3). Raises ValueError."""
    first, dots, last = text.partition("..")
    try:
        least, most = int(first), int(last if dots else first)
    except ValueError:
        raise ValueError(f"--replicas {text!r}: give a number, or a range like 1..3") from None
    if not 1 <= least <= most:
        raise ValueError(f"--replicas {text!r}: at least 1, and not more at the left than at the right")
    return least, most


def served_name(model: str) -> str:
    """The registered name of models:/NAME@ALIAS; otherwise `calumma`."""
    if not model.startswith("models:/"):
        return "calumma"
    return model.removeprefix("models:/").partition("@")[0].partition("/")[0] or "calumma"


def health(service_: Service) -> tuple[str, dict[str, Any]]:
    """A word on a service's state, and what its /health tells."""
    import requests

    if not service_.alive:
        return "ended unexpectedly (`calumma serve stop` clears it away)", {}
    try:
        answer = requests.get(f"{service_.url}/health", timeout=30)
        facts = answer.json()
    except (requests.RequestException, json.JSONDecodeError) as error:
        return f"not answering: {error}", {}
    return ("answering", facts) if answer.ok else (f"unwell: {facts.get('reason', answer.status_code)}", {})


def _none_running() -> None:
    running = Service.recorded()
    if running is None:
        return
    if running.alive:
        raise ClusterError(f"{running.model} is being served at {running.url} already; first: calumma serve stop")
    running.end()


def _settings(values: dict[str, Any]) -> ServeSettings:
    from pydantic import ValidationError

    from calumma.serve.settings import ServeSettings

    try:
        return ServeSettings(**values)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given {e['input']!r})" for e in error.errors()]
        raise ValueError("\n".join(wrong)) from error


def _start_here(values: dict[str, Any], console: Console) -> Service:
    """On a Ray head of our own."""
    settings = _settings(values)
    with console.status("looking at the model"):
        from calumma.serve import app as serving

        serving.locate(settings.model, settings.tracking)
        serving.require_port(settings.host, settings.port)
    needed = settings.max_replicas * settings.cpus_per_replica + settings.ingress_cpus
    devices = cluster.gpus()
    if settings.min_replicas * settings.gpus_per_replica > devices:
        raise ClusterError(
            f"{settings.min_replicas} replicas with {settings.gpus_per_replica:g} GPUs each were asked for; "
            f"this machine has {devices} GPUs"
        )
    with console.status("starting Ray"):
        head = service.start_head(max(cluster.cores(), math.ceil(needed)), devices)
    begun = Service(
        url=settings.url,
        model=settings.model,
        name=settings.name,
        started=time.time(),
        address=head.address,
        pid=head.process.pid,
        born=head.process.create_time(),
        temporary=str(head.temporary),
    )
    try:
        begun.write()  # before it answers: whatever happens to this command, `serve stop` ends the head
        with console.status(f"loading {settings.model}"), service.connected(head.address, ours=True):
            serving.deploy(settings)
    except BaseException:
        begun.end()
        raise
    return begun


def _start_elsewhere(values: dict[str, Any], address: str, console: Console) -> Service:
    """On a cluster that runs already."""
    settings = _settings(values)
    with console.status(f"loading {settings.model} on {address}"), service.connected(address, ours=False):
        from calumma.serve import app as serving

        url = serving.deploy(settings, wait=False)
    begun = Service(url=url, model=settings.model, name=settings.name, started=time.time(), address=address)
    begun.write()
    return begun


def _tell(service_: Service) -> None:
    request = json.dumps({"model": service_.name, **EXAMPLE})
    typer.echo(f"{service_.name} is served at {service_.url}")
    typer.echo(f"  playground  {service_.url}/")
    typer.echo(f"  terminal    calumma chat --url {service_.url}")
    typer.echo(
        f"  curl        curl {service_.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'"
    )
    typer.echo("  end         calumma serve stop")


@contextlib.contextmanager
def _explained(console: Console) -> Iterator[None]:
    """Errors of the person who typed the command: one message, exit code 1."""
    try:
        yield
    except KeyboardInterrupt:
        _give_up(console, "stopped; nothing was left running")
    except (ValueError, RuntimeError, OSError) as error:  # of ours: Serve-, Cluster-, Tracking-, StorageError
        _give_up(console, str(error))


def _give_up(console: Console, message: str) -> NoReturn:
    from rich.markup import escape

    console.print(f"[red]{escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)
