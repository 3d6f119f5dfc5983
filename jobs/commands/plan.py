"""`calumma plan`: would a job run, and what would it take; an answer in a second, before anything starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calumma.jobs import entry
from calumma.platform.specification import JobSpecification, SpecificationError

if TYPE_CHECKING:
    from calumma.platform.training.forecast.forecast import Forecast, Training
    from calumma.platform.training.forecast.machines import Machines
    from calumma.platform.training.forecast.pace import Rates

CLUSTER_FILE = "ray_cluster.yaml"
EPILOG = (
    "Exit code 1: it does not fit, and what would is said. Examples: calumma plan stage1.yaml --nodes 16x8xH100; "
    "calumma plan stage1.yaml --cluster ray_cluster.yaml --set resources.workers=16"
)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A job's specification (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, as `job run` does.")
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(help="Machines: 8xH100 is one with 8 GPUs, 16x8xH100 sixteen of them, 2xp5.48xlarge two."),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help=f"Cluster file of `ray up`. Default without --nodes: {CLUSTER_FILE} of this folder, or as many "
            "machines with 8 H100 as are asked for."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Architecture of `initial`, by preset, where it is not found.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a micro-batch, where token shards are not found.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPUs' peak that arithmetic runs at.")
    ] = 0.4,
    storage_gbit: Annotated[float, typer.Option(min=0.001, help="Gbit/s of a machine to object storage.")] = 25.0,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour for a machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON, sizes in bytes.")] = False,
) -> None:
    """Say before anything starts whether a job fits: memory, network, time, checkpoints, cost."""
    from calumma.platform.training.forecast.pace import GBIT, Rates

    try:
        rates = Rates(utilization=utilization, storage=storage_gbit * GBIT)
        found = answers(config, tuple(overrides or ()), nodes, cluster, model, micro_batch, rates, price)
    except SpecificationError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(entry.FAILED) from error
    best = found[0]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(answer) | {"fits": answer.fits} for answer in found], indent=2))
    else:
        _show(config, found, rates)
    if not best.fits:
        raise typer.Exit(entry.FAILED)


def answers(
    config: Path,
    overrides: tuple[str, ...],
    nodes: str | None,
    cluster: Path | None,
    model: str | None,
    micro_batch: int | None,
    rates: Rates,
    price: float | None = None,
) -> list[Forecast]:
    """A forecast for each kind of machine that may be meant, the best first. Raises SpecificationError."""
    from calumma.jobs.specifications.architecture import read_any, settled_training
    from calumma.platform.training.forecast.forecast import forecast, forecast_job
    from calumma.platform.training.specification import TrainSpecification

    spec = read_any(config, overrides)
    training: Training | None = None
    if isinstance(spec, TrainSpecification):
        training = settled_training(spec, config, model, micro_batch)
    found = []
    for machines in _machines(spec, nodes, cluster):
        if price is not None:
            machines = dataclasses.replace(machines, machine=dataclasses.replace(machines.machine, price=price))
        found.append(forecast(training, machines, rates) if training else forecast_job(spec, machines))
    found.sort(key=lambda answer: (not answer.fits, answer.time.days if answer.time else 0.0))
    if training and spec.resources.gpus_per_worker and len(found) > 1 and spec.resources.accelerator is None:
        found[0].warnings.append(
            f"Ray gives workers any GPU of the cluster, others than those of {found[0].machine} too: name one kind in "
            "resources.accelerator"
        )
    return found


def _machines(spec: JobSpecification, nodes: str | None, cluster: Path | None) -> list[Machines]:
    """Kinds of machines that workers may be on: with GPUs where they ask for them."""
    from calumma.platform.training.forecast.machines import parse_nodes, read_cluster_file

    if nodes is not None and cluster is not None:
        raise SpecificationError("--nodes and --cluster both say what there is: give one of them")
    if nodes is None and cluster is None and Path(CLUSTER_FILE).is_file():
        cluster = Path(CLUSTER_FILE)
    if cluster is not None:
        kinds = read_cluster_file(cluster)
        suited = [kind for kind in kinds if kind.machine.gpus or not spec.resources.gpus_per_worker]
        if not suited:
            raise SpecificationError(f"--cluster: {cluster} has no machines with GPUs, which every worker asks for")
        if (wanted := spec.resources.accelerator) is not None:
            suited = [kind for kind in suited if kind.machine.gpu and kind.machine.gpu.startswith(wanted.split("-")[0])]
            if not suited:
                raise SpecificationError(f"resources.accelerator: {cluster} has no machines with {wanted}")
        return suited
    if nodes is None:
        usual = parse_nodes("8xH100")
        return [dataclasses.replace(usual, count=-(-spec.resources.max_workers // usual.machine.gpus))]
    return [parse_nodes(nodes)]


def _show(config: Path, found: list[Forecast], rates: Rates) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    best, console = found[0], Console(highlight=False)
    table = Table(
        "",
        title=f"{escape(str(config))}: {best.workers} workers on {best.machines} x {best.machine}",
        title_justify="left",
    )
    table.add_column("", justify="right")
    table.add_column("")
    for row in rows(best, rates):
        table.add_row(*row)
    console.print(table)
    for warning in best.warnings:
        console.print(f"[yellow]mind[/] {escape(warning)}", soft_wrap=True)
    for problem in best.problems:
        console.print(f"[red]does not fit[/] {escape(str(problem))}", soft_wrap=True)
    for other in found[1:]:
        said = "; ".join(map(str, other.problems)) or (f"{other.time.days:,.1f} days" if other.time else "fits")
        console.print(f"[dim]on {other.machines} x {other.machine} instead: {escape(said)}[/]", soft_wrap=True)
    if best.fits:
        console.print("[green]fits[/]")


def rows(answer: Forecast, rates: Rates) -> Iterator[tuple[str, str, str]]:
    """What, how much, and of what."""
    if answer.parameters is not None:
        trained = "" if answer.trained == answer.parameters else f"{answer.trained:,} trained"
        yield "parameters", f"{answer.parameters:,}", trained
        yield "passes a step", f"{answer.passes}", f"of at most {answer.rows_per_pass} sequences, each worker"
    if answer.memory is not None:
        of = f"of {_gb(answer.gpu_memory)}" if answer.gpu_memory else "of each worker's process"
        parts = dataclasses.asdict(answer.memory)
        yield "memory a GPU", _gb(answer.memory.total), of
        for name, size in parts.items():
            if size:
                yield f"  {name}", _gb(size), ""
        if answer.memory_of_fewest:
            yield "  with the fewest workers", _gb(answer.memory_of_fewest), of
    if answer.host_memory is not None:
        yield "memory a host", _gb(answer.host_memory), f"of {_gb(answer.host_has)}"
    if answer.host_disk is not None:
        of = f"of {_gb(answer.host_disk_has)}" if answer.host_disk_has is not None else "of a size that is not known"
        yield "own disk of a host", _gb(answer.host_disk), of
    if (time := answer.time) is not None:
        yield "network a step", _gb(time.network_bytes), f"sent by each GPU, {time.network_seconds:.2f} s"
        yield (
            "step",
            f"{time.step_seconds:.2f} s",
            f"at {rates.utilization:.0%} of the peak, {time.efficiency:.1%} even",
        )
        yield "tokens a second", f"{time.tokens_per_second:,.0f}", ""
        yield "checkpoint", _gb(time.checkpoint_bytes), f"{time.checkpoint_seconds:.0f} s to storage"
        lost = f"and {time.lost_seconds / 60:,.0f} minutes of steps to take again, on average"
        yield "restart", f"{time.restart_seconds:.0f} s", lost
        yield "in all", f"{time.days:,.1f} days", "" if time.dollars is None else f"${time.dollars:,.0f}"


def _gb(size: Any) -> str:
    return f"{size / 1e9:,.1f} GB"
