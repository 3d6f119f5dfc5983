"""The engine in a process of its own, as its replica sees it.

Every operation of PyTorch releases the interpreter's lock and has to get it back. Beside an event loop that serves
clients the engine would wait for it between all its operations; so, as in vLLM, it has an interpreter to itself. The
two exchange messages through a pair of sockets; when either process is lost, the other notices: the engine's process
ends, or the replica's streams do.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from calumma.model.generation import Request
from calumma.serve.protocol import Finished, GenerationRequest, RequestFailed
from calumma.serve.replica.engine.client import EngineOutput, OnOutput, engine_ended
from calumma.serve.replica.engine.messages import Abort, Close, EngineFailed, Outputs, Ready, Start, Submit
from calumma.serve.replica.tensor_parallel import Rendezvous
from calumma.serve.settings import ModelSettings

log = logging.getLogger(__name__)

MODULE = "calumma.serve.replica.engine.main"
CLOSE_TIMEOUT = 60.0  # seconds until an engine's process that was told to end is killed


class EngineProcess:
    """An `EngineClient` with the engine in a process of its own. Ids of requests are never used again."""

    def __init__(
        self,
        settings: ModelSettings,
        directory: str | Path,
        threads: int,
        rendezvous: Rendezvous | None = None,
        explain: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        """Start the process, without waiting for it. explain: called with what stopped the engine, gives the cause."""
        self._max_sequences, self._explain = settings.max_sequences, explain
        self.failure: Exception | None = None
        self._callbacks: dict[str, OnOutput] = {}  # by request id
        self._statistics: dict[str, float] = {}
        self._lock = threading.Lock()  # of _callbacks and _closed
        self._closed = False
        self._ready = threading.Event()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
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
        return len(self._callbacks)

    @property
    def waiting(self) -> int:
        """As many as the engine reported, or as there must be: it reports a moment later."""
        return max(int(self._statistics.get("requests_waiting", 0)), self.running - self._max_sequences)

    def statistics(self) -> dict[str, float]:
        return dict(self._statistics)

    def submit(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        with self._lock:
            closed, known = self._closed, engine_request.id in self._callbacks
            if not closed and not known:
                self._callbacks[engine_request.id] = on_output
                self._outgoing.put(Submit(engine_request, replace(request, prompt=())))
        if closed:
            on_output(engine_ended(self.failure))
        elif known:
            on_output(RequestFailed(400, f"a request with the id {engine_request.id!r} is being answered"))

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self._callbacks.pop(request_id, None) is not None:
                self._outgoing.put(Abort(request_id))

    def fail(self, error: Exception) -> None:
        """End an engine that cannot go on, whatever it does: its running requests fail."""
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
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join()
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
                self.failure = self._explain(error)
        except Exception as error:
            log.exception("a message of the engine's process cannot be read")
            self._process.kill()
            self.failure = self.failure or error
        finally:
            with self._lock:
                self._closed = True
                left, self._callbacks = list(self._callbacks.values()), {}
            for on_output in left:
                on_output(engine_ended(self.failure))
            self._ready.set()

    def _dispatch_until_end(self) -> Exception | None:
        """Why the engine's process has ended; None where it was told to."""
        reported: EngineFailed | None = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                match self._connection.recv():
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
            return RuntimeError(reported.reason)
        return None if self._closed else RuntimeError(f"its process ended with code {code}")

    def _dispatch(self, request_id: str, output: EngineOutput) -> None:
        last = isinstance(output, Finished | RequestFailed)
        on_output = self._callbacks.pop(request_id, None) if last else self._callbacks.get(request_id)
        if on_output is not None:
            on_output(output)
