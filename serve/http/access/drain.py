"""The end of a server: it takes no new requests, and those under way finish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from calumma.serve.http.wire.errors import APIError

SHUTTING_DOWN = "shutting_down"


class Drain:
    """Whether new requests are refused, and how many are under way.

    Whoever ends the server says so again and again. When they are lost before it has ended, it takes requests again.
    """

    def __init__(self) -> None:
        self.requests = 0
        self._until = 0.0

    @property
    def active(self) -> bool:
        return time.monotonic() < self._until

    def hold(self, seconds: float) -> int:
        """Refuse new requests from now on for so long; how many are under way."""
        self._until = time.monotonic() + seconds
        return self.requests

    @contextmanager
    def request(self) -> Iterator[None]:
        """For the length of a request. Raises APIError 503."""
        if self.active:
            raise APIError("the server is shutting down", status=503, code=SHUTTING_DOWN)
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1
