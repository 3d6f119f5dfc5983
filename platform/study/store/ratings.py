"""Who judges what, and what was judged.

Invariants, whatever happens at once and whoever dies: an item has at most its number of ratings; nobody rates an item
twice; a seat is held by one person at most, and a rating is taken from whoever holds its seat alone; who asks for
an item again before having judged the last gets that one; a seat whose time is up goes to whoever asks next, but stays
with its holder while nobody does.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from calumma.platform.study.items import Item
from calumma.platform.study.judgement import Judgement, Rating
from calumma.platform.study.store.tables import PEOPLE, RATINGS, SEATS, STUDIES, Database

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

Role = Literal["annotator", "owner"]
ROLES: tuple[Role, ...] = get_args(Role)
FREE, HELD, RATED = "free", "held", "rated"


class StudyError(ValueError):
    """A study that is not what the database knows under its name, or a person of that name already there."""


class NotYours(RuntimeError):
    """A rating for a seat that is not held by whoever gives it; the message says why."""


@dataclass(frozen=True)
class Person:
    name: str
    role: Role


@dataclass(frozen=True)
class Assignment:
    item: str
    seat: int
    until: float  # seconds since 1970


@dataclass(frozen=True)
class Work:
    """How far an annotator is. `last`: when they rated last, in seconds since 1970."""

    name: str
    rated: int
    holds: bool
    last: float | None
    seconds: float | None  # of a judgement, in the middle


@dataclass(frozen=True)
class StudyProgress:
    items: int
    seats: int
    rated: int
    complete: int  # items with all their ratings
    held: int
    work: list[Work]


class Ratings:
    """The judgements of one study. `seats`: how many an item is to get. `hold_seconds`: for which an item is given out.

    Raises StudyError where the database has another study of this name, DatabaseUnusable."""

    def __init__(
        self,
        database: Database,
        study: str,
        items: Sequence[Item],
        seats: int,
        hold_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._study, self._hold, self._clock = database, study, hold_seconds, clock
        self._items = {item.id: item for item in items}
        self._open(list(items), seats)

    def _open(self, items: list[Item], seats: int) -> None:
        said = json.dumps([[item.id, item.systems, item.left_first] for item in items] + [seats])
        fingerprint = hashlib.sha256(said.encode()).hexdigest()
        for _ in range(2):  # another process may be just as far
            try:
                with self._database.transaction() as db:
                    known = db.execute(select(STUDIES.c.fingerprint).where(STUDIES.c.name == self._study)).scalar()
                    if known is None:
                        db.execute(insert(STUDIES).values(name=self._study, fingerprint=fingerprint))
                        rows = [
                            {"study": self._study, "item": item.id, "seat": seat, "place": place, "state": FREE}
                            for place, item in enumerate(items)
                            for seat in range(seats)
                        ]
                        if rows:
                            db.execute(insert(SEATS), rows)
                    elif known != fingerprint:
                        raise StudyError(
                            f"{self._database.shown} holds a study {self._study!r} with other prompts, systems, seed "
                            "or number of annotators; give this one another name, or another database"
                        )
                return
            except IntegrityError:
                continue

    # -- people --------------------------------------------------------------------------------------------------------

    def invite(self, name: str, role: Role = "annotator") -> str:
        """A new token for a person, which is kept nowhere: only its hash is. An earlier one of theirs is void."""
        token = secrets.token_urlsafe(24)
        person = and_(PEOPLE.c.study == self._study, PEOPLE.c.name == name)
        with self._database.transaction() as db:
            had = db.execute(select(PEOPLE.c.role).where(person)).scalar()
            if had is not None and had != role:
                raise StudyError(f"{name!r} is there already, as {had}; take another name")
            db.execute(delete(PEOPLE).where(person))
            values = {"study": self._study, "name": name, "role": role, "token_sha256": _hash(token)}
            db.execute(insert(PEOPLE).values(**values))
        return token

    def revoke(self, name: str) -> bool:
        """End a person's access; what they hold is free at once, and what they rated stays. Whether there was one."""
        with self._database.transaction() as db:
            gone = db.execute(delete(PEOPLE).where(PEOPLE.c.study == self._study, PEOPLE.c.name == name)).rowcount
            db.execute(
                update(SEATS).where(self._seats, SEATS.c.annotator == name, SEATS.c.state == HELD).values(**_FREED)
            )
        return bool(gone)

    def person(self, token: str) -> Person | None:
        """Whose token it is. Looking a hash up takes a time that tells nothing about a token."""
        with self._database.transaction() as db:
            row = db.execute(
                select(PEOPLE.c.name, PEOPLE.c.role).where(
                    PEOPLE.c.study == self._study, PEOPLE.c.token_sha256 == _hash(token)
                )
            ).one_or_none()
        return None if row is None else Person(row.name, row.role)

    def people(self) -> list[Person]:
        with self._database.transaction() as db:
            rows = db.execute(
                select(PEOPLE.c.name, PEOPLE.c.role).where(PEOPLE.c.study == self._study).order_by(PEOPLE.c.name)
            ).all()
        return [Person(row.name, row.role) for row in rows]

    # -- judging -------------------------------------------------------------------------------------------------------

    def next(self, annotator: str) -> Assignment | None:
        """What the annotator is to judge now; None when there is nothing left for them, at the moment or at all.

        Items that others have begun come first, so that whole items are done early."""
        now = self._clock()
        with self._database.transaction() as db:
            self._lock(db, annotator)
            mine = db.execute(
                select(SEATS.c.item, SEATS.c.seat).where(
                    self._seats, SEATS.c.annotator == annotator, SEATS.c.state == HELD
                )
            ).first()
            if mine is not None:
                changed = db.execute(
                    update(SEATS)
                    .where(self._seat(mine.item, mine.seat), SEATS.c.annotator == annotator, SEATS.c.state == HELD)
                    .values(until=now + self._hold)
                )
                if changed.rowcount:
                    return Assignment(mine.item, mine.seat, now + self._hold)
            while (seat := self._free_seat(db, annotator, now)) is not None:
                taken = db.execute(
                    update(SEATS)
                    .where(self._seat(seat.item, seat.seat), _may_be_taken(now))
                    .values(state=HELD, annotator=annotator, since=now, until=now + self._hold)
                )
                if taken.rowcount:
                    return Assignment(seat.item, seat.seat, now + self._hold)
        return None

    def _free_seat(self, db: Connection, annotator: str, now: float) -> Any:
        other = SEATS.alias("other")
        begun = (
            select(func.count())
            .where(other.c.study == self._study, other.c.item == SEATS.c.item, other.c.state != FREE)
            .scalar_subquery()
        )
        own = select(other.c.item).where(other.c.study == self._study, other.c.annotator == annotator)
        return db.execute(
            select(SEATS.c.item, SEATS.c.seat)
            .where(self._seats, _may_be_taken(now), SEATS.c.item.not_in(own))
            .order_by(begun.desc(), SEATS.c.place, SEATS.c.state, SEATS.c.seat)
            .limit(1)
            .with_for_update(skip_locked=True)  # in PostgreSQL; SQLite's writers come one after the other
        ).first()

    def rate(self, annotator: str, item: str, judgement: Judgement) -> bool:
        """Keep a judgement; True when it is kept, False when the very same was already. When this returns it outlives
        a crash. Raises NotYours."""
        now = self._clock()
        with self._database.transaction() as db:
            self._lock(db, annotator)
            said = db.execute(
                select(RATINGS.c.judgement).where(
                    RATINGS.c.study == self._study, RATINGS.c.item == item, RATINGS.c.annotator == annotator
                )
            ).scalar()
            if said is not None:
                if Judgement.model_validate_json(said) == judgement:
                    return False
                raise NotYours("you have judged this one already; the first judgement counts")
            held = db.execute(
                select(SEATS.c.seat, SEATS.c.since)
                .where(self._seats, SEATS.c.item == item, SEATS.c.annotator == annotator, SEATS.c.state == HELD)
                .with_for_update()
            ).one_or_none()
            if held is None:
                raise NotYours("this one went to somebody else, as its time was up; here is another")
            db.execute(
                update(SEATS).where(self._seat(item, held.seat), SEATS.c.annotator == annotator).values(state=RATED)
            )
            values = self._values(
                Rating(item, annotator, self._items[item].shown(held.seat), judgement, now, now - held.since), held.seat
            )
            db.execute(insert(RATINGS).values(**values))
        return True

    def bring(self, ratings: Iterable[Rating]) -> tuple[int, int]:
        """Judgements made elsewhere, each into a seat of its item: how many are new, and how many were there already.
        All of them, or none. Raises StudyError, which names the first that cannot be: no such item, no seat left."""
        new, known, now = 0, 0, self._clock()
        with self._database.transaction() as db:
            for rating in ratings:
                if rating.item not in self._items:
                    raise StudyError(f"the study has no item {rating.item!r}")
                if sorted(rating.systems) != sorted(self._items[rating.item].systems):
                    raise StudyError(f"item {rating.item}: a judgement of {', '.join(rating.systems)}")
                mine = (SEATS.c.item == rating.item, SEATS.c.annotator == rating.annotator)
                state = db.execute(select(SEATS.c.state).where(self._seats, *mine)).scalar()
                if state == RATED:
                    known += 1
                    continue
                seat = db.execute(
                    select(SEATS.c.seat)
                    .where(self._seats, *(mine if state == HELD else (SEATS.c.item == rating.item, _may_be_taken(now))))
                    .order_by(SEATS.c.seat)
                    .with_for_update()
                ).scalar()
                if seat is None:
                    raise StudyError(f"item {rating.item} has no seat left for the judgement of {rating.annotator!r}")
                db.execute(
                    update(SEATS).where(self._seat(rating.item, seat)).values(state=RATED, annotator=rating.annotator)
                )
                db.execute(insert(RATINGS).values(**self._values(rating, seat)))
                new += 1
        return new, known

    # -- looking -------------------------------------------------------------------------------------------------------

    def all(self) -> list[Rating]:
        """All ratings, in the order in which they were given."""
        with self._database.transaction() as db:
            rows = db.execute(
                select(RATINGS).where(RATINGS.c.study == self._study).order_by(RATINGS.c.given_at, RATINGS.c.item)
            ).all()
        return [
            Rating(
                row.item, row.annotator, tuple(json.loads(row.systems)), Judgement.model_validate_json(row.judgement),
                row.given_at, row.seconds,
            )
            for row in rows
        ]  # fmt: skip

    def left_for(self, annotator: str) -> tuple[int, int]:
        """How many the annotator has rated, and how many more there may be for them."""
        with self._database.transaction() as db:
            rated = db.execute(
                select(func.count()).where(self._seats, SEATS.c.annotator == annotator, SEATS.c.state == RATED)
            ).scalar_one()
            done = select(SEATS.c.item).where(self._seats, SEATS.c.annotator == annotator, SEATS.c.state == RATED)
            left = db.execute(
                select(func.count(SEATS.c.item.distinct())).where(
                    self._seats, SEATS.c.state != RATED, SEATS.c.item.not_in(done)
                )
            ).scalar_one()
        return rated, left

    def progress(self) -> StudyProgress:
        now = self._clock()
        with self._database.transaction() as db:
            seats = db.execute(
                select(SEATS.c.item, SEATS.c.state, SEATS.c.annotator, SEATS.c.until).where(self._seats)
            ).all()
            times = db.execute(
                select(RATINGS.c.annotator, RATINGS.c.given_at, RATINGS.c.seconds).where(RATINGS.c.study == self._study)
            ).all()
            people = db.execute(
                select(PEOPLE.c.name).where(PEOPLE.c.study == self._study, PEOPLE.c.role == "annotator")
            ).scalars()
            names = sorted({*people, *(row.annotator for row in times)})
        rated: dict[str, int] = {}
        for seat in seats:
            rated[seat.item] = rated.get(seat.item, 0) + (seat.state != RATED)
        holding = {seat.annotator for seat in seats if seat.state == HELD and seat.until >= now}
        work = []
        for name in names:
            own = [row for row in times if row.annotator == name]
            seconds = sorted(row.seconds for row in own if row.seconds is not None)
            work.append(
                Work(
                    name, len(own), name in holding, max((row.given_at for row in own), default=None),
                    seconds[len(seconds) // 2] if seconds else None,
                )
            )  # fmt: skip
        return StudyProgress(
            items=len(rated),
            seats=len(seats),
            rated=sum(seat.state == RATED for seat in seats),
            complete=sum(missing == 0 for missing in rated.values()),
            held=len(holding),
            work=work,
        )

    # -- pieces --------------------------------------------------------------------------------------------------------

    @property
    def _seats(self) -> ColumnElement[bool]:
        return SEATS.c.study == self._study

    def _seat(self, item: str, seat: int) -> ColumnElement[bool]:
        return and_(self._seats, SEATS.c.item == item, SEATS.c.seat == seat)

    def _lock(self, db: Connection, annotator: str) -> None:
        """Requests of one annotator come one after the other: two at once would be given two items."""
        db.execute(
            select(PEOPLE.c.name).where(PEOPLE.c.study == self._study, PEOPLE.c.name == annotator).with_for_update()
        )

    def _values(self, rating: Rating, seat: int) -> dict[str, Any]:
        return {
            "study": self._study, "item": rating.item, "annotator": rating.annotator, "seat": seat,
            "systems": json.dumps(rating.systems), "judgement": rating.judgement.model_dump_json(),
            "given_at": rating.given_at, "seconds": rating.seconds,
        }  # fmt: skip


_FREED = {"state": FREE, "annotator": None, "since": None, "until": None}


def _may_be_taken(now: float) -> ColumnElement[bool]:
    return or_(SEATS.c.state == FREE, and_(SEATS.c.state == HELD, SEATS.c.until < now))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
