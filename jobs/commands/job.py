"""`calumma job`: run a job on an embedded cluster, or submit it to a running one and look after it (Ray's job API).

What travels with a submission is the specification, checked and with its overrides applied, as the only file of the
job's working directory; the code is what is installed on the cluster's nodes (infra/docker/Dockerfile).
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calumma.jobs import entry
from calumma.jobs.specifications.table import JOBS, job_function
from calumma.platform.cluster import runner
from calumma.platform.cluster.capacity import ClusterError
from calumma.platform.cluster.progress import Display, format_duration
from calumma.platform.specification import JobSpecification, SpecificationError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SPECIFICATION_FILE = "specification.yaml"
DASHBOARD = "http://127.0.0.1:8265"
# A fresh cluster's dashboard answers some time before the agent that starts jobs does. Seconds.
AGENT_WAIT, AGENT_PAUSE = 120.0, 5.0
NO_AGENT = "No available agent to submit job"  # ray/dashboard/modules/job/job_head.py


def purpose(job: str) -> str:
    """What a job does: the first line of its file, which is read and not run, for what it imports is heavy."""
    module_spec = importlib.util.find_spec(f"calumma.jobs.{job}")
    if module_spec is None or module_spec.origin is None:
        return ""
    first = (ast.get_docstring(ast.parse(Path(module_spec.origin).read_text())) or "").partition("\n")[0]
    return first.removeprefix(f"Job `{job}`: ")


NAMES = "\n\n".join(f"{name}: {purpose(name)}" for name in JOBS)

app = typer.Typer(help="Run, submit and look after jobs.", no_args_is_help=True, pretty_exceptions_enable=False)
Name = Annotated[str, typer.Argument(metavar="NAME", help=f"The job: {', '.join(JOBS)}.", show_default=False)]
Config = Annotated[Path, typer.Option("--config", help="The specification, a YAML file (see jobs/recipes).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override one field, say steps=100; repeats.")
]
Dashboard = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Address of the cluster's dashboard.")
]
Identifier = Annotated[str, typer.Argument(metavar="ID", help="What `job submit` and `job list` call it.")]


@app.command(epilog=NAMES)
def run(
    name: Name,
    config: Config,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="A running cluster: auto or ray://HOST:10001. Default: one in this process."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Discard the result that stands, and start over.")] = False,
    logs: Annotated[
        Path | None, typer.Option("--logs", help="Keep the logs of Ray's processes in this folder.")
    ] = None,
) -> None:
    """Run a job and wait for it. A result made by the same specification is kept, and an interrupted job resumed."""

    def body() -> None:
        spec = entry.job_specification(name, config, overrides or [])
        with Display() as display, display.step(name) as progress:
            manifest, skipped = runner.run_on_own_cluster(spec, job_function(name), progress, force, address, logs)
        typer.echo(f"{name}: {'already done, kept' if skipped else 'done'}: {spec.output_uri}")
        for key, value in manifest.report.items():
            if isinstance(value, str | int | float):
                typer.echo(f"  {key}: {value:g}" if isinstance(value, float) else f"  {key}: {value}")
        for line in skipped_inputs(manifest.report):
            typer.echo(f"  {line}")

    _run_and_exit(body)


@app.command(epilog=NAMES)
def submit(
    name: Name,
    config: Config,
    address: Dashboard = DASHBOARD,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's log until it ends.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Discard the result that stands, and start over.")] = False,
) -> None:
    """Hand a job to a running cluster and print its id."""

    def body() -> None:
        spec = entry.job_specification(name, config, overrides or [])
        require_shared_locations(spec)
        if spec.tracking.uri is None:
            typer.echo(UNTRACKED, err=True)
        with client(address) as jobs:
            identifier = submit_job(jobs, spec, force)
            typer.echo(identifier)
            if follow:
                _follow_log(jobs, identifier, address)
            else:
                typer.echo(f"follow it with: calumma job logs {identifier} --follow --address {address}", err=True)

    _run_and_exit(body)


@app.command("list")
def list_jobs(address: Dashboard = DASHBOARD) -> None:
    """The jobs that were submitted to a cluster, newest first."""

    def body() -> None:
        with client(address) as jobs:
            submitted = [job for job in jobs.list_jobs() if job.submission_id]
        for line in listing(submitted) if submitted else [f"no job was submitted to {address} yet"]:
            typer.echo(line)

    _run_and_exit(body)


@app.command()
def status(identifier: Identifier, address: Dashboard = DASHBOARD) -> None:
    """How one job is doing."""

    def body() -> None:
        with client(address) as jobs:
            job = jobs.get_job_info(identifier)
        typer.echo(f"{identifier}: {job.status.value}, started {_start_time(job)}, {_duration(job) or 'not ended'}")
        if job.message:
            typer.echo(job.message)

    _run_and_exit(body)


@app.command()
def logs(
    identifier: Identifier,
    address: Dashboard = DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends; fail when it fails.")] = False,
) -> None:
    """What one job has printed."""

    def body() -> None:
        with client(address) as jobs:
            if follow:
                _follow_log(jobs, identifier, address)
            else:
                typer.echo(jobs.get_job_logs(identifier), nl=False)

    _run_and_exit(body)


@app.command()
def stop(identifier: Identifier, address: Dashboard = DASHBOARD) -> None:
    """Stop one job. Submitted again, it goes on from its last checkpoint."""

    def body() -> None:
        with client(address) as jobs:
            stopped = jobs.stop_job(identifier)
        typer.echo(f"{identifier}: {'stopping' if stopped else 'had ended already'}")

    _run_and_exit(body)


@app.command()
def watch(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The id of a training's run in MLflow.", show_default=False)
    ],
    tracking: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow tracking URI; default: as for jobs.")
    ] = None,
) -> None:
    """Show how a training goes, wherever it runs: step, loss, tokens/s, time left, workers, last checkpoint."""
    from calumma.platform.training.group import console

    raise typer.Exit(console.watch(run, tracking))


class JobFailed(RuntimeError):
    """A submitted job that was followed did not succeed."""


UNTRACKED = (
    "warning: tracking.uri is not given. Unless MLFLOW_TRACKING_URI is set on the cluster's nodes, the run and its "
    "models are tracked in the job's temporary folder on one node, and lost with it. Give an MLflow server, say "
    "--set tracking.uri=http://HOST:5000"
)


def listing(jobs: list[Any]) -> list[str]:
    """A line a job under a line of names, newest first, in columns as wide as what stands in them: an id or a storage
    that a terminal's width has shortened is of no use."""
    rows = [("id", "job", "status", "started", "took", "storage")]
    for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True):
        told = job.metadata or {}
        names = (told.get("job", "(not of calumma)"), job.status.value)
        rows.append((job.submission_id, *names, _start_time(job), _duration(job), told.get("storage", "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def skipped_inputs(report: dict[str, Any]) -> list[str]:
    """Lines about the unreadable input that was skipped, a source each; none for jobs that read no raw input."""
    from calumma.platform.curation.source_job import describe_skipped

    descriptions = [describe_skipped(name, part) for name, part in report.get("sources", {}).items()]
    return [line for text in descriptions if text for line in text.splitlines()]


def require_shared_locations(spec: JobSpecification) -> None:
    """A folder relative to where the user stands means nothing on the nodes of a cluster."""
    if "://" not in spec.storage and not Path(spec.storage).is_absolute():
        raise SpecificationError(
            f"storage: {spec.storage!r} is relative to this folder, which the cluster's nodes do not see; give a URI "
            "such as s3://bucket/prefix, or an absolute path on storage that all nodes share"
        )
    place = (spec.tracking.uri or "/").removeprefix("file://").removeprefix("sqlite:///")
    if ":" not in place and not Path(place).is_absolute():
        raise SpecificationError(
            f"tracking.uri: {spec.tracking.uri!r} is relative to this folder, which the cluster's nodes do not see; "
            "give an MLflow server such as http://HOST:5000, or an absolute path on storage that all nodes share"
        )


def submit_job(jobs: JobSubmissionClient, spec: JobSpecification, force: bool = False) -> str:
    """Submit a specification; the submission's id. Raises ClusterError when no agent of the cluster takes it."""
    import yaml

    command = ["python", "-m", f"calumma.jobs.{spec.job}", "--config", SPECIFICATION_FILE, *(["--force"] * force)]
    with tempfile.TemporaryDirectory(prefix="calumma-submission-") as folder:
        content = spec.model_dump(mode="json", exclude_unset=True) | {"job": spec.job}
        (Path(folder) / SPECIFICATION_FILE).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        began, waiting = time.monotonic(), False
        while True:
            try:
                return jobs.submit_job(
                    entrypoint=shlex.join(command),
                    runtime_env={"working_dir": folder},
                    metadata={"job": spec.job, "storage": spec.storage},
                )
            except RuntimeError as error:
                if NO_AGENT not in str(error):
                    raise
                if time.monotonic() - began >= AGENT_WAIT:
                    raise ClusterError(
                        f"the cluster answers, and its job agent does not, for {AGENT_WAIT:.0f} s: submit again when "
                        "its head node is up and not overloaded; dashboard_agent.log in the head's Ray logs says more"
                    ) from error
            if not waiting:
                typer.echo("waiting for the cluster's job agent, which is not up yet …", err=True)
            waiting = True
            time.sleep(AGENT_PAUSE)


@contextlib.contextmanager
def client(address: str) -> Iterator[JobSubmissionClient]:
    """A client of a cluster's job API; its errors are in the user's terms. Raises ClusterError."""
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address == "auto" or ("://" in address and not address.startswith(("http://", "https://"))):
        raise ClusterError(f"jobs are submitted to a cluster's dashboard, say {DASHBOARD}, and not to {address}")
    try:
        yield JobSubmissionClient(address)
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterError(
            f"no cluster answers at {address}: check --address and that its dashboard is up; `ray start --head` starts "
            "a cluster on this machine, `ray dashboard ray_cluster.yaml` makes a remote one answer at " + DASHBOARD
        ) from error
    except AuthenticationError as error:
        raise ClusterError(
            f"the cluster at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what "
            "`ray get-auth-token` prints on its head"
        ) from error
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        raise ClusterError(f"the cluster at {address} knows no such job: see `calumma job list`") from error


def _follow_log(jobs: JobSubmissionClient, identifier: str, address: str) -> None:
    async def tail() -> None:
        async for lines in jobs.tail_job_logs(identifier):
            typer.echo(lines, nl=False)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        typer.echo(f"\nthe job goes on; stop it with: calumma job stop {identifier} --address {address}", err=True)
        return
    ended = jobs.get_job_info(identifier)
    if ended.status.value != "SUCCEEDED":
        raise JobFailed(f"{identifier}: {ended.status.value}: {ended.message or 'see its log'}")


def _start_time(job: Any) -> str:
    return f"{datetime.fromtimestamp(job.start_time / 1000):%Y-%m-%d %H:%M}" if job.start_time else "not yet"


def _duration(job: Any) -> str:
    return format_duration((job.end_time - job.start_time) / 1000) if job.start_time and job.end_time else ""


def _run_and_exit(body: Callable[[], None]) -> None:
    code = entry.exit_code_of(body, shlex.join(["calumma", *sys.argv[1:]]), _print_error)
    if code:
        raise typer.Exit(code)


def _print_error(text: str) -> None:
    typer.secho(text, err=True, fg=typer.colors.RED)
