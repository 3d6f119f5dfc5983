"""`calumma doctor`: what this machine has, what is missing, and what to do about it. It changes nothing."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from calumma.platform.cluster import capacity, connection

LEAST_PYTHON = (3, 11)
LITTLE_MEMORY = 8e9  # bytes, of the machine: Ray, two trainers and MLflow of the quickstart need about 6
LITTLE_DISK = 10e9  # bytes, free: the packages take 3, the quickstart's data and checkpoints less than 1
LITTLE_SHARED_MEMORY = 1e9  # bytes, of /dev/shm, where Ray keeps its objects
PINS = Path(__file__).parents[2] / "constraints.txt"


class State(Enum):
    FOUND = "[green]found"
    POOR = "[yellow]poor"  # everything works, but slower, or not as tested
    MISSING = "[red]missing"


@dataclass(frozen=True)
class Finding:
    """One row of the table. `advice` is what to do, empty when nothing needs doing."""

    subject: str
    state: State
    details: str
    advice: str = ""


def doctor(
    storage: Annotated[str, typer.Option(help="Object storage to try: s3://bucket/prefix or a folder.")] = ".",
    tracking_uri: Annotated[
        str | None,
        typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server to try; default: ./mlflow."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Cluster to try: auto, ray://HOST:10001 or http://HOST:8265. Default: none."),
    ] = None,
) -> None:
    """Check Python, machine, packages, storage, cluster and MLflow. Exit code 1: something needed is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title="calumma doctor", title_justify="left")
    table.add_column("what there is", overflow="fold")
    table.add_column("what to do", overflow="fold")
    missing = False
    for finding in examine(storage, tracking_uri, address):
        missing |= finding.state is State.MISSING
        table.add_row(finding.subject, finding.state.value, *map(_escaped, (finding.details, finding.advice)))
    Console().print(table)
    if missing:
        raise typer.Exit(1)


def examine(storage: str, tracking_uri: str | None, address: str | None) -> Iterator[Finding]:
    """All findings, each made when it is asked for."""
    yield python(sys.version_info[:2])
    yield from machine()
    yield compiler(shutil.which)
    yield from packages()
    yield checked("storage", lambda: object_storage(storage))
    yield checked("cluster", lambda: reachable_cluster(address))
    yield checked("MLflow", lambda: mlflow(tracking_uri))


def checked(subject: str, look: Callable[[], Finding]) -> Finding:
    """The finding of `look`; missing where a package that it needs is not installed."""
    try:
        return look()
    except ImportError as error:
        return Finding(subject, State.MISSING, f"not tried: {error}", "`make install`")


def python(version: tuple[int, int]) -> Finding:
    """The interpreter: `version` is (major, minor)."""
    details = f"{version[0]}.{version[1]} ({sys.executable})"
    if version < LEAST_PYTHON:
        return Finding("Python", State.MISSING, details, "install Python 3.11 or newer, then `make clean install`")
    return Finding("Python", State.FOUND, details)


def machine() -> Iterator[Finding]:
    """Cores, GPUs, memory and disk."""
    import psutil

    cores = capacity.cores()
    yield Finding("cores", State.FOUND, f"{cores}, used as {capacity.logical_cpus(cores)} logical CPUs by local jobs")
    yield gpus()
    memory = psutil.virtual_memory()
    yield quantity(
        "memory", memory.total, LITTLE_MEMORY, f", {memory.available / 1e9:.1f} GB free", "use a larger machine"
    )
    free = shutil.disk_usage(".").free
    yield quantity("disk", free, LITTLE_DISK, f" free below {Path.cwd()}", "free some space")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total
        advice = "start the container with --shm-size=4g or more: Ray falls back to the disk"
        yield quantity("shared memory", shared, LITTLE_SHARED_MEMORY, " in /dev/shm", advice)


def gpus() -> Finding:
    """CUDA devices that PyTorch sees."""
    try:
        import torch
    except ImportError:
        return Finding("GPUs", State.POOR, "unknown, PyTorch is missing", "`make install`")
    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if names:
        details = "; ".join(f"{device.name}, {device.total_memory / 1e9:.0f} GB" for device in names)
        least = min(device.total_memory for device in names)
        return Finding("GPUs", State.FOUND, f"{len(names)}: {details}. {servable(least, len(names))}")
    if Path("/dev/nvidia0").exists() and torch.version.cuda is None:
        advice = "`make clean install`: PyTorch was installed in its build for CPUs"
        return Finding("GPUs", State.POOR, "a device that PyTorch cannot use", advice)
    return Finding("GPUs", State.FOUND, "none: everything runs on the CPU, at the size of the quickstart")


def servable(total: int, count: int) -> str:
    """What the published models need to be served, by default, on GPUs of so many bytes each."""
    from calumma.model.config import ImageTokenizerConfig, preset
    from calumma.serve.replica.memory import DoesNotFit, plan
    from calumma.serve.settings import ModelSettings

    found = []
    for name in ("chameleon-7b", "chameleon-34b"):
        answer = "does not fit"
        for parts in (parts for parts in (1, 2, 4, 8) if parts <= count):
            settings = ModelSettings(model=name, gpus_per_replica=parts, tensor_parallel=parts)
            with contextlib.suppress(DoesNotFit):
                one = plan(settings, preset(name), ImageTokenizerConfig(), total)
                answer = f"in {one.dtype} on {parts}, with a cache of {one.positions} tokens"
                break
        found.append(f"{name} {answer}")
    return f"Serves {'; '.join(found)}"


def quantity(subject: str, value: float, little: float, details: str, advice: str) -> Finding:
    """A quantity in bytes, poor below `little`."""
    state = State.POOR if value < little else State.FOUND
    full_advice = advice + f" ({little / 1e9:.0f} GB recommended)" if state is State.POOR else ""
    return Finding(subject, state, f"{value / 1e9:.1f} GB{details}", full_advice)


def compiler(which: Callable[[str], str | None]) -> Finding:
    """A C++ compiler, which DeepSpeed needs for its fused GPU operations and PyTorch for `torch.compile`."""
    for name in ("c++", "g++", "clang++"):
        if path := which(name):
            return Finding("C++ compiler", State.FOUND, path)
    advice = "install g++ (`apt install g++`): fused optimizers and torch.compile need it; the quickstart does not"
    return Finding("C++ compiler", State.POOR, "none", advice)


def packages(pins: Path = PINS) -> Iterator[Finding]:
    """The packages calumma requires, and how far they are those it was tested with (in a source tree)."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    wrong: list[str] = []
    needed = [Requirement(text) for text in requires("calumma") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        found = installed(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name}{one.specifier} (found {found or 'nothing'})")
    if wrong:
        yield Finding("packages", State.MISSING, f"not satisfied: {', '.join(wrong)}", "`make install`")
    else:
        yield Finding("packages", State.FOUND, f"all {len(needed)} requirements")
    if pins.is_file():
        yield pinned(pins, installed)


def pinned(pins: Path, installed: Callable[[str], str | None]) -> Finding:
    """Installed versions against the tested ones. A local label (torch's +cpu) is no difference."""
    wanted = dict(line.split("==") for line in pins.read_text().split() if "==" in line and not line.startswith("#"))
    other = {name: found for name in wanted if (found := installed(name)) is None or _public(found) != wanted[name]}
    if not other:
        return Finding("tested versions", State.FOUND, f"all {len(wanted)}")
    first = [f"{name} {found or 'none'} (tested: {wanted[name]})" for name, found in list(other.items())[:5]]
    more = f" and {len(other) - 5} more" if len(other) > 5 else ""
    return Finding("tested versions", State.POOR, "others: " + ", ".join(first) + more, "`make install`")


def object_storage(uri: str) -> Finding:
    """Whether a file can be written, read and deleted there."""
    from calumma.platform import storage

    try:
        storage.check_writable(uri)
    except storage.StorageError as error:
        return Finding("storage", State.MISSING, str(error), "give --storage a place that can be written")
    return Finding("storage", State.FOUND, f"{uri}: written, read and deleted a file")


def reachable_cluster(address: str | None) -> Finding:
    """What the cluster at an address has; none is needed."""
    if address is None:
        return Finding("cluster", State.FOUND, "embedded: each command starts its own (try another with --address)")
    from calumma.jobs.commands.job import client

    try:
        if address.startswith("http"):
            with client(address):
                return Finding("cluster", State.FOUND, f"{address} takes jobs")
        with connection.connected(address):
            available = capacity.cluster_capacity()
            return Finding("cluster", State.FOUND, f"{address}: {available.cpus:g} CPUs, {available.gpus:g} GPUs")
    except capacity.ClusterError as error:
        return Finding("cluster", State.MISSING, *_finding_and_advice(str(error)))


def mlflow(uri: str | None) -> Finding:
    """The tracking server at a URI, or the place of the local database."""
    import requests

    from calumma.platform import storage

    if uri is not None and uri.startswith(("http://", "https://")):
        try:
            requests.get(uri.rstrip("/") + "/health", timeout=10).raise_for_status()
        except requests.RequestException as error:
            advice = "check --tracking-uri; `mlflow server` starts one, without the option a local database is used"
            return Finding("MLflow", State.MISSING, f"{uri} does not answer ({type(error).__name__})", advice)
        return Finding("MLflow", State.FOUND, f"{uri} answers")
    place = (uri or "mlflow").removeprefix("sqlite:///")
    if "://" in place:
        return Finding("MLflow", State.FOUND, f"{uri}: not tried, only servers and SQLite are")
    try:
        storage.check_writable(place)
    except storage.StorageError as error:
        return Finding("MLflow", State.MISSING, str(error), "give a place that can be written, or a server")
    return Finding("MLflow", State.FOUND, f"embedded: SQLite at {place}")


def _public(version: str) -> str:
    return version.partition("+")[0]


def _finding_and_advice(text: str) -> tuple[str, str]:
    """A message into what was found and what to do (after its first colon that ends a word)."""
    found, _, advice = text.partition(": ")
    return found, advice


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
