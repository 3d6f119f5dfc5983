"""The engine in a process of its own, as its replica sees it.

Every operation of PyTorch releases the interpreter's lock and has to get it back. Beside an event loop that serves
clients the engine would wait for it between all its operations; so, as in vLLM, it has an interpreter to itself. The
two exchange messages through a pair of sockets; when either process is lost, the other notices: the engine's process
ends, or the replica's streams do. One that hangs is ended, too.

Requests that may have been in a step that failed are told so: they must not reach another engine, to which they could
do the same. All others another replica goes on with.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from calumma.model.generation import Request
from calumma.serve.protocol import Finished, GenerationRequest, RequestFailed
from calumma.serve.replica.engine.client import EngineOutput, OnOutput, engine_ended
from calumma.serve.replica.engine.messages import Abort, Close, EngineFailed, Outputs, Ready, Start, Submit
from calumma.serve.replica.engine.watchdog import StackFile, StallDetector, StepCounter
from calumma.serve.replica.processes import SIGNALLED, STOPPED, EngineLost, ended_from_outside, process_state
from calumma.serve.replica.tensor_parallel import Rendezvous
from calumma.serve.settings import ModelSettings

log = logging.getLogger(__name__)

MODULE = "calumma.serve.replica.engine.main"
CLOSE_TIMEOUT = 60.0  # seconds until an engine's process that was told to end is killed
LOSS_SECONDS = 0.5  # until the end of a process is known after that of another which it caused
LOOK_SECONDS = 0.25  # between looks at its progress
STOPPED_SECONDS = (
    0.75  # that a process may be stopped by a signal while it has work: nothing of that kind is a long step
)


@dataclass(frozen=True)
class _Submitted:
    """A request at the engine. first_step: the earliest that it may be in, counted from 1."""

    on_output: OnOutput
    first_step: int


class EngineProcess:
    """An `EngineClient` with the engine in a process of its own. Ids of requests are never used again."""

    def __init__(
        self,
        settings: ModelSettings,
        directory: str | Path,
        threads: int,
        rendezvous: Rendezvous | None = None,
        explain: Callable[[Exception], Exception] = lambda error: error,
        stopped: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Start the process, without waiting for it. explain: called with what stopped the engine, gives the cause.
        stopped: names another process of the engine that a signal has stopped, where there is one."""
        self._max_sequences, self._explain, self._stopped = settings.max_sequences, explain, stopped
        self.failure: Exception | None = None
        self._requests: dict[str, _Submitted] = {}  # by id
        self._statistics: dict[str, float] = {}
        self._unheard = False  # nothing has come since something was sent
        self._failing: frozenset[str] | None = None  # who was in the step that failed, where the engine knows
        self._lock = threading.Lock()  # of _requests and _closed
        self._ending = threading.Lock()  # one at a time closes the connection: its number may be another's after that
        self._closed = False
        self._ready, self._ended = threading.Event(), threading.Event()
        self._stall, self._stacks = StallDetector(settings.stall_seconds), StackFile()
        steps = StepCounter.new_descriptor()
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno(), steps, self._stacks.descriptor]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, *map(str, descriptors)], pass_fds=descriptors
            )
        self._steps = StepCounter(steps)
        os.close(steps)
        self._connection = Connection(ours.detach())
        # Sent by a thread: a socket that is full, or an engine that is slow to receive, holds up no client.
        self._outgoing: queue.SimpleQueue[Start | Submit | Abort | Close | None] = queue.SimpleQueue()
        self._outgoing.put(Start(settings, str(directory), threads, rendezvous))
        self._threads = [
            threading.Thread(target=work, name=f"engine, {name}", daemon=True)
            for name, work in (("sending", self._send), ("receiving", self._receive))
        ]
        for thread in self._threads:
            thread.start()
        threading.Thread(target=self._watch, name="engine, watching", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the engine has its model. Raises RuntimeError that says why it does not start."""
        self._ready.wait()
        if self.failure is not None or self._closed:
            raise RuntimeError(f"the engine did not start: {self.failure or 'it was closed'}") from self.failure

    def wait_ended(self) -> Exception | None:
        """Wait for its end, when all running requests have failed: what went wrong, or None where it was closed."""
        self._threads[1].join()
        return self.failure

    @property
    def running(self) -> int:
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """As many as the engine reported, or as there must be: it reports a moment later."""
        return max(int(self._statistics.get("requests_waiting", 0)), self.running - self._max_sequences)

    def statistics(self) -> dict[str, float]:
        return dict(self._statistics)

    def submit(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        with self._lock:
            closed, known = self._closed, engine_request.id in self._requests
            if not closed and not known:
                next_step = self._steps.value + 1
                first_step = next_step + 1 if self._stall.late else next_step  # one that is under way is without it
                self._requests[engine_request.id] = _Submitted(on_output, first_step)
                self._put(Submit(engine_request, replace(request, prompt=())))
        if closed:
            on_output(engine_ended(self.failure, in_step=False))
        elif known:
            on_output(RequestFailed(400, f"a request with the id {engine_request.id!r} is being answered"))

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self._requests.pop(request_id, None) is not None:
                self._put(Abort(request_id))

    def _put(self, message: Submit | Abort) -> None:
        self._unheard = True
        self._outgoing.put(message)

    def fail(self, error: Exception) -> None:
        """End an engine that cannot go on, whatever it does: its running requests fail."""
        if not isinstance(error, EngineLost):
            with contextlib.suppress(subprocess.TimeoutExpired):  # its loss may be the cause of the error elsewhere
                error = ended_from_outside(self._process.wait(LOSS_SECONDS)) or error
        self.failure = self.failure or error
        self._process.kill()
        self._end()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._outgoing.put(Close())
        if not self._ready.is_set():  # it does not receive yet
            self._process.kill()
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._end()

    def _end(self) -> None:
        """Once its process ends, or has."""
        self._process.wait()
        self._ended.set()
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join()
        with self._ending:
            self._connection.close()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the receiving thread notices its end
            while (message := self._outgoing.get()) is not None:
                self._connection.send(message)

    def _receive(self) -> None:
        """Report what the engine's process sends, until its end."""
        try:
            error = self._dispatch_until_end()
            if error is not None and self.failure is None:
                self.failure = error if isinstance(error, EngineLost) else self._explain(error)
        except Exception as error:
            log.exception("a message of the engine's process cannot be read")
            self._process.kill()
            self.failure = self.failure or error
        finally:
            with self._lock:
                self._closed = True
                left, self._requests = self._requests, {}
            for request_id, request in left.items():
                request.on_output(engine_ended(self.failure, self._was_in_step(request_id, request)))
            self._ended.set()
            self._ready.set()

    def _was_in_step(self, request_id: str, request: _Submitted) -> bool:
        """Whether a request may have been in the last step."""
        if self._failing is not None:
            return request_id in self._failing
        return request.first_step <= self._steps.value + 1

    def _dispatch_until_end(self) -> Exception | None:
        """Why the engine's process has ended; None where it was told to."""
        reported: EngineFailed | None = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                message = self._connection.recv()
                self._unheard = False
                match message:
                    case Ready():
                        self._ready.set()
                    case Outputs(outputs, statistics):
                        self._statistics = statistics
                        for request_id, output in outputs:
                            self._dispatch(request_id, output)
                    case EngineFailed() as reported:
                        log.error("the engine stopped: %s", reported.reason)
        code = self._process.wait()
        if reported is not None:
            self._failing = None if reported.request_ids is None else frozenset(reported.request_ids)
            return RuntimeError(reported.reason)
        if self._closed:
            return None
        return ended_from_outside(code) or RuntimeError(f"its process ended with code {code}")

    def _dispatch(self, request_id: str, output: EngineOutput) -> None:
        last = isinstance(output, Finished | RequestFailed)
        request = self._requests.pop(request_id, None) if last else self._requests.get(request_id)
        if request is not None:
            request.on_output(output)

    def _watch(self) -> None:
        """End an engine that has work and finishes no step, at once where a signal has stopped its process."""
        looked, since = time.monotonic(), None
        while not self._ended.wait(LOOK_SECONDS):
            before, looked = looked, time.monotonic()
            busy = any(self._statistics.get(name) for name in ("requests_running", "requests_waiting"))
            pending = self._ready.is_set() and (bool(self._requests) or self._unheard or busy)
            stalled = self._stall.look(self._steps.value, pending, looked - before)
            watched = self._stall.limit is not None and self._stall.seconds > 0
            stopped = watched and process_state(self.pid) == SIGNALLED
            since = (since or looked) if stopped else None
            if stalled or (since is not None and looked - since >= STOPPED_SECONDS):
                self.fail(self._stalled())
                return

    def _stalled(self) -> Exception:
        """Keeps the stacks of an engine that hangs in the log, and says what it does."""
        state = process_state(self.pid)
        stopped = f"its process was stopped by a signal ({state})" if state in STOPPED else self._stopped()
        stacks = "" if state in STOPPED or state == "gone" else self._stacks.ask(self.pid)
        message = f"it had work and finished no step in {self._stall.seconds:.1f} s"
        log.error(
            "the engine hangs: %s; %s. Its %d requests: %s. The stacks of its threads:\n%s",
            message,
            stopped or f"the state of its process: {state}",
            len(self._requests),
            ", ".join(list(self._requests)) or "none",
            stacks or "(none: a process that is stopped cannot tell them)",
        )
        return EngineLost(f"{message}: {stopped}") if stopped else RuntimeError(message)
