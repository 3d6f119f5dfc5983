"""Notices: asking the workers of a training to write a checkpoint, or to write one and stop.

A notice is a small file beside the checkpoints, so that it reaches the workers from a signal handler of the driver,
from Ray Train's controller before it resizes the group, and from a person: all they share for certain is the storage.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from calumma.platform import storage

logger = logging.getLogger(__name__)
Action = Literal["checkpoint", "stop"]
ACTIONS: tuple[Action, ...] = ("checkpoint", "stop")  # the later includes the earlier
_POLL = 2.0  # seconds between two looks for a notice


def notice_file(checkpoints: str, action: Action) -> str:
    """One for each action, so that no notice takes another's place."""
    return storage.join(checkpoints, f"notice-{action}.json")


def notify(checkpoints: str, action: Action, why: str) -> None:
    """Ask the workers that write to this folder of checkpoints to write one now, and with `stop` to end after it."""
    storage.write_bytes(notice_file(checkpoints, action), json.dumps({"why": why}).encode())


def none_pending(checkpoints: str) -> bool:
    """Whether no notice is waiting to be followed."""
    return not any(storage.exists(notice_file(checkpoints, action)) for action in ACTIONS)


def delete_notices(checkpoints: str, actions: Iterable[Action]) -> None:
    """Delete notices, by which whoever waits for them sees that they were followed. Raises StorageError."""
    for action in actions:
        storage.delete(notice_file(checkpoints, action))


class NoticeWatcher:
    """Looks for a notice in the background. One worker of a group does."""

    def __init__(self, checkpoints: str, poll: float | None = None) -> None:
        self._checkpoints, self._poll = checkpoints, _POLL if poll is None else poll
        self._pending: tuple[Action, str] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> tuple[Action, str] | None:
        """What is asked for, and why."""
        return self._pending

    def acknowledge(self, action: Action) -> None:
        """What was asked for is done; a notice to stop that came meanwhile waits."""
        done = ACTIONS[: ACTIONS.index(action) + 1]
        if self._pending is not None and self._pending[0] in done:
            self._pending = None
        with suppress(storage.StorageError):
            delete_notices(self._checkpoints, done)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._poll):
            known = -1 if self._pending is None else ACTIONS.index(self._pending[0])
            for action in reversed(ACTIONS[known + 1 :]):
                try:
                    content = json.loads(storage.read_bytes(notice_file(self._checkpoints, action)))
                    self._pending = (action, str(content.get("why", "")))
                    break
                except storage.NotFound:
                    continue
                except (storage.StorageError, ValueError, AttributeError) as error:
                    logger.debug("no notice can be read: %s", error)
