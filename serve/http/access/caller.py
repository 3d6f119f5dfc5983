"""Whose request it is that a task of the server works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import blake2b

from calumma.serve.settings import APIKey


@dataclass(frozen=True)
class Caller:
    """name: the API key's. salt: differs between keys; of what is kept from requests, callers find their own alone.
    Without keys all are one."""

    name: str = ""
    salt: bytes = b""

    @classmethod
    def of(cls, key: APIKey | None) -> Caller:
        if key is None:
            return cls()
        return cls(key.name, _salt(bytes.fromhex(key.sha256)))

    @classmethod
    def batches_of(cls, owner: str) -> Caller:
        """owner: whose batches."""
        return cls(owner, _salt(owner.encode()))


def _salt(of: bytes) -> bytes:
    return blake2b(of, digest_size=16, person=b"calumma salt").digest()


_CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  # it is frozen


def current_caller() -> Caller:
    """Of the request in whose task this is called, or in a task that it has begun."""
    return _CALLER.get()


@contextmanager
def called_by(caller: Caller) -> Iterator[None]:
    token = _CALLER.set(caller)
    try:
        yield
    finally:
        _CALLER.reset(token)
