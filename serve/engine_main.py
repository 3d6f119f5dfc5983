"""The engine's process: `python -m calumma.serve.engine_main DESCRIPTOR`, started by engine_process.py."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from calumma.model.config import ImageTokenizerConfig
from calumma.model.directory import IMAGE_TOKENIZER, read_transformer
from calumma.model.generation import Request
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.engine_process import Abandon, Close, Failed, News, Ready, Start, Submit
from calumma.serve.loop import EngineLoop, Part, Post
from calumma.serve.pieces import Drawing, Job, Refused, TextPiece
from calumma.serve.ranks import all_here, join, precision, read_own

log = logging.getLogger(__name__)

TOGETHER = 0.02  # seconds within which what is not urgent travels together
FRESH = 0.5  # seconds after which the engine's numbers are told again


@dataclass(frozen=True)
class Held:
    """What of a model the engine's process holds."""

    transformer: Transformer
    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    image_length: int


class Outbox:
    """Parts of all answers on their way. What is urgent, or the first of an answer, goes at the end of its step, the
    rest with it or at the end of the first step after `TOGETHER`. For any thread."""

    def __init__(self, line: Connection) -> None:
        self._line = line
        self._parts: list[tuple[str, Part]] = []
        self._begun: set[str] = set()
        self._urgent = False
        self._sent = 0.0
        self._lock = threading.Lock()

    def box(self, request_id: str) -> Post:
        """Where the parts of an answer are posted."""

        def post(part: Part) -> None:
            with self._lock:
                self._parts.append((request_id, part))
                if not isinstance(part, TextPiece | Drawing):
                    self._urgent = True
                elif request_id not in self._begun:
                    self._urgent = True
                    self._begun.add(request_id)

        return post

    def send(self, statistics: Callable[[], dict[str, float]], idle: bool) -> None:
        """What is to be sent by now."""
        with self._lock:
            since = time.monotonic() - self._sent
            if self._urgent or idle or since > FRESH or (self._parts and since > TOGETHER):
                parts, self._parts, self._urgent = self._parts, [], False
                self._sent += since
                self._line.send(News(parts, statistics()))
            if idle:
                self._begun.clear()

    def say(self, word: Ready | Failed) -> None:
        with self._lock:
            self._line.send(word)


def hold(start: Start) -> tuple[Held, dict[str, object]]:
    """The model, of which this process has its part alone where there are others, and what the engine is made with."""
    options = dict(start.settings.engine_options)
    device, dtype = precision(start.settings)
    if start.meeting is None:
        transformer = read_transformer(start.directory, device, dtype).eval()
    else:
        options["shard"] = shard = join(start.meeting, 0, start.settings)
        transformer = read_own(start.directory, shard, start.settings)
        all_here(shard)
    images = ImageTokenizerConfig.read(Path(start.directory) / IMAGE_TOKENIZER)
    vocabulary, tokenizer = Vocabulary.read(start.directory), TextTokenizer.read(start.directory)
    return Held(transformer, vocabulary, tokenizer, images.codes_per_image), options


def run(line: Connection, outbox: Outbox) -> None:
    """The engine's process, from the first word to the last."""
    start: Start = line.recv()
    torch.set_num_threads(start.threads)
    held, options = hold(start)

    def stepped() -> None:
        if loop.failure is not None:  # who is at the other end finds out why, and tells those who wait
            outbox.say(failed(loop.failure))
            os._exit(1)
        outbox.send(loop.statistics, loop.idle)

    def submit(request: Request, job: Job) -> None:
        box = outbox.box(request.id)
        try:
            loop.submit(request, job, box)
        except Exception as error:
            log.exception("a request could not be taken in")
            box(Refused(500, f"the request could not be taken in: {type(error).__name__}"))
        stepped()  # whether it is taken in is told at once, however long a step lasts

    loop = EngineLoop(held, stepped=stepped, **options)  # type: ignore[arg-type]
    outbox.send(loop.statistics, True)
    outbox.say(Ready())
    while True:
        match line.recv():
            case Submit(request, job):
                submit(request, job)
            case Abandon(request_id):
                loop.abandon(request_id)
            case Close():
                loop.close()
                return


def failed(error: Exception) -> Failed:
    return Failed(f"{type(error).__name__}: {error}")


def end_with_replica(descriptor: int) -> None:
    """End when the replica is lost, whatever else is done: it would hold memory that its successor needs."""
    watch = select.poll()
    watch.register(descriptor, select.POLLRDHUP)
    watch.poll()
    os._exit(1)


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the replica's to answer
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.Thread(target=end_with_replica, args=(descriptor,), daemon=True).start()
    line = Connection(descriptor)
    outbox = Outbox(line)
    code = 0
    try:
        run(line, outbox)
    except Exception as error:
        log.exception("the engine's process ends")
        with contextlib.suppress(OSError):
            outbox.say(failed(error))
        code = 1
    logging.shutdown()
    os._exit(code)  # whatever the engine's thread waits for


if __name__ == "__main__":
    main(int(sys.argv[1]))
