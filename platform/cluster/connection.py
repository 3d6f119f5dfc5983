"""Where jobs run: a Ray cluster inside this process (`embedded`), or one that exists (`connected`).

An embedded cluster never outlives its `with` block: not after an error, Ctrl-C, SIGTERM, or a start that failed."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from calumma.platform.cluster.capacity import ClusterError, cores, gpus, logical_cpus, ray_is_running

if TYPE_CHECKING:
    import psutil


log = logging.getLogger(__name__)
TERMINATED = 128 + signal.SIGTERM
START_ATTEMPTS = 2  # Ray gives its own node a fixed 30 s to appear; a starved machine may need a second try
SHUTDOWN_TIMEOUT = 10.0  # seconds Ray's processes get to end by themselves before they are killed


# Read by Ray's processes when they start. Nobody watches progress bars of inner pipelines; jobs report their own.
QUIET = {
    # Ray Serve's processes send each other what they stream by gRPC, not through Ray's object store ("Performance
    # Tuning" in its documentation): a third more tokens a second on two cores. Its limit of 4 MiB a message is
    # less than prompts with images have.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # Called by Ray Serve's proxies when they start: how long clients may take to send and to read.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "calumma.serve.http.access.connections.install",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # a worker process starts when something needs it, not one for every logical CPU in advance
    "RAY_prestart_worker_first_driver": "0",
}


# The lean profile is for small machines, where the number of processes and their chatter is the cost: 7 processes
# instead of 19 on two cores. It gives up the dashboard, metrics, the state API and the watch for preempted nodes.
LEAN = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray gives its workers a niceness of 15: beside one other busy process for every core they get a thirtieth of it.
    "RAY_worker_niceness": "0",
}


@contextlib.contextmanager
def embedded(lean: bool = False, logs: Path | None = None) -> Iterator[None]:
    """A Ray cluster of this machine for the length of the block. `lean` leaves the dashboard and metrics away.

    The logs of Ray's processes are copied to `logs` at the end (without it they stay in /tmp/ray), never printed.
    In a process that runs Ray already, the block uses that cluster and leaves it as it is.
    Raises ClusterError when Ray does not start.
    """
    if ray_is_running():
        yield
        return
    with _environment(_profile(lean)), _exit_on_sigterm():
        roots = _start(lean)
        try:
            yield
        finally:
            with _uninterrupted():
                session = _session_folder()
                _shutdown(roots)
                _keep_logs(session, logs)


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """The block runs as a driver of an existing cluster: `auto` (one that runs on this machine, or $RAY_ADDRESS),
    `host:port`, or `ray://host:10001`. Raises ClusterError when none answers."""
    import ray

    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the address of a dashboard: use it with `calumma job submit`; "
            "to run from here, give `auto` or ray://HOST:10001"
        )
    with _environment(QUIET), _exit_on_sigterm():
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except Exception as error:
            _shutdown_ray()
            raise ClusterError(
                f"no Ray cluster answers at {address!r} ({_first_line(error)}): check the address, and that the "
                "cluster is up (`ray status` on its head); `ray start --head` starts one on this machine"
            ) from error
        _quiet_console()
        try:
            yield
        finally:
            with _uninterrupted():
                ray.shutdown()


def _profile(lean: bool) -> dict[str, str]:
    values = QUIET | (LEAN if lean else {})
    if not gpus():
        values["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for one, and may find a driver without a device
    return values


def _start(lean: bool) -> list[psutil.Process]:
    """Start Ray; the processes it started from here. Leaves none behind when it fails."""
    import psutil
    import ray

    here = psutil.Process()
    before = set(here.children())
    # it tells every time that token authentication is on, which is what we want
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=logical_cpus(cores()),
                include_dashboard=not lean,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except BaseException as error:
            with _uninterrupted():
                _shutdown([child for child in here.children() if child not in before])
            if not isinstance(error, Exception):
                raise
            if attempt == START_ATTEMPTS:
                raise ClusterError(
                    f"Ray did not start in {START_ATTEMPTS} attempts ({_first_line(error)}): the machine may be short "
                    "of memory or busy with other work; its logs are in /tmp/ray/session_latest/logs"
                ) from error
            log.warning("Ray did not start (%s), trying once more", _first_line(error))
        else:
            _arm_sigterm()  # ray.init has put its own handler there
            _quiet_console()
            return [child for child in here.children() if child not in before]
    raise AssertionError("unreachable")


def _shutdown(roots: list[psutil.Process]) -> None:
    """Shut Ray down and see to it that every process below `roots` is gone."""
    processes = _process_tree(roots)
    try:
        _shutdown_ray()
    finally:
        terminate(processes | _process_tree(roots))


def _shutdown_ray() -> None:
    """ray.shutdown that also copes with a start that stopped half-way."""
    import ray

    try:
        ray.shutdown(wait_for_processes=True)
    except Exception:
        log.warning("Ray did not shut down by itself; its processes are being ended", exc_info=True)


def _process_tree(roots: list[psutil.Process]) -> set[psutil.Process]:
    """Processes and all that descend from them, as long as they live."""
    import psutil

    processes: set[psutil.Process] = set()
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes |= {root, *root.children(recursive=True)}
    return processes


def terminate(processes: set[psutil.Process]) -> None:
    """Wait for processes to end; ask those that do not (SIGTERM), then force them (SIGKILL)."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=SHUTDOWN_TIMEOUT)
    for act in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)
        _, alive = psutil.wait_procs(alive, timeout=SHUTDOWN_TIMEOUT)
    if alive:
        log.error("these processes of Ray could not be ended: %s", ", ".join(str(process.pid) for process in alive))


def _session_folder() -> Path | None:
    """The folder of the running cluster's files."""
    import ray

    node = ray._private.worker._global_node
    return Path(node.get_session_dir_path()) if node else None


def _keep_logs(session: Path | None, logs: Path | None) -> None:
    """Move a finished session's logs to a folder of the user's and drop the rest of it (sockets, spilled objects)."""
    if session is None or logs is None or not session.is_dir():
        return
    try:
        shutil.copytree(session / "logs", logs / session.name, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        log.warning("the logs of Ray stay in %s: %s", session / "logs", _first_line(error))
    else:
        shutil.rmtree(session, ignore_errors=True)


def _quiet_console() -> None:
    """Ray Data's notes on every dataset go to its log file; the terminal gets warnings."""
    importlib.import_module("ray.data")  # sets its loggers up when it is imported

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the length of a block. What the user has set himself stays."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _arm_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block like an exception, so that its `finally` clauses run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    _arm_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Impatient second and third Ctrl-C do not stop the clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
