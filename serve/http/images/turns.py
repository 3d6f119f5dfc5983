"""Threads whose work tenants get done in turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class FairThreads:
    """So many threads; who waits for one waits in line by tenant, and the tenants take turns. For one event loop at a
    time."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._turns: tuple[asyncio.AbstractEventLoop, Turns] | None = None

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises."""
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:
            self._turns = loop, Turns(self._count)
        turns = self._turns[1]
        await turns.take(tenant)
        # The slot is free when the work ends, even if nobody waits for it any more.
        future = self._threads.submit(work)

        def ended(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(turns.give_back)

        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Turns:
    """Slots that tenants get in turn. To be used on one event loop."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._line: dict[str, deque[asyncio.Future[None]]] = {}  # whose turn is next stands first

    async def take(self, tenant: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        while self._line:
            tenant = next(iter(self._line))
            line = self._line.pop(tenant)
            while line and line[0].done():  # who waited has gone
                line.popleft()
            if not line:
                continue
            line.popleft().set_result(None)
            if line:
                self._line[tenant] = line
            return
        self._free += 1
