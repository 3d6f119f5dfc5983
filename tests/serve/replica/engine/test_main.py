"""The engine's process makes the engine that the settings ask for."""

from __future__ import annotations

from pathlib import Path

from calumma.serve.replica.engine.main import load_model
from calumma.serve.replica.engine.messages import Start
from calumma.serve.replica.engine.thread import EngineThread
from calumma.serve.settings import ModelSettings


def test_a_specification_reaches_the_engine(model_directory: Path) -> None:
    settings = ModelSettings(
        model=str(model_directory), max_sequences=3, cache_tokens=640, speculative=2, cuda_graphs=True
    )
    held, options = load_model(Start(settings, str(model_directory), 1, None))
    loop = EngineThread(held, **options)
    try:
        engine = loop._engine
        assert (engine.max_sequences, engine.statistics.blocks * engine.statistics.block_size) == (3, 640)
        assert engine._runner.window == 2
        assert engine._runner.graphs is not None
    finally:
        loop.close()
