"""Whose request it is that a task of the server works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import blake2b

from calumma.serve.http.access.answers import HeldAnswers
from calumma.serve.settings import APIKey

MOST_BEHIND = 10_000
BEHIND_ALL = 2 * MOST_BEHIND  # further than any key's request may stand


@dataclass(frozen=True)
class Caller:
    """name: the API key's. salt: differs between keys; of what is kept from requests, callers find their own alone.
    Without keys all are one. priority: of the key; lower ones go first. answers: those of the request."""

    name: str = ""
    salt: bytes = b""
    priority: int = 0
    answers: HeldAnswers | None = None

    @classmethod
    def of(cls, key: APIKey | None, answers: HeldAnswers | None = None) -> Caller:
        if key is None:
            return cls(answers=answers)
        return cls(key.name, _salt(bytes.fromhex(key.sha256)), key.priority, answers)

    @classmethod
    def batches_of(cls, owner: str) -> Caller:
        """owner: whose batches, which get what all others leave."""
        return cls(owner, _salt(owner.encode()), BEHIND_ALL)

    def salt_for(self, own: bytes) -> bytes:
        """own: the salt that a request brings; none: the caller's."""
        return blake2b(own, key=self.salt, digest_size=16, person=b"calumma own salt").digest() if own else self.salt

    def take(self, answers: int) -> None:
        """The request is so many answers. Raises APIError where there are too many."""
        if self.answers is not None:
            self.answers.take(answers)


def _salt(of: bytes) -> bytes:
    return blake2b(of, digest_size=16, person=b"calumma salt").digest()


_CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  # it is frozen


def current_caller() -> Caller:
    """Of the request in whose task this is called, or in a task that it has begun."""
    return _CALLER.get()


def behind(priority: int | None) -> int:
    """How far a request stands back that names a priority: behind others, and never before them."""
    return min(max(0, priority or 0), MOST_BEHIND)


@contextmanager
def called_by(caller: Caller) -> Iterator[None]:
    token = _CALLER.set(caller)
    try:
        yield
    finally:
        _CALLER.reset(token)
