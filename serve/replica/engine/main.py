"""The engine's process: `python -m calumma.serve.replica.engine.main SOCKET STEPS STACKS`, three descriptors, started
by process.py."""

from __future__ import annotations

import contextlib
import faulthandler
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
from calumma.model.directory import IMAGE_TOKENIZER
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.protocol import TextDelta
from calumma.serve.replica.engine.client import NOT_URGENT, Answered, EngineOutput, OnOutput, Texts
from calumma.serve.replica.engine.messages import Abort, Close, EngineFailed, Outputs, Ready, Start, Submit
from calumma.serve.replica.engine.thread import EngineThread, requests_in_step
from calumma.serve.replica.engine.watchdog import StepCounter
from calumma.serve.replica.memory import memory_budget
from calumma.serve.replica.model_loading import read_adapters, read_own_weights
from calumma.serve.replica.tensor_parallel import barrier, join_process_group

log = logging.getLogger(__name__)

BATCH_SECONDS = 0.02  # outputs that are not urgent are sent together for so long
STATISTICS_SECONDS = 0.5  # the engine's statistics are sent at least so often


@dataclass(frozen=True)
class LoadedModel:
    """An `EngineModel`: what of a model the engine's process needs."""

    transformer: Transformer
    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    image_length: int


class OutputBatcher:
    """Sends outputs of all requests to the replica, many in a message. What is urgent, or the first of a request, is
    sent at the end of its step, the rest with it or at the end of the first step after BATCH_SECONDS. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outputs: list[tuple[str, EngineOutput]] = []
        self._begun: set[str] = set()
        self._urgent = False
        self._sent = 0.0
        self._lock = threading.Lock()

    def callback(self, request_id: str) -> OnOutput:
        """Takes the outputs of a request."""

        def on_output(output: EngineOutput) -> None:
            with self._lock:
                self._outputs.append((request_id, output))
                if not isinstance(output, NOT_URGENT):
                    self._urgent = True
                elif request_id not in self._begun:
                    self._urgent = True
                    self._begun.add(request_id)

        return on_output

    def flush(self, statistics: Callable[[], dict[str, float]], idle: bool, now: bool = False) -> None:
        """Send what is due; or all `now`, that the replica hears something. idle: the engine has no work, so nothing
        waits for a later step."""
        with self._lock:
            since = time.monotonic() - self._sent
            due = self._urgent or since > STATISTICS_SECONDS or (self._outputs and since > BATCH_SECONDS)
            if due or idle or now:
                outputs, self._outputs, self._urgent = self._outputs, [], False
                self._sent += since
                self._connection.send(Outputs(merged(outputs), statistics()))
            if idle:
                self._begun.clear()

    def send(self, message: Ready | EngineFailed) -> None:
        with self._lock:
            self._connection.send(message)


def merged(outputs: list[tuple[str, EngineOutput]]) -> list[tuple[str, EngineOutput]]:
    """The same in fewer parts: each request's adjacent texts as one, and then the ids that they gave."""
    found: list[tuple[str, EngineOutput]] = []
    texts: dict[str, list[TextDelta]] = {}
    answered: dict[str, list[int]] = {}

    def end(request_id: str) -> None:
        deltas, ids = texts.pop(request_id, []), answered.pop(request_id, [])
        if deltas:
            whole = sum(deltas[1:], deltas[0])
            found.append((request_id, Texts(whole, len(deltas)) if len(deltas) > 1 else whole))
        if ids:
            found.append((request_id, Answered(tuple(ids))))

    for request_id, output in outputs:
        if isinstance(output, TextDelta):
            texts.setdefault(request_id, []).append(output)
        elif isinstance(output, Answered):
            answered.setdefault(request_id, []).extend(output.tokens)
        else:
            end(request_id)
            found.append((request_id, output))
    for request_id in list(texts | answered):
        end(request_id)
    return found


def load_model(start: Start) -> tuple[LoadedModel, dict[str, object]]:
    """The model, or this process's shard of it, and the options of its engine."""
    options = dict(start.settings.engine_options)
    if start.rendezvous is None:
        transformer = read_own_weights(start.directory, start.settings)
    else:
        options["shard"] = shard = join_process_group(start.rendezvous, 0, start.settings)
        transformer = read_own_weights(start.directory, start.settings, shard)
        barrier(shard)
    images = ImageTokenizerConfig.read(Path(start.directory) / IMAGE_TOKENIZER)
    if start.settings.adapters:
        options["adapters"] = read_adapters(start.settings, transformer.config)
    options["memory"] = memory_budget(start.settings, transformer.config, images)
    vocabulary, tokenizer = Vocabulary.read(start.directory), TextTokenizer.read(start.directory)
    return LoadedModel(transformer, vocabulary, tokenizer, images.codes_per_image), options


def run(connection: Connection, batcher: OutputBatcher, steps: StepCounter) -> None:
    """From the first message to the last."""
    start: Start = connection.recv()
    torch.set_num_threads(start.threads)
    model, options = load_model(start)

    def after_step() -> None:
        if engine.failure is not None:  # the replica finds out why, and fails its running requests
            batcher.send(failure(engine.failure, requests_in_step(engine.failure)))
            os._exit(1)
        batcher.flush(engine.statistics, engine.idle)

    def after_every_step() -> None:
        if engine.failure is None:
            steps.add()
        after_step()

    # whether a request is admitted is sent at once, however long a step lasts
    engine = EngineThread(model, after_step=after_every_step, after_submit=after_step, **options)  # type: ignore[arg-type]
    batcher.flush(engine.statistics, True)
    batcher.send(Ready())
    while True:
        match connection.recv():
            case Submit(engine_request, request):
                engine.submit(engine_request, request, batcher.callback(engine_request.id))
            case Abort(request_id):
                engine.abort(request_id)
                batcher.flush(engine.statistics, engine.idle, now=True)
            case Close():
                engine.close()
                return


def failure(error: Exception, request_ids: tuple[str, ...] | None = None) -> EngineFailed:
    return EngineFailed(f"{type(error).__name__}: {error}", request_ids)


def exit_with_replica(descriptor: int) -> None:
    """End this process when its replica is lost, whatever it does: it would hold memory that its successor needs."""
    watch = select.poll()
    watch.register(descriptor, select.POLLRDHUP)
    watch.poll()
    os._exit(1)


def main(descriptor: int, steps: int, stacks: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the replica to handle
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("calumma").setLevel(logging.INFO)
    threading.Thread(target=exit_with_replica, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    batcher = OutputBatcher(connection)
    code = 0
    try:
        run(connection, batcher, StepCounter(steps))
    except Exception as error:
        log.exception("the engine's process ends")
        with contextlib.suppress(OSError):
            batcher.send(failure(error))
        code = 1
    logging.shutdown()
    os._exit(code)  # whatever the engine's thread waits for


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
