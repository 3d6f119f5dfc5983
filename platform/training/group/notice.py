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
from calumma.platform.storage.lease import Fence, OutputTaken

logger = logging.getLogger(__name__)
Action = Literal["checkpoint", "stop"]
ACTIONS: tuple[Action, ...] = ("checkpoint", "stop")  # the later includes the earlier
_POLL = 2.0  # seconds between two looks for a notice
_FENCE_TURNS = 5  # looks for a notice between two at the lease


def notice_file(checkpoints: str, action: Action, owner: str = "") -> str:
    """One for each action, so that no notice takes another's place, and for each `owner` who gives it (the token of
    a lease): workers follow their own run's, and a person's, who needs none."""
    return storage.join(checkpoints, f"notice-{action}{f'-{owner[:12]}' if owner else ''}.json")


def notify(checkpoints: str, owner: str, action: Action, why: str) -> None:
    """Ask the workers that write to this folder of checkpoints to write one now, and with `stop` to end after it."""
    storage.write_bytes(notice_file(checkpoints, action, owner), json.dumps({"why": why}).encode())


def none_pending(checkpoints: str, owner: str = "") -> bool:
    """Whether no notice is waiting to be followed."""
    return not any(storage.exists(file) for action in ACTIONS for file in _files(checkpoints, action, owner))


def delete_notices(checkpoints: str, actions: Iterable[Action], owner: str = "") -> None:
    """Delete notices, by which whoever waits for them sees that they were followed. Raises StorageError."""
    for action in actions:
        for file in _files(checkpoints, action, owner):
            storage.delete(file)


def _files(checkpoints: str, action: Action, owner: str) -> list[str]:
    """Where a notice may be for the workers of an owner: its own, and anybody's."""
    return [notice_file(checkpoints, action, by) for by in dict.fromkeys((owner, ""))]


class NoticeWatcher:
    """Looks for a notice in the background. One worker of a group does."""

    def __init__(self, checkpoints: str, fence: Fence | None = None, poll: float | None = None) -> None:
        """With the `fence` of its run it also looks whether another run has taken the output."""
        self._checkpoints, self._fence, self._poll = checkpoints, fence, _POLL if poll is None else poll
        self._owner = fence.token if fence is not None else ""
        self._pending: tuple[Action, str] | None = None
        self.taken: OutputTaken | None = None
        """Set once another run has the output."""
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
            delete_notices(self._checkpoints, done, self._owner)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        turn = 0
        while not self._stop.wait(self._poll):
            turn += 1
            if self._fence is not None and turn % _FENCE_TURNS == 0:
                try:
                    self._fence.check()
                except OutputTaken as taken:
                    self.taken = taken
                    return
                except storage.StorageError as error:
                    logger.debug("the lease cannot be read: %s", error)
            known = -1 if self._pending is None else ACTIONS.index(self._pending[0])
            for action in reversed(ACTIONS[known + 1 :]):
                if any(self._found(action, file) for file in _files(self._checkpoints, action, self._owner)):
                    break

    def _found(self, action: Action, file: str) -> bool:
        try:
            self._pending = (action, str(json.loads(storage.read_bytes(file)).get("why", "")))
        except storage.NotFound:
            return False
        except (storage.StorageError, ValueError, AttributeError) as error:
            logger.debug("no notice can be read: %s", error)
            return False
        return True
