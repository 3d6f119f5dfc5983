"""The command `calumma`: puts the subcommands together. Modules of commands import what is heavy when they run."""

from __future__ import annotations

import typer

from calumma.jobs.commands import data, evaluate, exchange, exchange_adapters, job, serve, study
from calumma.jobs.commands.chat import chat
from calumma.jobs.commands.doctor import doctor
from calumma.jobs.commands.finetune import finetune
from calumma.jobs.commands.plan import EPILOG, plan
from calumma.jobs.commands.quickstart import quickstart

app = typer.Typer(
    name="calumma",
    help="Train, fine-tune and serve mixed-modal early-fusion models on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart)
app.command("plan", epilog=EPILOG)(plan)
app.command("finetune")(finetune)
app.add_typer(job.app, name="job")
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(serve.app, name="serve")
app.add_typer(study.app, name="study")
app.add_typer(exchange.import_app, name="import")
app.add_typer(exchange.extend_app, name="extend")
app.add_typer(exchange.export_app, name="export")
exchange.import_app.command("adapter")(exchange_adapters.import_adapter)
exchange.export_app.command("adapter")(exchange_adapters.export_adapter)
exchange.export_app.command("merged")(exchange_adapters.export_merged)
app.command("chat")(chat)
app.command("doctor")(doctor)


def version(show: bool) -> None:
    if show:
        from importlib.metadata import version as installed

        typer.echo(f"calumma {installed('calumma')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
) -> None:
    """Train, fine-tune and serve mixed-modal early-fusion models on Ray."""


def main() -> None:
    app()
