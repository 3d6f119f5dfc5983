"""`calumma quickstart`: from raw documents to interleaved answers over HTTP, on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from calumma.jobs.quickstart.course import Course
    from calumma.jobs.quickstart.steps import Options

PORT = 8000


def quickstart(
    workdir: Annotated[
        Path | None,
        typer.Option(
            help="Working folder: results, report, MLflow, logs. Default: quickstart, with --colour: colour; "
            "of --fast: the same and -fast."
        ),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Object storage: s3://bucket/prefix or a folder. Default: WORKDIR/storage.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="A few steps of everything: tries the machinery, teaches the model nothing.")
    ] = False,
    colour: Annotated[
        bool, typer.Option("--colour", help="Emoji of two open sets in place of digits; takes longer.")
    ] = False,
    large: Annotated[
        bool, typer.Option("--large", help="With --colour: all things at 256x256, for a GPU; hours.")
    ] = False,
    sets: Annotated[
        Path | None,
        typer.Option(help="With --colour: a folder of sets by calumma.jobs.emoji.rasterize; default: those that ship."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of all that is trained and drawn; the documents and their split stay.")
    ] = 0,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server, or the next free one.")] = PORT,
) -> None:
    """Make documents, train tokenizers and a small model, evaluate it, serve it, ask it. Resumes what was begun."""
    from rich.console import Console

    from calumma.jobs import entry
    from calumma.jobs.quickstart import report, steps

    console = Console(stderr=True)
    course = _course(colour)
    if ((large or sets) and not colour) or (large and fast):
        raise typer.BadParameter("--large and --sets are for --colour, and --large is not --fast")
    workdir = workdir or Path(
        f"{course.name}{'-fast' if fast else '-large' if large else ''}"
    )  # trying never replaces a real run
    options = steps.Options(
        workdir, storage, fast, port, course, large, str(sets.expanduser().absolute()) if sets else None, seed
    )

    def body() -> None:
        outcome = steps.quickstart(options, console)
        results = report.write(outcome)
        out = Console()
        out.print(report.table(results, course))
        for what, place in report.places(results, workdir):
            out.print(f"[dim]{what}:[/dim]")
            out.print(f"  {place}", soft_wrap=True, highlight=False, markup=False)
        for what, command in report.commands(outcome):
            out.print(f"[dim]{what}:[/dim]")
            out.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)

    def print_error(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    code = entry.exit_code_of(body, _resume_command(options), print_error)
    if code:
        raise typer.Exit(code)


def _course(colour: bool) -> Course:
    from calumma.jobs.quickstart.steps import DIGITS

    if not colour:
        return DIGITS
    from calumma.jobs.emoji.course import COLOUR

    return COLOUR


def _resume_command(options: Options) -> str:
    """The command that resumes this one."""
    words = ["calumma", "quickstart", "--workdir", str(options.workdir)]
    words += ["--storage", options.storage] if options.storage else []
    words += ["--colour"] if options.course.name != "quickstart" else []
    words += ["--fast"] if options.fast else []
    words += ["--large"] if options.large else []
    words += ["--sets", options.sets] if options.sets else []
    words += ["--seed", str(options.seed)] if options.seed else []
    words += ["--port", str(options.port)] if options.port != PORT else []
    return shlex.join(words)
