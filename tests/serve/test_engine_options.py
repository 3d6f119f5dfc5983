"""The engine of a replica is as its specification says."""

from __future__ import annotations

from pathlib import Path

import torch

from calumma.serve.replica import Replica
from calumma.serve.settings import ModelSettings


def test_a_specification_reaches_the_engine(model_directory: Path) -> None:
    threads = torch.get_num_threads()
    settings = ModelSettings(
        model=str(model_directory), threads=threads, max_sequences=3, cache_tokens=640, speculative=2, cuda_graphs=True
    )
    replica = Replica(settings, settings.model)
    try:
        engine = replica.loop._engine
        assert (engine.max_sequences, engine.statistics.blocks * engine.statistics.block_size) == (3, 640)
        assert engine._runner.window == 2
        assert engine._runner.graphs is not None
    finally:
        replica.close()
