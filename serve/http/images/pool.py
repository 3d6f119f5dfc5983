"""Clients' images are decoded in processes of their own: few, at a low priority, each with a limit on its memory and on
the time of a request's images. Texts never wait for them, and a process that hangs or dies costs its request alone.

Requests wait in line by tenant, and the tenants take turns.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Literal

from PIL import Image as PILImage

from calumma.serve.http.images.turns import FairThreads

log = logging.getLogger(__name__)

MODULE = "calumma.serve.http.images.worker"
START_SECONDS = 120.0  # a process that is not ready by then is given up
BASE_MEMORY = 768 * 2**20  # address space of Python and its libraries
BYTES_A_PIXEL = 24  # of an image with transparency while it is put on white


@dataclass(frozen=True)
class EncodedImage:
    """A file, or what stands in a data URL behind the comma; and how it fits into a square."""

    data: bytes | str
    fit: Literal["crop", "pad"] = "pad"


class ImageRefused(Exception):
    """An image that is not taken; `index` among those of the request. code: of the error; None: the server's fault."""

    def __init__(self, index: int, code: str | None, why: str) -> None:
        super().__init__(why)
        self.index, self.code = index, code


class ImagePool:
    """workers: processes, started when they are first needed. seconds: for the images of one request. pixels,
    pixels_in_all: of an image, and of those of one request."""

    def __init__(self, workers: int, seconds: float, pixels: int, pixels_in_all: int) -> None:
        self._seconds, self._pixels, self._pixels_in_all = seconds, pixels, pixels_in_all
        self._threads = FairThreads(workers, "images")
        self._lock = threading.Lock()  # of the two below
        self._closed = False
        self._idle: list[_Worker] = []

    async def squares(
        self, images: Sequence[EncodedImage], resolution: int | None, tenant: str
    ) -> list[PILImage.Image]:
        """The images of a request, upright RGB, fitted into squares of `resolution` pixels as the model sees them;
        None: they are only seen to be images. Raises ImageRefused."""
        return await self._threads.run(tenant, partial(self._run, images, resolution))

    def close(self) -> None:
        self._threads.close()
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for worker in idle:
            worker.end()

    def _run(self, images: Sequence[EncodedImage], resolution: int | None) -> list[PILImage.Image]:
        job = {
            "base64": [isinstance(image.data, str) for image in images],
            "fits": [image.fit for image in images],
            "pixels": self._pixels,
            "pixels_in_all": self._pixels_in_all,
            "resolution": resolution,
        }
        try:
            worker = self._next()
        except Exception as error:
            log.exception("no process that decodes images starts")
            raise ImageRefused(0, None, "images cannot be decoded now; try again") from error
        try:
            found = worker.ask(job, [_bytes(image) for image in images], self._seconds, resolution or 1)
        except ImageRefused:
            self._keep(worker)
            raise
        except TimeoutError:
            self._end(worker)
            why = f"the images were not decoded in {self._seconds:g} s, the most that one request gets here"
            raise ImageRefused(0, "image_too_large", why) from None
        except Exception as error:
            self._end(worker)
            log.warning("a process that decodes images was lost: %r", error)
            raise ImageRefused(0, "invalid_image", "decoding the image broke the decoder; it cannot be read") from error
        self._keep(worker)
        return found

    def _next(self) -> _Worker:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None and worker.alive:
            return worker
        self._end(worker)
        return _Worker(BASE_MEMORY + BYTES_A_PIXEL * self._pixels)

    def _keep(self, worker: _Worker | None) -> None:
        with self._lock:
            if worker is not None and not self._closed:
                self._idle.append(worker)
                return
        self._end(worker)

    def _end(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.end()


class _Worker:
    """A process, and the way to it. Not thread-safe."""

    def __init__(self, memory: int) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(memory)],
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        self._connection = Connection(ours.detach())
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        try:
            self._connection.recv_bytes()  # it has imported what it needs
        except BaseException:
            self.end()
            raise
        finally:
            timer.cancel()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, job: dict[str, object], payloads: list[bytes], seconds: float, side: int) -> list[PILImage.Image]:
        """Raises ImageRefused, TimeoutError, and what a lost process causes."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        late = False
        try:
            self._connection.send_bytes(json.dumps(job).encode())
            for payload in payloads:
                self._connection.send_bytes(payload)
            answer = json.loads(self._connection.recv_bytes(2**20))
            if "refused" in answer:
                raise ImageRefused(int(answer["refused"]), str(answer["code"]), str(answer["why"]))
            return [
                PILImage.frombytes("RGB", (side, side), self._connection.recv_bytes(3 * side * side))
                for _ in answer["sizes"]
            ]
        except (EOFError, OSError):
            late = not timer.is_alive()
            if late:
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()
        self._process.kill()
        self._process.wait()


def _bytes(image: EncodedImage) -> bytes:
    return image.data.encode("ascii", "replace") if isinstance(image.data, str) else image.data
