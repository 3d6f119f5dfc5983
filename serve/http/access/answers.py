"""How many answers are under way: a request of `n` is as much work as `n` requests."""

from __future__ import annotations

from calumma.serve.http.wire.errors import APIError
from calumma.serve.shares import Shares


class HeldAnswers:
    """The answers of one HTTP request. tenant: the API key's name, "" without keys. most: answers of the key at once;
    None where there are no keys."""

    def __init__(self, answers: Shares, tenant: str, most: int | None) -> None:
        self._answers, self._tenant, self._most = answers, tenant, most
        self._held = 0

    def take(self, answers: int) -> None:
        """The request is so many answers, which hold their places until it ends. Raises APIError: 429 where there are
        too many at present, 400 where there always would be."""
        more = max(0, answers - self._held)
        limit = self._answers.total if self._most is None else min(self._most, self._answers.total)
        if answers > limit:
            raise APIError(
                f"{answers} answers are asked for at once; {limit} are the most "
                f"{'that this server works on' if self._most is None else 'for this API key'}",
                param="n",
            )
        full = self._answers.full(self._tenant, more, self._most)
        if full == "tenant":
            raise APIError(
                f"this API key has answers under way, and may have {self._most} at once; wait for some to end",
                status=429,
                code="rate_limit_exceeded",
            )
        if full is not None:
            raise APIError(
                f"the server is working on as many answers as it does, {self._answers.total}; try again shortly",
                status=429,
                code="overloaded",
            )
        self._answers.take(self._tenant, more)
        self._held += more

    def give_back(self) -> None:
        if self._held:
            self._answers.give_back(self._tenant, self._held)
        self._held = 0
