"""`calumma evaluate`: a model or an endpoint on a suite of benchmarks; two runs compared; the benchmarks' data."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

RUN = "run"


class SystemOrCommand(TyperGroup):
    """`calumma evaluate MODEL …` is `calumma evaluate run MODEL …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    help="Measure a model or an endpoint as the paper does: calumma evaluate MODEL|URL --suite paper.",
    cls=SystemOrCommand,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The benchmarks' data.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")


@app.callback()
def evaluate() -> None:
    """Measure a model or an endpoint as the paper does: calumma evaluate MODEL|URL --suite paper."""


@app.command(RUN)
def run(
    system: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|URL", help="A model directory, models:/NAME@ALIAS, or an endpoint's URL with its /v1."
        ),
    ],
    suite: Annotated[str, typer.Option(help="paper: its tables; safety: its safety test.")] = "paper",
    data: Annotated[
        str,
        typer.Option(help="Location with a folder for each benchmark; miniature: the dozen items of each that ship."),
    ] = "miniature",
    only: Annotated[list[str] | None, typer.Option(help="Only this task; repeats.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of a task, at most.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the page, figures and answers.")] = Path("evaluations/suite"),
    judge: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible model that judges pictures and safety.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Engines on a cluster in this process; 0: one here, without a cluster.")
    ] = 0,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out tasks without data, and what an endpoint cannot.")
    ] = False,
    name: Annotated[str, typer.Option(help="What pages call the system.")] = "",
    served_model: Annotated[str | None, typer.Option(help="Which of an endpoint's models; none: its first.")] = None,
    images: Annotated[
        str, typer.Option(help="How an endpoint draws: chat, images (/v1/images/generations), or none.")
    ] = "chat",
    api_key: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Discard the result that stands, and start over.")] = False,
) -> None:
    """Ask a system all tasks of a suite, and write one page. Done tasks are kept: the same command goes on."""

    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars, one a subject of MMLU, would break ours

    def body() -> None:
        from calumma.jobs.specifications.table import job_function
        from calumma.platform.cluster import runner
        from calumma.platform.cluster.progress import Display
        from calumma.platform.evaluation.suite.specification import SuiteSpecification
        from calumma.platform.evaluation.systems.specification import SystemSpecification
        from calumma.platform.specification import validate, with_absolute_storage

        endpoint = system.startswith(("http://", "https://"))
        place = system if endpoint or system.startswith("models:") or "://" in system else str(Path(system).absolute())
        asked = {"served_model": served_model, "images": images, "api_key": api_key}
        values: dict[str, Any] = {
            "storage": ".",
            "suite": suite,
            "system": {("url" if endpoint else "model"): place, "name": name, **asked},
            "data": data if data == "miniature" or "://" in data else str(Path(data).absolute()),
            "only": only or [],
            "limit": limit,
            "output": str(output.absolute()),
            "skip_missing": skip_missing,
            "resources": {"workers": workers if workers < 2 else {"min": 1, "max": workers}},
        }
        if judge is not None:
            url = SystemSpecification.of(judge).model_dump(exclude_unset=True)
            values["judges"] = {"judge": {"kind": "endpoint", "system": url}, "keywords": {"kind": "keywords"}}
        spec = with_absolute_storage(validate(SuiteSpecification, values, "calumma evaluate"))
        with Display() as display, display.step(suite) as progress:
            manifest, skipped = runner.run_on_own_cluster(spec, job_function("evaluate_suite"), progress, force)
        for line in table(spec.output_uri):
            typer.echo(line)
        for task, reason in manifest.report.get("left_out", {}).items():
            typer.echo(f"left out: {task}: {reason}")
        typer.echo(f"{'already done, kept' if skipped else 'done'}: {spec.output_uri}/report.html")

    _exit(body)


def table(output: str) -> list[str]:
    """A line for each task: its figure, interval and items."""
    from calumma.platform.evaluation.suite.report import figure, headlines, interval
    from calumma.platform.evaluation.suite.results import SuiteResults

    lines = []
    for task in SuiteResults.read(output).tasks:
        for metric in headlines(task)[:1]:
            value = figure(task, metric, task.metrics[metric])
            between = interval(task, metric)
            shown = f"({between})" if between else ""
            lines.append(f"  {task.name:16} {metric:20} {value:>8}  {shown:16} {len(task.ids):6,} items")
    return lines


@app.command("compare")
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Folder of another.")],
    html: Annotated[Path | None, typer.Option(help="Write a page to this file, too.")] = None,
) -> None:
    """Two runs side by side, with paired tests of the items that both were asked."""

    def body() -> None:
        from calumma.platform.evaluation.suite.comparison import compared, page
        from calumma.platform.evaluation.suite.results import SuiteResults

        results = SuiteResults.read(first), SuiteResults.read(second)
        for row in compared(*results):
            p = f"p = {row.p} ({row.test})" if row.p else ""
            parts = [
                f"{row.title:28}",
                f"{row.metric:20}",
                f"{row.first:>8} {row.second:>8}",
                f"{row.difference:>8}",
                row.interval,
                p,
                row.note,
            ]
            typer.echo("  ".join(part for part in parts if part.strip()))
        if html is not None:
            html.write_text(page(*results), encoding="utf-8")
            typer.echo(f"the page: {html}")

    _exit(body)


@data_app.command("fetch")
def fetch(
    folder: Annotated[str, typer.Argument(metavar="LOCATION", help="Where to; a folder for each benchmark.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this benchmark; repeats.")] = None,
    mirror: Annotated[
        str | None, typer.Option(help="A location with a folder for each benchmark; none: the publishers' on the hub.")
    ] = None,
    checksums: Annotated[
        str | None, typer.Option(help="A list of checksums to hold them against; none: the one beside the data.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Fetch nothing: are the files those of the list?")] = False,
) -> None:
    """Copy the benchmarks from their publishers' repositories, or a mirror; tell which files are others than before."""
    unwell = False

    def body() -> None:
        nonlocal unwell
        from calumma.platform.evaluation.data import fetching

        if check:
            wrong = fetching.check(folder, checksums)
            for line in wrong or ["every file is the one of the list"]:
                typer.echo(line)
            seen = fetching.verdicts(folder, checksums)
            for name in seen.files:
                typer.echo(f"{name}: {seen.told(name)}")
            unwell = bool(wrong)
            return
        done = fetching.Fetched()
        for name, done in fetching.fetch(folder, only or [], mirror, checksums):
            told = (
                f"{done.files[name]:,} files, {done.told(name)}"
                if name in done.files
                else f"missing: {done.missing[name]}"
            )
            typer.echo(f"{name}: {told}")
        for path in done.changed:
            typer.echo(f"another file than the list of checksums says: {path}")
        unwell = bool(done.changed or done.missing)

    _exit(body, lambda: int(unwell))


@data_app.command("miniatures")
def miniatures(folder: Annotated[str, typer.Argument(help="Where to.")]) -> None:
    """Write a dozen items of every benchmark, in its publisher's form and our own words."""

    def body() -> None:
        from calumma.platform.evaluation.miniatures.write import write_miniatures

        typer.echo(f"{', '.join(write_miniatures(folder))}: {folder}")

    _exit(body)


def _exit(body: Callable[[], None], otherwise: Callable[[], int] = lambda: 0) -> None:
    from calumma.jobs.entry import exit_code_of

    def complain(text: str) -> None:
        typer.echo(f"error: {text}", err=True)

    raise typer.Exit(exit_code_of(body, shlex.join(["calumma", *sys.argv[1:]]), complain) or otherwise())
