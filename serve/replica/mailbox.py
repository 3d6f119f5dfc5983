"""Hands the engine's outputs from its thread to the asyncio task of their request.

Waking another thread for every token costs more than the token's text does. So a task that has sent something a moment
ago is not woken by what is not urgent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Reader(Enum):
    BUSY = auto()
    WAITING = auto()  # for anything
    DEFERRED = auto()  # until something urgent comes, or its time


class Mailbox(Generic[Item]):
    """Any thread posts; one task, of the event loop in which the box is made, takes."""

    def __init__(self, deferrable: tuple[type, ...]) -> None:
        """deferrable: types of items that are not urgent."""
        self._deferrable = deferrable
        self._items: deque[Item] = deque()
        self._urgent = False  # true while something urgent is in it
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._reader = Reader.BUSY

    def post(self, item: Item) -> None:
        """Does not block. Where the event loop has ended, nobody is left who waits."""
        self._items.append(item)
        if not isinstance(item, self._deferrable):
            self._urgent = True
        if self._reader is Reader.WAITING or (self._urgent and self._reader is Reader.DEFERRED):
            self._reader = Reader.BUSY  # once is enough
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._woken.set)

    async def take(self, not_before: float = 0.0) -> list[Item]:
        """All that is there, at least one item: with something urgent among it at once, else not before that time of
        the event loop."""
        await self._sleep(Reader.WAITING, lambda: bool(self._items))
        if not_before > self._loop.time():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(not_before):
                    await self._sleep(Reader.DEFERRED, lambda: self._urgent)
        self._urgent = False
        return [self._items.popleft() for _ in range(len(self._items))]

    async def _sleep(self, how: Reader, until: Callable[[], bool]) -> None:
        try:
            while True:
                self._woken.clear()
                self._reader = how
                if until():  # looked at after `_reader` is set: whoever posts from now on wakes
                    return
                await self._woken.wait()
        finally:
            self._reader = Reader.BUSY
