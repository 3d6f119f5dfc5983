"""A Ray head on this machine that outlives the command which starts it: what `calumma serve start` serves from.

It has its own ports, temporary folder and authentication token, so it touches no other Ray cluster, and a record
in the user's cache folder says what to end. Only one at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calumma.platform.cluster import connection
from calumma.platform.cluster.capacity import ClusterError

if TYPE_CHECKING:
    import psutil

READY_MESSAGE = "Ray runtime started"  # what `ray start` prints when the head is up
START_ATTEMPTS = 2
CONNECT_TIMEOUT = 10.0  # seconds; the kernel answers for a process that is busy
SHUTDOWN_TIMEOUT = 3.0  # seconds that processes get to end by themselves; the head has nothing to finish
START_TIMEOUT = 180.0  # seconds; a busy two-core machine needed up to 100


def folder() -> Path:
    """Where the record, the token and the log of the service are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calumma"


@dataclass(frozen=True)
class Service:
    """The running service, as recorded: on a cluster elsewhere or, with `pid` (created at `born`), on our own Ray head.

    started: seconds since the epoch. temporary: the head's folder of sockets and session files. drain_seconds: answers
    in flight get so long when it is to end. certificate: file of the server's, where it speaks TLS.
    """

    url: str
    model: str
    name: str
    started: float
    address: str
    pid: int | None = None
    born: float | None = None
    temporary: str | None = None
    drain_seconds: float = 600.0
    certificate: str | None = None

    def write(self) -> None:
        file = folder() / "serve.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(file)

    @classmethod
    def read(cls) -> Service | None:
        """The service on record, if there is one. Raises ClusterError on a record that cannot be read."""
        file = folder() / "serve.json"
        if not file.exists():
            return None
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"cannot read the record of the running service, {file}: {error}") from error

    @staticmethod
    def delete_record() -> None:
        (folder() / "serve.json").unlink(missing_ok=True)

    @property
    def alive(self) -> bool:
        """Whether our head still runs; true for a service on a cluster elsewhere, which we cannot see."""
        return self.pid is None or _process(self.pid, self.born) is not None

    @property
    def listens(self) -> bool:
        """Whether our head lives and takes connections: then it may have answers in flight, however busy it is."""
        host, _, port = self.address.rpartition(":")
        if not self.alive:
            return False
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), CONNECT_TIMEOUT):
            return True
        return False

    def end(self) -> None:
        """End our head with all its processes, and only those; forget the record and remove the temporary folder."""
        if self.pid is not None and (head := _process(self.pid, self.born)) is not None:
            _end_head(head)
        if self.temporary:
            shutil.rmtree(self.temporary, ignore_errors=True)
        self.delete_record()


@dataclass(frozen=True)
class RayHead:
    """A Ray head of ours."""

    process: psutil.Process
    address: str
    temporary: Path

    def end(self) -> None:
        _end_head(self.process)
        shutil.rmtree(self.temporary, ignore_errors=True)


def start_head(cpus: int, gpus: int) -> RayHead:
    """Start a Ray head in a session of its own and wait until it is up. Leaves nothing behind when that fails.

    Raises ClusterError with Ray's own message.
    """
    import psutil

    log = folder() / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, START_ATTEMPTS + 1):
        # Ray puts Unix sockets below it, whose paths may have 107 characters: a short name.
        temporary = Path(tempfile.mkdtemp(prefix="calumma-", dir="/tmp"))
        port = _free_port()
        with log.open("wb") as output:
            child = subprocess.Popen(
                _command(port, temporary, cpus, gpus),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | connection.QUIET | connection.LEAN | authentication(),
                start_new_session=True,
            )
        head = RayHead(psutil.Process(child.pid), f"127.0.0.1:{port}", temporary)
        try:
            _await_ready(child, log)
        except ClusterError:
            head.end()
            if attempt == START_ATTEMPTS:
                raise
        except BaseException:
            head.end()
            raise
        else:
            return head
    raise AssertionError("unreachable")


def authentication() -> dict[str, str]:
    """The environment that lets this user's processes, and nobody else's, use the head: a token in a private file."""
    token = folder() / "serve.token"
    if not token.exists():
        token.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@contextlib.contextmanager
def connected(address: str, ours: bool) -> Iterator[None]:
    """Connect as a driver, quiet on the terminal, to our head or to a cluster elsewhere for the length of the block.

    For our own, Ray must not have been imported before: it reads the authentication settings when it is.
    Raises ClusterError.
    """
    os.environ.update(connection.QUIET | (authentication() if ours else {}))
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        raise ClusterError(f"no Ray cluster answers at {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _command(port: int, temporary: Path, cpus: int, gpus: int) -> list[str]:
    # -P: the working folder must not lend its folders as packages to Ray
    start = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "ray-client-server-port": _free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "dashboard-agent-listen-port": 0,
        "include-dashboard": "false",
        "temp-dir": temporary,
        "num-cpus": cpus,
        "num-gpus": gpus,
    }
    return [*start, *(f"--{name}={value}" for name, value in options.items())]


def _await_ready(child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT
    while READY_MESSAGE not in log.read_text(errors="replace"):
        if child.poll() is not None:
            raise ClusterError(f"Ray did not start (exit code {child.returncode}); {log} says:\n{_tail(log)}")
        if time.monotonic() > end:
            raise ClusterError(f"Ray did not start within {START_TIMEOUT:.0f} s; {log} says:\n{_tail(log)}")
        time.sleep(0.2)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-10:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _process(pid: int, born: float | None) -> psutil.Process | None:
    """The process with this number, unless it is another one that got the number later."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE and (born is None or abs(process.create_time() - born) < 1):
            return process
    return None


def _end_head(head: psutil.Process) -> None:
    """End a head, its descendants, and whatever else is in the session that it leads."""
    import psutil

    processes = {head}
    with contextlib.suppress(psutil.NoSuchProcess):
        processes |= set(head.children(recursive=True))
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == head.pid:
                processes.add(process)
    alive = [head]
    for send_signal in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                send_signal(process)
        _, alive = psutil.wait_procs(processes, timeout=SHUTDOWN_TIMEOUT)
