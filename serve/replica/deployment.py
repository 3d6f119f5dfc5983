"""The Ray Serve deployment of an engine replica."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import torch

from calumma.model import load
from calumma.serve.protocol import GenerationRequest, OutputEvent
from calumma.serve.replica.engine.process import EngineProcess
from calumma.serve.replica.model_loading import device_and_dtype, without_weights
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.replica.tensor_parallel import WorkerGroup
from calumma.serve.settings import ModelSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


DRAIN_SECONDS = 10.0  # seconds, at most, until the streams of an engine that failed have said so
FLUSH_SECONDS = 0.5  # seconds until what they said is on its way


class EngineDeployment(EngineReplica):
    """The Ray Serve deployment: an engine, in a process of its own, for the model directory at `source` (a path or
    s3://…)."""

    def __init__(self, settings: ModelSettings, source: str, coders: DeploymentHandle | None = None) -> None:
        from calumma.platform import cluster, tracking
        from calumma.serve.replica.image_coder import RemoteImageCoder

        processes = settings.min_replicas * settings.tensor_parallel
        threads = settings.threads or max(1, cluster.cores() // processes)
        torch.set_num_threads(threads)
        self._ranks: WorkerGroup | None = None
        with tracking.resolve_model(source, settings.tracking) as directory:
            if settings.tensor_parallel == 1:
                engine = EngineProcess(settings, directory, threads)
            else:
                self._ranks = WorkerGroup(settings, directory, threads)
                engine = EngineProcess(settings, directory, threads, self._ranks.meeting, self._ranks.cause)
                self._ranks.watch(engine.fail)
            try:
                model = load(directory, device_and_dtype(settings)[0], read=without_weights)
                engine.started()
            except Exception as error:
                engine.fail(error)
                if self._ranks is not None:
                    self._ranks.abandon()
                raise
        coder = None if coders is None else RemoteImageCoder(coders)
        super().__init__(
            model, settings.max_sequences, settings.max_queued, coder, engine, device_and_dtype(settings)[0]
        )
        self._streams = 0
        threading.Thread(target=self._end_with, args=(engine,), daemon=True).start()

    async def batches(self, job: GenerationRequest) -> AsyncGenerator[list[OutputEvent], None]:
        self._streams += 1
        try:
            async with aclosing(super().batches(job)) as batches:
                async for pieces in batches:
                    yield pieces
        finally:
            self._streams -= 1

    def _end_with(self, engine: EngineProcess) -> None:
        """End when the engine has failed and its streams are told: Ray Serve replaces what is gone at once, but would
        look three times at what is not well, and send it requests meanwhile."""
        if engine.ended() is None:
            return
        end = time.monotonic() + DRAIN_SECONDS
        while self._streams and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(FLUSH_SECONDS)
        os._exit(1)

    def close(self) -> None:
        super().close()
        if self._ranks is not None:
            if self.loop.failure is None:
                self._ranks.close()
            else:
                self._ranks.abandon()

    def __del__(self) -> None:
        """Called by Ray Serve when the replica has answered what it had begun."""
        if hasattr(self, "loop"):
            self.close()

    async def statistics(self) -> dict[str, dict[str, float]]:
        from ray import serve

        return {serve.get_replica_context().replica_id.unique_id: self.loop.statistics()}
