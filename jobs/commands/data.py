"""`calumma data look SOURCE`: what a location holds, its first documents, and the YAML that curates it. No cluster."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from calumma.model.document import Document, Image
    from calumma.platform.sources.files import BadInput
    from calumma.platform.sources.look.look import Look

app = typer.Typer(help="Raw data, before anything is made of it.", no_args_is_help=True, pretty_exceptions_enable=False)
TEMPLATE = "jobs/commands/look.html.j2"
ROWS = 10  # lines of the terminal that a picture may take
WORDS = 300  # characters of a document's text in the terminal
SHOWN = 12  # suffixes, fields, bad inputs


@app.callback()
def data() -> None:
    """Raw data, before anything is made of it."""


@app.command("look")
def look(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file, a folder, s3://, hf://, gs:// or az://.")],
    format: Annotated[str | None, typer.Option(help="Read it as this format; default: what it seems to be.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the reader, as NAME=VALUE (YAML); may be given again.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, max=100, help="How many documents are shown.")] = 4,
    html: Annotated[Path | None, typer.Option(help="Write a page with them to this file, too.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the job's YAML to this file, too.")] = None,
) -> None:
    """Show what a location seems to be, what it holds, its first documents, and a job that curates it."""
    from calumma.jobs.entry import exit_code_of

    readable = True

    def body() -> None:
        nonlocal readable
        from rich.console import Console

        from calumma.platform.sources.look.look import look as look_at

        seen = look_at(source, format, reader_options(option or []), documents)
        console = Console()
        for line in lines(seen, console):
            console.print(line, highlight=False, soft_wrap=True)
        if html is not None:
            _write(html, page(seen))
            console.print(f"\nthe page: {html}", highlight=False, soft_wrap=True)
        if save is not None and seen.guess is not None:
            _write(save, seen.curation())
            console.print(f"the job: calumma job run curate --config {save}", highlight=False, soft_wrap=True)
        readable = seen.guess is not None and bool(seen.documents)

    def complain(message: str) -> None:
        typer.echo(f"error: {message}", err=True)

    raise typer.Exit(exit_code_of(body, shlex.join(["calumma", *sys.argv[1:]]), complain) or int(not readable))


def _write(path: Path, content: str) -> None:
    from calumma.platform.specification import SpecificationError

    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise SpecificationError(f"{path} cannot be written: {error.strerror}") from error


def reader_options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE options of a reader. Raises SpecificationError."""
    import yaml

    from calumma.platform.specification import SpecificationError

    options = {}
    for one in given:
        name, separator, value = one.partition("=")
        if not separator:
            raise SpecificationError(f"--option {one}: write NAME=VALUE, say --option field=body")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecificationError(f"--option {one}: the value is not valid YAML") from error
    return options


def lines(seen: Look, console: Console) -> Iterator[Any]:
    """What the terminal shows, in order."""
    from rich.text import Text as Words

    yield Words(f"{seen.location}: {seen.files:,} file{'' if seen.files == 1 else 's'}, {_bytes(seen.bytes)}")
    yield Words(f"  {_counts(seen.suffixes)}")
    if seen.guess is None:
        yield Words(f"no format is known for it: {seen.why_not}")
        return
    yield Words.assemble("it seems to be ", (seen.guess.format, "bold"), f": {seen.guess.reason}")
    if seen.parts:
        yield Words(f"  in the first of it: {_counts(seen.parts)}")
    yield from (Words(f"  {line}") for line in seen.unread)
    for number, document in enumerate(seen.documents, start=1):
        yield Words(f"\n{number}. {_place(document, seen.location)}", style="bold")
        yield from _document(document, console)
    if seen.bad:
        yield Words(f"\n{len(seen.bad)} bad among the first {len(seen.bad) + seen.read}:", style="bold")
        yield from (Words(f"  {_told(bad, seen.location)}") for bad in seen.bad[:SHOWN])
    if seen.documents:
        yield Words("\na job that curates it (calumma job run curate --config FILE):\n", style="bold")
        yield Words(seen.curation().rstrip())
    else:
        yield Words("\nno document could be read of it")


def _document(document: Document, console: Console) -> Iterator[Any]:
    from rich.text import Text as Words

    from calumma.model.document import Text

    role = None
    for segment in document.segments[:SHOWN]:
        if segment.role != role:
            role = segment.role
            yield Words(f"  {role}:", style="italic")
        if isinstance(segment, Text):
            words = " ".join(segment.text.split())
            yield Words(f"  {words[:WORDS]}{'…' if len(words) > WORDS else ''}")
        else:
            yield from _picture(segment, console)
    if len(document.segments) > SHOWN:
        yield Words(f"  … and {len(document.segments) - SHOWN:,} segments more")


def _picture(image: Image, console: Console) -> Iterator[Any]:
    """An image as half blocks, two pixels a character, where the terminal has colours; always its size and caption."""
    from rich.style import Style
    from rich.text import Text as Words

    from calumma.model.document import UnreadableImage

    try:
        picture = image.open()
    except UnreadableImage as error:
        yield Words(f"  [{error}]")
        return
    size = f"{picture.width}x{picture.height}"
    if console.is_terminal and console.color_system and not console.no_color:
        picture.thumbnail((max(8, min(48, console.width - 4)), 2 * ROWS))
        pixels = picture.load()
        assert pixels is not None
        for y in range(0, picture.height, 2):
            row = Words("  ")
            for x in range(picture.width):
                below = pixels[x, y + 1] if y + 1 < picture.height else pixels[x, y]
                row.append("▀", Style(color=_colour(pixels[x, y]), bgcolor=_colour(below)))
            yield row
    yield Words(f"  [image {size}{': ' + ' '.join(image.caption.split())[:WORDS] if image.caption else ''}]")


def _colour(pixel: Any) -> str:
    red, green, blue = pixel[:3]
    return f"#{red:02x}{green:02x}{blue:02x}"


def page(seen: Look) -> str:
    """The same as a page."""
    from calumma.platform.curation.report.findings import excerpt
    from calumma.platform.reports.templates import render

    cards = [(_place(document, seen.location), excerpt(document)) for document in seen.documents]
    return render(
        TEMPLATE, look=seen, size=_bytes(seen.bytes), cards=cards,
        bad=[_told(bad, seen.location) for bad in seen.bad[:SHOWN]],
        curation=seen.curation() if seen.guess is not None and seen.documents else "",
    )  # fmt: skip


def _told(bad: BadInput, location: str) -> str:
    return f"{bad.name.removeprefix(location).lstrip('/')}: {bad.reason}"


def _place(document: Document, location: str) -> str:
    name = document.metadata.get("name", "")
    return name.removeprefix(location).lstrip("/:. ") or name


def _counts(counts: dict[str, int]) -> str:
    told = [f"{name} ({count:,})" for name, count in list(counts.items())[:SHOWN]]
    more = [f"and {len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
    return ", ".join([*told, *more])


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
