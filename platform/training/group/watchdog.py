"""Ends a worker that hangs, and keeps its stack traces."""

from __future__ import annotations

import faulthandler
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)
HUNG_EXIT_CODE = 75  # exit code of a worker that was ended by its watchdog
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
        self.place = "starting"
        """What is being done, for whoever reads of its end."""
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

    def enter(self, place: str) -> None:
        """Something else begins."""
        self.place = place
        self.beat()

    def close(self) -> None:
        if self._stop.is_set():
            return
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
            idle = time.monotonic() - self._last
            if idle <= self._limit:
                continue
            message = f"no progress for {idle:.0f} s at {self.place} (the limit is {self._limit:g} s)"
            logger.error("%s: this worker is ended, and the group restarted", message)
            try:
                self._keep(f"{message}\n\n{stacks()}")
                Path(self._file.name).unlink(missing_ok=True)  # nothing is in it
            except Exception as error:  # the worker must end whatever becomes of its stacks
                logger.error("its stack traces could not be kept: %s\n%s", error, stacks())
            self._stop.wait(self._grace)
            self._end(HUNG_EXIT_CODE)
            return


def stacks() -> str:
    """The stack traces of all threads of this process, with the threads' names."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        text = file.read()
    for thread in threading.enumerate():
        if thread.ident is not None:
            address = f"0x{thread.ident:016x}"
            text = text.replace(f"hread {address}", f"hread {thread.name!r} {address}")
    return text
