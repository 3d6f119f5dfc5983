"""The engine in a process of its own, and its replica's end of the line.

Every operation of PyTorch lets go of the interpreter's lock and has to get it back. Beside an event loop that serves
clients the engine waits for it between all its operations; so, as in vLLM, it has an interpreter to itself. The two
talk through a pair of sockets; when either is lost, the other end closes: the engine's process ends, or the replica's
streams do.
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
CLOSE_TIMEOUT = 60.0  # seconds that the engine's process has to end when it is told to


class EngineProcess:
    """A `Loop` in a process of its own. Requests have ids that no other ever had."""

    def __init__(
        self,
        settings: ModelSettings,
        directory: str | Path,
        threads: int,
        meeting: Rendezvous | None = None,
        explain: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        """Begin to start it. explain: called with what stopped the engine, gives the cause."""
        self._max_sequences, self._explain = settings.max_sequences, explain
        self.failure: Exception | None = None
        self._posts: dict[str, OnOutput] = {}
        self._statistics: dict[str, float] = {}
        self._lock = threading.Lock()  # of who waits for an answer, and whether there will be any
        self._closed = False
        self._ready = threading.Event()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._line = Connection(ours.detach())
        # What is to be sent: a socket that is full, or an engine that is slow to listen, holds up no client.
        self._outgoing: queue.SimpleQueue[Start | Submit | Abort | Close | None] = queue.SimpleQueue()
        self._outgoing.put(Start(settings, str(directory), threads, meeting))
        self._threads = [
            threading.Thread(target=work, name=f"engine, {name}", daemon=True)
            for name, work in (("sending", self._send), ("listening", self._listen))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def started(self) -> None:
        """Wait until the engine has its model. Raises RuntimeError that says why it does not come up."""
        self._ready.wait()
        if self.failure is not None or self._closed:
            raise RuntimeError(f"the engine did not start: {self.failure or 'it was closed'}") from self.failure

    def ended(self) -> Exception | None:
        """Wait for its end, when all who waited for answers are told: what failed, or None where it was closed."""
        self._threads[1].join()
        return self.failure

    @property
    def running(self) -> int:
        return len(self._posts)

    @property
    def waiting(self) -> int:
        """As many as the engine says, or as there must be: it says so a moment later."""
        return max(int(self._statistics.get("requests_waiting", 0)), self.running - self._max_sequences)

    def statistics(self) -> dict[str, float]:
        return dict(self._statistics)

    def submit(self, request: Request, job: GenerationRequest, post: OnOutput) -> None:
        with self._lock:
            closed, known = self._closed, request.id in self._posts
            if not closed and not known:
                self._posts[request.id] = post
                self._outgoing.put(Submit(request, replace(job, prompt=())))
        if closed:
            post(engine_ended(self.failure))
        elif known:
            post(RequestFailed(400, f"a request with the id {request.id!r} is being answered"))

    def abandon(self, request_id: str) -> None:
        with self._lock:
            if self._posts.pop(request_id, None) is not None:
                self._outgoing.put(Abort(request_id))

    def fail(self, error: Exception) -> None:
        """Called when the engine cannot go on, whatever it does: what it works on is refused."""
        self.failure = self.failure or error
        self._process.kill()
        self._end()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._outgoing.put(Close())
        if not self._ready.is_set():  # it does not listen yet
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
        self._line.close()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # its end is noticed by who listens
            while (message := self._outgoing.get()) is not None:
                self._line.send(message)

    def _listen(self) -> None:
        """Post what the engine's process says, to its end."""
        try:
            error = self._heard()
            if error is not None and self.failure is None:
                self.failure = self._explain(error)
        except Exception as error:
            log.exception("what the engine's process says cannot be understood")
            self._process.kill()
            self.failure = self.failure or error
        finally:
            with self._lock:
                self._closed = True
                left, self._posts = list(self._posts.values()), {}
            for post in left:
                post(engine_ended(self.failure))
            self._ready.set()

    def _heard(self) -> Exception | None:
        """Why the engine's process has ended; None where it was told to."""
        said: EngineFailed | None = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                match self._line.recv():
                    case Ready():
                        self._ready.set()
                    case Outputs(parts, statistics):
                        self._statistics = statistics
                        for request_id, part in parts:
                            self._post(request_id, part)
                    case EngineFailed() as said:
                        log.error("the engine stopped: %s", said.why)
        code = self._process.wait()
        if said is not None:
            return RuntimeError(said.why)
        return None if self._closed else RuntimeError(f"its process ended with code {code}")

    def _post(self, request_id: str, part: EngineOutput) -> None:
        last = isinstance(part, Finished | RequestFailed)
        post = self._posts.pop(request_id, None) if last else self._posts.get(request_id)
        if post is not None:
            post(part)
