"""What is known of the models, for probes: asked for in the background, so that a probe waits for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from calumma.serve.protocol import Backend

log = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0  # between two questions to a model that answers
RETRY_SECONDS = 0.5  # and to one that does not
ANSWER_SECONDS = 10.0  # a model that has told nothing after so long is not ready
FIRST_SECONDS = 1.0  # the first probes wait so long for the first answers


class ModelFacts:
    """The last facts of each model, and why those that are not ready are not."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._facts: dict[str, dict[str, Any]] = {name: {} for name in backends}
        self._unavailable = dict.fromkeys(backends, "it has not told yet")
        self._asked = {name: asyncio.Event() for name in backends}  # set when it has answered, or failed to, once

    @contextlib.asynccontextmanager
    async def refreshing(self) -> AsyncIterator[None]:
        """Ask every model again and again, for the length of the block."""
        tasks = [asyncio.create_task(self._refresh(name)) for name in self._backends]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def known(self, name: str) -> dict[str, Any]:
        """The last facts of a model; empty where it has told none yet."""
        await self._await_first(name)
        return self._facts[name]

    async def unavailable(self) -> dict[str, str]:
        """Why models are not ready, by their name."""
        await asyncio.gather(*map(self._await_first, self._backends))
        return dict(self._unavailable)

    async def _await_first(self, name: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_SECONDS):
                await self._asked[name].wait()

    async def _refresh(self, name: str) -> None:
        while True:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    self._facts[name] = await self._backends[name].describe()
                self._unavailable.pop(name, None)
            except Exception as error:  # whatever keeps it from answering is what a probe wants to know
                reason = f"no answer in {ANSWER_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error)
                if self._unavailable.get(name) != reason:
                    log.warning("%s is not ready: %s", name, reason)
                self._unavailable[name] = reason
            self._asked[name].set()
            await asyncio.sleep(RETRY_SECONDS if name in self._unavailable else REFRESH_SECONDS)
