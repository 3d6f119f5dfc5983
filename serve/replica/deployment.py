"""The Ray Serve deployment whose replicas each have an engine in a process of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from calumma.model import load
from calumma.serve.protocol import EventBatch, GenerationRequest
from calumma.serve.replica.engine.process import EngineProcess
from calumma.serve.replica.image_coder import warm_up
from calumma.serve.replica.memory import fitting
from calumma.serve.replica.model_loading import device_and_dtype, without_weights
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.replica.tensor_parallel import WorkerGroup
from calumma.serve.settings import ModelSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


DRAIN_SECONDS = 10.0  # most time for the streams of a failed engine to report the failure
FLUSH_SECONDS = 0.5  # until what they reported has left this process


class EngineDeployment(EngineReplica):
    """An `EngineReplica` as Ray Serve makes it, of the model directory at `source` (a path or s3://…)."""

    def __init__(self, settings: ModelSettings, source: str, image_coders: DeploymentHandle | None = None) -> None:
        from ray import serve

        from calumma.platform.cluster import capacity
        from calumma.platform.tracking import registry
        from calumma.serve.replica.image_coder import RemoteImageCoder

        processes = settings.min_replicas * settings.tensor_parallel
        threads = settings.threads or max(1, capacity.cores() // processes)
        torch.set_num_threads(threads)
        self._workers: WorkerGroup | None = None
        with registry.resolve_model(source, settings.tracking) as directory:
            settings = fitting(settings, directory)
            coded_here = image_coders is None
            device = device_and_dtype(settings)[0] if coded_here else "cpu"
            read, model = partial(without_weights, context=settings.context), None
            if device != "cpu":  # first, for the engine then fills what is left of the device
                model = load(directory, device, read=read)
                warm_up(model.image_tokenizer)
            if settings.tensor_parallel == 1:
                engine = EngineProcess(settings, directory, threads)
            else:
                self._workers = WorkerGroup(settings, directory, threads)
                group = self._workers
                engine = EngineProcess(settings, directory, threads, group.rendezvous, group.explain, group.stopped)
                self._workers.watch(engine.fail)
            try:
                model = model or load(directory, device, read=read)
                engine.wait_ready()
            except Exception as error:
                engine.fail(error)
                if self._workers is not None:
                    self._workers.kill()
                raise
        coder = None if image_coders is None else RemoteImageCoder(image_coders)
        super().__init__(
            model,
            settings.max_sequences,
            settings.max_queued,
            coder,
            engine,
            device_and_dtype(settings)[0],
            settings.max_queued_per_key,
            settings.max_queued_tokens,
        )
        self._name = serve.get_replica_context().replica_id.unique_id
        self._streams = 0
        threading.Thread(target=self._exit_after, args=(engine,), daemon=True).start()

    async def generate_batches(self, request: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
        self._streams += 1
        name: str | None = self._name
        try:
            async with aclosing(super().generate_batches(request)) as batches:
                async for batch in batches:
                    yield replace(batch, replica=name) if name else batch
                    name = None
        finally:
            self._streams -= 1

    def _exit_after(self, engine: EngineProcess) -> None:
        """End this process when the engine has failed and its streams have reported it: Ray Serve replaces a lost
        replica at once, but an unhealthy one only after three checks, and would send it requests meanwhile."""
        if engine.wait_ended() is None:
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._streams and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(FLUSH_SECONDS)
        os._exit(1)

    def close(self) -> None:
        super().close()
        if self._workers is not None:
            if self.engine.failure is None:
                self._workers.close()
            else:
                self._workers.kill()

    def __del__(self) -> None:
        """Called by Ray Serve when the replica has drained."""
        if hasattr(self, "engine"):
            self.close()
