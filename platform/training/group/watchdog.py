"""What interrupts a worker: a hang, which ends it with its stack traces kept, and notices to checkpoint or to stop.

A notice is a small file beside the checkpoints, so that it reaches the workers from a signal handler of the driver,
from Ray Train's controller before it resizes the group, and from a person: all they share for certain is the storage.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TextIO

from calumma.platform import storage

logger = logging.getLogger(__name__)
Action = Literal["checkpoint", "stop"]
ACTIONS: tuple[Action, ...] = ("checkpoint", "stop")  # the later includes the earlier
HUNG = 75  # exit code of a worker that was ended by its watchdog
_POLL = 2.0  # seconds between two looks for a notice
_GRACE = 5.0  # seconds that a hung worker leaves to the others of its group to write their stacks, too


class Watchdog:
    """Ends this process when `beat` is not called for `limit` seconds, after handing all stack traces to `keep`.

    Where even Python's threads stand still (C code that holds the interpreter), faulthandler's own thread does it half
    as long later; the stacks are then in `calumma-stacks-PID.txt` of the temporary folder.
    """

    def __init__(
        self,
        limit: float,
        keep: Callable[[str], None],
        end: Callable[[int], object] = os._exit,
        grace: float = _GRACE,
    ) -> None:
        self._limit, self._keep, self._end, self._grace = limit, keep, end, grace
        self._stop = threading.Event()
        self._last = self._armed = time.monotonic()
        fallback = Path(tempfile.gettempdir(), f"calumma-stacks-{os.getpid()}.txt")
        self._file: TextIO = fallback.open("w")
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """There is progress."""
        self._last = time.monotonic()
        if self._last - self._armed > self._limit / 10:
            self._arm()

    def close(self) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def _arm(self) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(1.5 * self._limit + 2 * self._grace, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit / 5)):
            silent = time.monotonic() - self._last
            if silent <= self._limit:
                continue
            told = f"no progress for {silent:.0f} s (the limit is {self._limit:g} s)"
            logger.error("%s: this worker is ended, and the group restarted", told)
            try:
                self._keep(f"{told}\n\n{stacks()}")
                Path(self._file.name).unlink(missing_ok=True)  # nothing is in it
            except Exception as error:  # the worker must end whatever becomes of its stacks
                logger.error("its stack traces could not be kept: %s\n%s", error, stacks())
            self._stop.wait(self._grace)
            self._end(HUNG)
            return


def stacks() -> str:
    """The stack traces of all threads of this process, with the threads' names."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        found = file.read()
    for thread in threading.enumerate():
        if thread.ident is not None:
            address = f"0x{thread.ident:016x}"
            found = found.replace(f"hread {address}", f"hread {thread.name!r} {address}")
    return found


def notice_file(checkpoints: str, action: Action) -> str:
    """One for each action, so that no notice takes another's place."""
    return storage.join(checkpoints, f"notice-{action}.json")


def notify(checkpoints: str, action: Action, why: str) -> None:
    """Ask the workers that write to this folder of checkpoints to write one now, and with `stop` to end after it."""
    storage.write_bytes(notice_file(checkpoints, action), json.dumps({"why": why}).encode())


def followed(checkpoints: str) -> bool:
    """Whether no notice is waiting to be followed."""
    return not any(storage.exists(notice_file(checkpoints, action)) for action in ACTIONS)


def withdraw(checkpoints: str, actions: Iterable[Action]) -> None:
    """Take notices away; whoever waits until they are followed sees it by that. Raises StorageError."""
    for action in actions:
        storage.delete(notice_file(checkpoints, action))


class Notices:
    """Looks for a notice in the background. One worker of a group does."""

    def __init__(self, checkpoints: str, poll: float | None = None) -> None:
        self._checkpoints, self._poll = checkpoints, _POLL if poll is None else poll
        self._found: tuple[Action, str] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="notices", daemon=True)
        self._thread.start()

    @property
    def found(self) -> tuple[Action, str] | None:
        """What is asked for, and why."""
        return self._found

    def done(self, action: Action) -> None:
        """What was asked for is done; a notice to stop that came meanwhile waits."""
        followed = ACTIONS[: ACTIONS.index(action) + 1]
        if self._found is not None and self._found[0] in followed:
            self._found = None
        with suppress(storage.StorageError):
            withdraw(self._checkpoints, followed)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._poll):
            known = -1 if self._found is None else ACTIONS.index(self._found[0])
            for action in reversed(ACTIONS[known + 1 :]):
                try:
                    told = json.loads(storage.read_bytes(notice_file(self._checkpoints, action)))
                    self._found = (action, str(told.get("why", "")))
                    break
                except storage.NotFound:
                    continue
                except (storage.StorageError, ValueError, AttributeError) as error:
                    logger.debug("no notice can be read: %s", error)
