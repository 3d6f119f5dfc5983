"""Red-team dialogues: people talk with a model that they try to lead astray, and label what came of it.

A turn is kept before the model is asked, and an answer before it is shown: a dialogue goes on after a crash where it
was. Turns are numbered from 0, the user's even, the model's odd; a turn said twice is kept once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import and_, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from calumma.platform.study.judgement import LONGEST_NOTE, Label
from calumma.platform.study.store.tables import DIALOGUES, PEOPLE, TURNS, Database

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

Part = dict[str, Any]  # OpenAI's content part
OPEN, LABELLED = "open", "labelled"


class OutOfTurn(RuntimeError):
    """A turn or a label that does not fit the dialogue as it stands; the message says why."""


@dataclass(frozen=True)
class Said:
    role: str
    parts: list[Part]


@dataclass(frozen=True)
class Dialogue:
    id: str
    annotator: str
    system: str
    turns: list[Said] = field(default_factory=list)
    label: Label | None = None  # None: still open
    harm: str | None = None
    note: str = ""
    begun_at: float = 0.0

    @property
    def awaits_answer(self) -> bool:
        return len(self.turns) % 2 == 1


class Dialogues:
    """Those of one study. `systems`: that are talked with; whom a dialogue is with is drawn by hash, evenly."""

    def __init__(
        self, database: Database, study: str, systems: Sequence[str], clock: Callable[[], float] = time.time
    ) -> None:
        self._database, self._study, self._systems, self._clock = database, study, sorted(systems), clock

    def current(self, annotator: str) -> Dialogue:
        """The annotator's open dialogue, or a new one."""
        with self._database.transaction() as db:
            db.execute(  # two requests at once begin one dialogue
                select(PEOPLE.c.name).where(PEOPLE.c.study == self._study, PEOPLE.c.name == annotator).with_for_update()
            )
            mine = and_(DIALOGUES.c.study == self._study, DIALOGUES.c.annotator == annotator)
            found = db.execute(select(DIALOGUES.c.id).where(mine, DIALOGUES.c.state == OPEN)).scalar()
            if found is None:
                number = db.execute(select(func.count()).where(mine)).scalar_one()
                found = _hash(self._study, annotator, str(number))
                turn = int(_hash(self._study, annotator)[:8], 16) + number  # each system in turn
                db.execute(
                    insert(DIALOGUES).values(
                        id=found, study=self._study, annotator=annotator, state=OPEN, begun_at=self._clock(),
                        system=self._systems[turn % len(self._systems)],
                    )
                )  # fmt: skip
            return self._read(db, DIALOGUES.c.id == found)[0]

    def say(self, annotator: str, dialogue: str, number: int, role: str, parts: list[Part]) -> Dialogue:
        """Keep turn `number`. Raises OutOfTurn; the same turn again changes nothing."""
        try:
            with self._database.transaction() as db:
                found = self._open(db, annotator, dialogue)
                if number < len(found.turns) and found.turns[number].parts == parts:
                    return found
                if number != len(found.turns) or role != ("user", "assistant")[number % 2]:
                    raise OutOfTurn("the dialogue has gone on meanwhile")
                values = {"dialogue": dialogue, "number": number, "role": role, "parts": json.dumps(parts)}
                db.execute(insert(TURNS).values(**values, said_at=self._clock()))
                return self._read(db, DIALOGUES.c.id == dialogue)[0]
        except IntegrityError as error:
            raise OutOfTurn("the dialogue has gone on meanwhile") from error

    def label(self, annotator: str, dialogue: str, label: Label, harm: str | None, note: str) -> None:
        """End a dialogue. Raises OutOfTurn where there is nothing to label; the same label again changes nothing."""
        with self._database.transaction() as db:
            found = self._find(db, annotator, dialogue)
            if found.label == label:
                return
            if found.label is not None:
                raise OutOfTurn("the dialogue has its label already")
            if not any(said.role == "assistant" for said in found.turns) or found.awaits_answer:
                raise OutOfTurn("the model has not answered yet; there is nothing to label")
            values = {"label": label, "harm": harm, "note": note[:LONGEST_NOTE], "ended_at": self._clock()}
            db.execute(update(DIALOGUES).where(DIALOGUES.c.id == dialogue).values(state=LABELLED, **values))

    def find(self, annotator: str, dialogue: str) -> Dialogue:
        """Raises OutOfTurn unless it is the annotator's."""
        with self._database.transaction() as db:
            return self._find(db, annotator, dialogue)

    def all(self) -> list[Dialogue]:
        with self._database.transaction() as db:
            return self._read(db, DIALOGUES.c.study == self._study)

    def counts(self) -> dict[str, tuple[int, int]]:
        """By annotator: dialogues with a label, and open ones."""
        with self._database.transaction() as db:
            rows = db.execute(
                select(DIALOGUES.c.annotator, DIALOGUES.c.state, func.count())
                .where(DIALOGUES.c.study == self._study)
                .group_by(DIALOGUES.c.annotator, DIALOGUES.c.state)
            ).all()
        counted: dict[str, tuple[int, int]] = {}
        for annotator, state, number in rows:
            done, under_way = counted.get(annotator, (0, 0))
            counted[annotator] = (done + number, under_way) if state == LABELLED else (done, under_way + number)
        return counted

    def _open(self, db: Connection, annotator: str, dialogue: str) -> Dialogue:
        found = self._find(db, annotator, dialogue)
        if found.label is not None:
            raise OutOfTurn("the dialogue has its label already")
        return found

    def _find(self, db: Connection, annotator: str, dialogue: str) -> Dialogue:
        db.execute(select(DIALOGUES.c.id).where(DIALOGUES.c.id == dialogue).with_for_update())
        found = self._read(
            db,
            and_(DIALOGUES.c.study == self._study, DIALOGUES.c.id == dialogue, DIALOGUES.c.annotator == annotator),
        )
        if not found:
            raise OutOfTurn("there is no such dialogue of yours")
        return found[0]

    def _read(self, db: Connection, which: ColumnElement[bool]) -> list[Dialogue]:
        rows = db.execute(select(DIALOGUES).where(which).order_by(DIALOGUES.c.begun_at, DIALOGUES.c.id)).all()
        turns: dict[str, list[Said]] = {row.id: [] for row in rows}
        said = (
            select(TURNS)
            .join(DIALOGUES, DIALOGUES.c.id == TURNS.c.dialogue)
            .where(which)
            .order_by(TURNS.c.dialogue, TURNS.c.number)
        )
        for turn in db.execute(said).all():
            turns[turn.dialogue].append(Said(turn.role, json.loads(turn.parts)))
        return [
            Dialogue(
                row.id, row.annotator, row.system, turns[row.id], cast("Label | None", row.label), row.harm,
                row.note or "", row.begun_at,
            )
            for row in rows
        ]  # fmt: skip


def _hash(*words: str) -> str:
    return hashlib.blake2b("\0".join(words).encode(), digest_size=12, person=b"calumma talks").hexdigest()
