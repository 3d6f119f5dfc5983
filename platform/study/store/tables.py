"""The tables, and connections to them. Every change is one transaction that is on disk when it returns.

One database may hold many studies. Nothing is deleted but seats and people by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

METADATA = MetaData()
BUSY_SECONDS = 30.0  # that a writer waits for others
NAME, IDENTITY = String(200), String(64)

STUDIES = Table(
    "calumma_studies", METADATA,
    Column("name", NAME, primary_key=True),
    Column("fingerprint", IDENTITY, nullable=False),  # of the items; another study of this name is refused
)  # fmt: skip
PEOPLE = Table(
    "calumma_people", METADATA,
    Column("study", NAME, nullable=False),
    Column("name", NAME, nullable=False),
    Column("role", String(16), nullable=False),
    Column("token_sha256", IDENTITY, nullable=False, unique=True),
    PrimaryKeyConstraint("study", "name"),
)  # fmt: skip
# A seat is one of the judgements that an item is to get. Its state is free, held by somebody until a time, or rated.
SEATS = Table(
    "calumma_seats", METADATA,
    Column("study", NAME, nullable=False),
    Column("item", IDENTITY, nullable=False),
    Column("seat", Integer, nullable=False),
    Column("place", Integer, nullable=False),  # of the item in the order of the study
    Column("state", String(8), nullable=False),
    Column("annotator", NAME),
    Column("since", Float),
    Column("until", Float),
    PrimaryKeyConstraint("study", "item", "seat"),
    UniqueConstraint("study", "item", "annotator"),  # nobody sits twice at an item
    Index("calumma_seats_by_state", "study", "state", "until"),
)  # fmt: skip
RATINGS = Table(
    "calumma_ratings", METADATA,
    Column("study", NAME, nullable=False),
    Column("item", IDENTITY, nullable=False),
    Column("annotator", NAME, nullable=False),
    Column("seat", Integer, nullable=False),
    Column("systems", Text, nullable=False),  # JSON, in the order in which they were shown
    Column("judgement", Text, nullable=False),  # JSON
    Column("given_at", Float, nullable=False),
    Column("seconds", Float),
    PrimaryKeyConstraint("study", "item", "annotator"),
    UniqueConstraint("study", "item", "seat"),
    ForeignKeyConstraint(["study", "item", "seat"], [f"calumma_seats.{name}" for name in ("study", "item", "seat")]),
)  # fmt: skip
DIALOGUES = Table(
    "calumma_dialogues", METADATA,
    Column("id", IDENTITY, primary_key=True),
    Column("study", NAME, nullable=False),
    Column("annotator", NAME, nullable=False),
    Column("system", NAME, nullable=False),
    Column("state", String(8), nullable=False),  # open, or labelled
    Column("label", String(8)),
    Column("harm", NAME),
    Column("note", Text),
    Column("begun_at", Float, nullable=False),
    Column("ended_at", Float),
    Index("calumma_dialogues_by_annotator", "study", "annotator", "state"),
)  # fmt: skip
TURNS = Table(
    "calumma_turns", METADATA,
    Column("dialogue", IDENTITY, nullable=False),
    Column("number", Integer, nullable=False),
    Column("role", String(16), nullable=False),
    Column("parts", Text, nullable=False),  # JSON: OpenAI's content parts
    Column("said_at", Float, nullable=False),
    PrimaryKeyConstraint("dialogue", "number"),
    ForeignKeyConstraint(["dialogue"], ["calumma_dialogues.id"]),
)  # fmt: skip


class DatabaseUnusable(RuntimeError):
    """The database cannot be reached, or is none; the message says which and why."""


class Database:
    """url: SQLAlchemy's, say `sqlite:////data/ratings.db` or `postgresql://user@host/name`. Raises DatabaseUnusable."""

    def __init__(self, url: str) -> None:
        self.shown = _without_password(url)
        try:
            self._engine = _engine(url)
            METADATA.create_all(self._engine)
        except (ArgumentError, NoSuchModuleError) as error:
            raise DatabaseUnusable(
                f"{self.shown!r} is no database's URL; write sqlite:////absolute/file.db or postgresql://user@host/name"
            ) from error
        except (DBAPIError, ImportError) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            told = " ".join(str(reason).split())  # PostgreSQL's have several lines
            raise DatabaseUnusable(f"the database {self.shown} cannot be used: {told}") from error

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Raises DatabaseUnusable where the database is away."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except OperationalError as error:
            raise DatabaseUnusable(f"the database {self.shown} cannot be used: {error.orig}") from error

    def close(self) -> None:
        self._engine.dispose()


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url.partition("@")[0].rpartition(":")[0] + ":***@…" if "@" in url else url


def _engine(url: str) -> Engine:
    if url.startswith(("postgresql://", "postgres://")):  # the driver that calumma brings
        return create_engine("postgresql+psycopg://" + url.partition("://")[2], pool_pre_ping=True)
    if not url.startswith("sqlite:"):
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy says so, not at the first change
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what was committed outlives the machine, too
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # Writers come one after the other from the start: one that has read before could not go on else.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
