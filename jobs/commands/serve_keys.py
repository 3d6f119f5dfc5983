"""`calumma serve keys`: the file of a server's API keys. A server that runs takes every change at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Add, revoke and list API keys in the file of `serve start --keys`; servers take changes at once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

KeysFile = Annotated[Path, typer.Argument(metavar="FILE", help="The file of `serve start --keys`.")]
Name = Annotated[str, typer.Argument(help="Whose key it is; shown in errors and logs.")]


@app.command()
def add(
    file: KeysFile,
    name: Name,
    running: Annotated[
        int | None, typer.Option(min=1, help="Answers that it may have at once. Default: the server's limit.")
    ] = None,
    priority: Annotated[
        int, typer.Option(min=-999, max=999, help="Whose answers go first: those of the lowest number.")
    ] = 0,
) -> None:
    """Make a key, show it once, and put its hash into the file, which is made where it is missing."""
    from calumma.serve.http.access.key_file import add_key

    with _errors_as_messages():
        typer.echo(add_key(file, name, running, priority))


@app.command()
def revoke(file: KeysFile, name: Name) -> None:
    """Take a key out of the file. What it has begun finishes; nothing else is answered."""
    from calumma.serve.http.access.key_file import revoke_key

    with _errors_as_messages():
        revoke_key(file, name)
    typer.echo(f"revoked {name}")


@app.command("list")
def list_keys(file: KeysFile) -> None:
    """Show names, the beginnings of hashes, and limits."""
    from rich.console import Console
    from rich.table import Table

    from calumma.serve.http.access.api_keys import parse_keys

    with _errors_as_messages():
        keys = parse_keys(file.read_text().splitlines(), str(file))
    table = Table("name", "hash", "at once", "priority", box=None)
    for key in keys:
        table.add_row(key.name, key.sha256[:12], str(key.running or ""), str(key.priority or ""))
    Console().print(table)


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None
