"""API keys: who may ask, and how much at once. Only their SHA-256 hashes are kept, in memory and in files.

A key is 256 random bits, so a plain hash keeps it; a password would need a slow one.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from calumma.serve.http.access.answers import HeldAnswers
from calumma.serve.http.wire.errors import APIError
from calumma.serve.settings import APIKey
from calumma.serve.shares import Shares

VARIABLE = "CALUMMA_API_KEYS"
PREFIX = "sk-calumma-"
LINE = re.compile(
    r"(?P<sha256>[0-9a-f]{64})(?:\s+(?P<name>[A-Za-z0-9._-]+))?(?:\s+(?P<running>[1-9]\d*))?"
    r"(?:\s+priority=(?P<priority>-?\d{1,3}))?$"
)
FORM = "SHA256 [NAME [ANSWERS AT ONCE]] [priority=NUMBER]"


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(lines: Iterator[str] | list[str], where: str) -> list[APIKey]:
    """Keys, one a line; empty lines and comments are skipped. Raises ValueError that names the line, not the key."""
    keys = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = LINE.match(text)
        if found is None:
            raise ValueError(
                f"{where}, entry {number}: not `{FORM}`. Keys are given by their hash: calumma serve key makes one"
            )
        running = found["running"]
        keys.append(
            APIKey(
                name=found["name"] or found["sha256"][:8],
                sha256=found["sha256"],
                running=int(running) if running else None,
                priority=int(found["priority"] or 0),
            )
        )
    return keys


def load_keys(file: Path | None) -> list[APIKey]:
    """The keys of a file, and of the environment (entries separated by commas). Raises ValueError, OSError."""
    keys = parse_keys(file.read_text().splitlines(), str(file)) if file else []
    if file and not keys:
        raise ValueError(
            f"{file} holds no key: nobody could use the server. `calumma serve keys add {file} NAME` makes one"
        )
    return keys + parse_keys(os.environ.get(VARIABLE, "").split(","), f"${VARIABLE}")


def distinct(keys: list[APIKey]) -> None:
    """Raises ValueError where two keys have one name, or are one."""
    for what, given in (("name", [key.name for key in keys]), ("hash", [key.sha256 for key in keys])):
        if twice := sorted({one for one in given if given.count(one) > 1}):
            raise ValueError(f"the {what} {', '.join(twice)} is given more than once; every key has its own")


class AccessControl:
    """Authenticates requests by their API key, and limits how many answers are under way: in all, and for each key.
    Without keys everybody may use the server.

    more: gives further keys by their hash, those of the moment.
    """

    def __init__(
        self,
        keys: tuple[APIKey, ...],
        running: int,
        running_per_key: int,
        more: Callable[[], Mapping[str, APIKey]] | None = None,
    ) -> None:
        self._keys = {key.sha256: key for key in keys}
        self._more = more
        self._answers, self._per_key = Shares(running), running_per_key

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return not self._keys and self._more is None

    def authenticate(self, authorization: str) -> APIKey | None:
        """The key in an Authorization header; None where none is needed. Raises APIError 401.

        Looking a hash up takes a time that depends on the hash alone, which tells nothing about a key.
        """
        if self.open:
            return None
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise APIError(
                "this server needs an API key; send it as Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
        sha256 = hash_key(secret.strip())
        key = self._keys.get(sha256) or (self._more().get(sha256) if self._more else None)
        if key is None:
            raise APIError("the API key is not one that this server knows", status=401, code="invalid_api_key")
        return key

    @contextmanager
    def slot(self, key: APIKey | None) -> Iterator[HeldAnswers]:
        """Held for the length of a request, which counts for one answer until it says that it is more. Raises APIError
        429 when there are too many."""
        most = (key.running or self._per_key) if key else None
        answers = HeldAnswers(self._answers, key.name if key else "", most)
        try:
            answers.take(1)
            yield answers
        finally:
            answers.give_back()
