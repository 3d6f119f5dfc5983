"""One owner for an output: the run that holds its lease writes there, every other is refused and told who has it.

OUTPUT.lease/00000007.json    the owner with the highest number has the output; the file is renewed while it lives

Invariants. A number is given once: its file is created only where there is none (a conditional write; a hard link on a
file system), so of two runs that start together one is refused. Numbers only rise, and nothing that a lower number
writes below OUTPUT.lease changes who is the owner: a run that was stopped, and wakes up after another has taken its
output, finds the higher number and writes no more. Ages are measured by the storage's own clock, never by two hosts'.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from calumma.platform import storage

logger = logging.getLogger(__name__)
SECONDS = 60.0  # without a renewal, after which an output is free
_RENEWALS = 6  # in that time
_LATE = 2.5  # renewals that a living process of this machine may miss before it is waited for


class OutputTaken(RuntimeError):
    """Another run has the output; the message says which, since when, on which host, and what to do."""


class Owner(BaseModel):
    """Who has an output."""

    token: str
    run: str | None = None
    host: str
    machine: str
    """Of its processes' numbers: boot and namespace, so that a process is looked for only where it can be."""
    process: int
    process_began: str
    started: str
    seconds: float
    renewals: int = 0
    released: bool = False

    @classmethod
    def here(cls, seconds: float) -> Owner:
        """This process, from now on."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            process_began=_process_began(os.getpid()),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
        )

    @property
    def is_near(self) -> bool:
        """Whether its process, if it lives, is one of this machine."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended; one on another machine may always live."""
        return self.is_near and _process_began(self.process) != self.process_began

    def describe(self) -> str:
        run = f"the run {self.run}" if self.run else "another run"
        return f"{run} (started {self.started} on {self.host}, process {self.process})"


@dataclass(frozen=True)
class Fence:
    """What a worker needs to know whether its run still has the output. Picklable."""

    output: str
    epoch: int
    token: str

    def check(self) -> None:
        """To be called before what other runs would see is written or deleted. Raises OutputTaken, StorageError."""
        epoch, owner = _newest(_folder(self.output))
        if epoch > self.epoch or (owner is not None and owner.token != self.token):
            who = owner.describe() if owner is not None else "another run"
            raise OutputTaken(
                f"{self.output} belongs to {who} now: this run had not renewed its lease in time, and writes no more"
            )


class Lease:
    """An output that this process has, renewed from a thread until it is released."""

    def __init__(self, output: str, epoch: int, owner: Owner) -> None:
        self.fence = Fence(output, epoch, owner.token)
        self.lost: OutputTaken | None = None
        """Set once another run has the output."""
        self._owner, self._file = owner, _file(_folder(output), epoch)
        self._main = threading.current_thread() is threading.main_thread()
        self._stop, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def tell(self, run: str) -> None:
        """Let others be told of this MLflow run."""
        self._owner = self._owner.model_copy(update={"run": run})
        self._write()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if self.lost is not None:
            return
        self._owner = self._owner.model_copy(update={"released": True})
        try:
            self._write()
        except storage.StorageError as error:
            logger.warning("%s stays taken for %g s: %s", self.fence.output, self._owner.seconds, error)

    def _write(self) -> None:
        with self._writing:
            self._owner.renewals += 1
            storage.write_bytes(self._file, self._owner.model_dump_json(indent=1).encode())

    def _renew(self) -> None:
        told = False
        while not self._stop.wait(self._owner.seconds / _RENEWALS):
            try:
                self.fence.check()
                self._write()
                told = False
            except OutputTaken as error:
                self._lose(error)
                return
            except storage.StorageError as error:
                if not told:
                    logger.warning("the lease of %s is not renewed: %s", self.fence.output, error)
                told = True

    def _lose(self, error: OutputTaken) -> None:
        self.lost = error
        logger.error("%s", error)
        if self._main:  # as by Ctrl-C: whatever this process waits for
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def held(output: str, seconds: float = SECONDS) -> Iterator[Lease]:
    """The lease of an output for as long as the context lasts. Raises OutputTaken when another run has it, and when
    another has taken it meanwhile; StorageError."""
    lease = acquire(output, seconds)
    try:
        try:
            yield lease
        finally:
            lease.release()
    except BaseException as error:  # the interrupt may come while it is released, too
        if lease.lost is not None and error is not lease.lost:
            raise lease.lost from error
        raise


def acquire(output: str, seconds: float = SECONDS) -> Lease:
    """Make this process the owner of an output. An owner on another machine, or one that is late, is waited for until
    it is heard of or its time is over. Raises OutputTaken, StorageError."""
    folder, waiting = _folder(output), None
    while True:
        epoch, owner = _newest(folder)
        age = None if owner is None or owner.released or owner.is_gone else _age(_file(folder, epoch))
        if owner is not None and age is not None and age < owner.seconds:
            near = owner.is_near and age < owner.seconds / _RENEWALS * _LATE
            if near or (waiting is not None and owner != waiting):  # renewed meanwhile, or another one's already
                raise OutputTaken(
                    f"output: {output} is being written by {owner.describe()}, last heard of {age:.0f} s ago. "
                    "Wait for it or stop it, or give another `output`"
                )
            if waiting is None:
                told = "%s has %s, and was last heard of %.0f s ago: looking for up to %.0f s whether it still lives"
                logger.warning(told, owner.describe(), output, age, owner.seconds - age)
            waiting = owner
            time.sleep(min(owner.seconds - age, owner.seconds / _RENEWALS / 2))
            continue
        mine = Owner.here(seconds)
        content = mine.model_dump_json(indent=1).encode()
        if not storage.create(_file(folder, epoch + 1), content) and _content(_file(folder, epoch + 1)) != content:
            continue  # another was faster; equal content is our own, whose answer was lost on its way
        for earlier in _epochs(folder):
            if earlier < epoch + 1:
                with suppress(storage.StorageError):
                    storage.delete(_file(folder, earlier))
        return Lease(output, epoch + 1, mine)


def _folder(output: str) -> str:
    """Beside the output, which may be deleted as a whole."""
    return f"{output.rstrip('/')}.lease"


def _file(folder: str, epoch: int) -> str:
    return storage.join(folder, f"{epoch:08d}.json")


def _epochs(folder: str) -> list[int]:
    names = (Path(storage.relative(uri, folder)) for uri in storage.list_files(folder))
    return sorted(int(name.stem) for name in names if name.suffix == ".json" and name.stem.isdigit())


def _newest(folder: str) -> tuple[int, Owner | None]:
    """The highest number there is (0: none), and who has it."""
    for _ in range(3):
        epoch = max(_epochs(folder), default=0)
        if not epoch:
            return 0, None
        with suppress(storage.NotFound):  # deleted since it was listed: there is a higher one
            try:
                return epoch, Owner.model_validate_json(storage.read_bytes(_file(folder, epoch)))
            except ValidationError as error:
                raise storage.StorageError(f"{_file(folder, epoch)} is no lease: {error.errors()[0]['msg']}") from error
    raise storage.StorageError(f"the lease in {folder} changes faster than it can be read")


def _age(uri: str) -> float | None:
    with suppress(storage.NotFound):
        return storage.age(uri)
    return None


def _content(uri: str) -> bytes | None:
    with suppress(storage.NotFound):
        return storage.read_bytes(uri)
    return None


def _machine() -> str:
    """Of this process's number: empty where it cannot be told."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _process_began(process: int) -> str:
    """When a process of this machine began, in the kernel's ticks; empty when there is none, or only its remains."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]
