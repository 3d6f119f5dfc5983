"""`calumma study`: people compare the answers of systems, or talk with one to lead it astray."""

from __future__ import annotations

import contextlib
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

if TYPE_CHECKING:
    from calumma.platform.study.folder import Study
    from calumma.platform.study.store.tables import Database
    from calumma.serve.study.talks import Ask

app = typer.Typer(
    help="People judge the answers of systems: create a study, invite annotators, serve its page, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Format = Literal["jsonl", "label-studio", "argilla", "preferences"]
FORMATS: tuple[Format, ...] = get_args(Format)
BROUGHT = FORMATS[:3]
Folder = Annotated[str, typer.Argument(metavar="STUDY", help="The study's folder, the specification's `output`.")]
DatabaseURL = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="CALUMMA_STUDY_DATABASE",
        help="Where judgements are: postgresql://USER@HOST/NAME or sqlite:////PATH. Default: ratings.db in STUDY.",
    ),
]
ASTRAY = 30.0  # seconds that a red-team dialogue waits for an endpoint that is away


@app.command()
def create(
    specification: Annotated[Path, typer.Argument(metavar="SPECIFICATION", help="The study, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override one field, say annotators=5; repeats."),
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Go on without prompts that a system does not answer.")
    ] = False,
) -> None:
    """Have all systems answer all prompts. What is there is kept: again, it asks for what is missing alone."""

    def body() -> None:
        from calumma.jobs.specifications.reading import read_specification
        from calumma.platform.cluster.connection import embedded
        from calumma.platform.cluster.progress import Display
        from calumma.platform.study.create import create as make
        from calumma.platform.study.folder import Study
        from calumma.platform.study.specification import StudySpecification

        spec = read_specification(StudySpecification, specification, overrides or [])
        on_cluster = any(system.model for system in spec.systems) and spec.resources.max_workers > 0
        with (
            embedded() if on_cluster else contextlib.nullcontext(),
            Display() as display,
            display.step("answers") as bar,
        ):
            created = make(spec, bar, leave_out)
        study = Study(spec.output)
        typer.echo(
            f"{spec.output}: {created.prompts} prompts, {len(spec.systems)} systems, {created.asked} answers asked "
            f"for, {created.kept} kept; {len(study.items)} items of {spec.annotators} judgements each"
        )
        for name, failed in created.failed.items():
            typer.echo(f"  {name}: {len(failed)} prompts without an answer are left out")
        typer.echo(f"next: calumma study invite {shlex.quote(spec.output)} NAME …")

    _run(body)


@app.command()
def invite(
    folder: Folder,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Whom to invite.")] = None,
    owner: Annotated[bool, typer.Option("--owner", help="To watch the progress, not to judge.")] = False,
    url: Annotated[str, typer.Option(help="Where people reach the page.")] = "http://127.0.0.1:8010",
    revoke: Annotated[bool, typer.Option("--revoke", help="End these people's access; their judgements stay.")] = False,
    database: DatabaseURL = None,
) -> None:
    """Make personal links, and show them once. Who is invited again gets a new link, and the old one ends.

    Without a name it lists who is invited.
    """

    def body() -> None:
        with _opened(folder, database) as (study, db):
            ratings = study.ratings(db)
            for name in dict.fromkeys(names or []):
                _require_name(name)
                if revoke:
                    typer.echo(f"{name}: {'ended' if ratings.revoke(name) else 'was not invited'}")
                else:
                    token = ratings.invite(name, "owner" if owner else "annotator")
                    typer.echo(f"{name}: {url.rstrip('/')}/#{token}")
            if not names:
                for person in ratings.people():
                    typer.echo(f"{person.name} ({person.role})")
                if not ratings.people():
                    typer.echo("nobody is invited yet")

    _run(body)


@app.command()
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8010,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name by which people call it, say study.example.org; repeats.")
    ] = None,
    tls_certificate: Annotated[str | None, typer.Option(help="PEM file; with --tls-key.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file with the certificate's key.")] = None,
    red_team: Annotated[
        bool, typer.Option("--red-team", help="People talk with the systems and label the dialogues.")
    ] = False,
    database: DatabaseURL = None,
) -> None:
    """Serve the study's page until Ctrl-C. Whatever it has taken is in the database; start it again at any time."""

    def body() -> None:
        from calumma.serve.http.access.hosts import HostSettings
        from calumma.serve.http.access.tls import require_certificate
        from calumma.serve.study.server import pages_of, run

        if (tls_certificate is None) != (tls_key is None):
            raise _wrong("TLS needs both --tls-certificate and --tls-key")
        if tls_certificate and tls_key:
            try:
                require_certificate(tls_certificate, tls_key)
            except (OSError, ValueError) as error:
                raise _wrong(str(error)) from error
        hosts = HostSettings(host, tuple(allowed_host or ()))
        with _opened(folder, database) as (study, db), _asking(study, red_team) as ask:
            pages = pages_of(study, db, hosts, ask)
            _require_free(host, port)
            scheme = "https" if tls_certificate else "http"
            typer.echo(f"{study.specification.name}: {scheme}://{host}:{port}; judgements go to {db.shown}", err=True)
            if not pages.ratings.people():
                typer.echo(f"nobody is invited yet: calumma study invite {shlex.quote(folder)} NAME …", err=True)
            run(pages, host, port, tls_certificate, tls_key)

    _run(body)


@app.command()
def report(
    folder: Folder,
    output: Annotated[
        str | None, typer.Option(help="Folder of report.html and report.json. Default: STUDY/report.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave out an annotator's judgements; repeats.")
    ] = None,
    database: DatabaseURL = None,
) -> None:
    """What the judgements amount to, as a page and as JSON: votes, agreement, strengths, who seems to have guessed."""

    def body() -> None:
        from calumma.platform.study.report.publish import publish, summary

        with _opened(folder, database) as (study, db):
            found, place = publish(study, db, output, without or [])
        for line in summary(found):
            typer.echo(line)
        typer.echo(f"the report: {place}/report.html")

    _run(body)


@app.command()
def export(
    folder: Folder,
    output: Annotated[str, typer.Argument(metavar="FILE", help="The file to write, or s3://….")],
    format: Annotated[
        Format, typer.Option(metavar="FORMAT", help="jsonl, label-studio, argilla, or preferences: pairs for DPO.")
    ] = "jsonl",
    database: DatabaseURL = None,
) -> None:
    """Write items and judgements for another tool, or preferences as pairs that `finetune` trains on."""

    def body() -> None:
        from calumma.platform.study.exchange.table import write

        with _opened(folder, database) as (study, db):
            typer.echo(f"{output}: {write(format, study, study.ratings(db).all(), output)}")

    _run(body)


@app.command("import")
def bring(
    folder: Folder,
    file: Annotated[str, typer.Argument(metavar="FILE", help="What another tool has exported.")],
    format: Annotated[Format, typer.Option(metavar="FORMAT", help="jsonl, label-studio or argilla.")] = "jsonl",
    database: DatabaseURL = None,
) -> None:
    """Take judgements that were made elsewhere; those that are there already change nothing."""

    def body() -> None:
        from calumma.platform.study.exchange.table import read

        if format not in BROUGHT:
            raise _wrong(f"judgements are read from {', '.join(BROUGHT)}")
        with _opened(folder, database) as (study, db):
            new, known = study.ratings(db).bring(read(format, study, file))
        typer.echo(f"{new} judgements are new, {known} were there already")

    _run(body)


@contextlib.contextmanager
def _opened(folder: str, url: str | None) -> Iterator[tuple[Study, Database]]:
    from calumma.platform.study.folder import Study
    from calumma.platform.study.store.tables import Database

    study = Study(folder)
    database = Database(url or study.default_database)
    try:
        yield study, database
    finally:
        database.close()


@contextlib.contextmanager
def _asking(study: Study, red_team: bool) -> Iterator[Ask | None]:
    """How the systems are asked in red-team dialogues; none without."""
    if not red_team:
        yield None
        return
    from calumma.model.document import Document
    from calumma.platform.cluster.connection import embedded
    from calumma.platform.evaluation.systems.opening import open_system
    from calumma.platform.evaluation.systems.prompts import Prompt, UnusableSystem
    from calumma.platform.study.create import sampling
    from calumma.serve.study.talks import SystemAway

    spec = study.specification
    with contextlib.ExitStack() as stack:
        if any(system.model for system in spec.systems) and spec.resources.max_workers > 0:
            stack.enter_context(embedded())
        patient = [s.model_copy(update={"patience": min(s.patience, ASTRAY)}) for s in spec.systems]
        systems = {s.title: stack.enter_context(open_system(s, spec.resources, spec.tracking)) for s in patient}
        # An endpoint answers many at once; our engines take one list of prompts after the other.
        turn = {s.title: contextlib.nullcontext() if s.url else threading.Lock() for s in patient}

        def ask(name: str, conversation: Document) -> Document:
            seed = str(len(conversation.segments))
            try:
                with turn[name]:
                    (answer,) = systems[name].answer([Prompt(conversation, sampling(spec, seed))])
            except UnusableSystem as error:
                raise SystemAway(str(error)) from error
            if answer.error:
                raise SystemAway(answer.error)
            return answer.document

        yield ask


def _require_name(name: str) -> None:
    if not name.strip() or len(name) > 100 or not name.isprintable():
        raise _wrong(f"{name!r} is no name for a person: up to 100 characters that can be shown")


def _require_free(host: str, port: int) -> None:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _wrong(f"{host}:{port} cannot be listened at: {error.strerror}; give another --port") from error


def _wrong(message: str) -> Exception:
    from calumma.platform.specification import SpecificationError

    return SpecificationError(message)


def _run(body: Callable[[], None]) -> None:
    from calumma.jobs.entry import exit_code_of

    def complain(message: str) -> None:
        typer.echo(f"error: {message}", err=True)

    raise typer.Exit(exit_code_of(body, shlex.join(["calumma", *sys.argv[1:]]), complain))
