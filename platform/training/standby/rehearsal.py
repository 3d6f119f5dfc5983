"""What a spare process does while it waits: it takes a step of a tiny model and reads a block of data, so that the
first of the real ones, should it take a lost worker's place, find everything imported and looked up; and it asks the
tracking server for its run. A process that has only imported torch, DeepSpeed, Ray Data and MLflow spends seconds on
what these import when they are first used."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from calumma.model.config import ModelConfig
from calumma.model.vocabulary import Vocabulary
from calumma.platform.tracking.server import database_file
from calumma.platform.training.specification import TrainSpecification

if TYPE_CHECKING:
    from calumma.platform.tracking.run import Run

logger = logging.getLogger(__name__)
_CONTEXT = 16
# Seconds that a server gets to answer, for a spare is no less ready where it is away; and a database file, which may be
# locked.
_PATIENCE, _FILE_PATIENCE = 5.0, 60.0


def rehearse(spec: TrainSpecification, vocabulary: Vocabulary, run: Run) -> None:
    """On a Ray cluster."""
    rehearse_step(spec, vocabulary)
    rehearse_reading()
    rehearse_tracking(run)


def rehearse_step(spec: TrainSpecification, vocabulary: Vocabulary) -> None:
    """Build an engine as the specification asks for, take a step and copy the state, in a group of this process alone
    that is left again."""
    import torch
    import torch.distributed as dist

    from calumma.platform.streaming.tensors import MicroBatchTensors
    from calumma.platform.training.construction import build
    from calumma.platform.training.construction.sources import SeededWeights
    from calumma.platform.training.standby.copies import Copies
    from calumma.platform.training.standby.keeper import Keeper
    from calumma.platform.training.standby.leaving import release_group
    from calumma.platform.training.steps import engine

    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        os.environ.setdefault(name, str(value))  # Ray Train has the last word
    torch.set_num_threads(1)
    spec = spec.model_copy(update={"micro_batches": 1, "sequence_parallel": 1, "lora": None, "trainable": None})
    shape: dict[str, Any] = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ffn_width": 32, "dropout": 0.1}
    config = ModelConfig(context=_CONTEXT, vocabulary_size=vocabulary.size, **shape)
    keeper, here = Keeper("rehearsal"), torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        described = build.describe(config, spec, vocabulary)
        run = build.initialize(described, spec, 1, here, 1)
        build.fill(run, SeededWeights(config, 0, here))
        tokens = torch.zeros(1, _CONTEXT + 1, dtype=torch.long)
        batch = MicroBatchTensors(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens))
        image_mask_V = vocabulary.mask(vocabulary.image_ids)
        counts = engine.count_tokens([batch], image_mask_V, run.device)
        engine.step(run, [batch], counts, image_mask_V, spec.z_loss, 1, (0, 0), measure=True)
        engine.gradient_norm(run)
        Copies(lambda: [keeper], every=1, first=0).after_step(run, 1, {})
        engine.release(run)
    finally:
        keeper.close()
        release_group()


def rehearse_reading() -> None:
    """Read a block through Ray Data, as a worker reads."""
    import pyarrow
    import ray.data

    blocks: Any = ray.data.from_arrow(pyarrow.table({"tokens": [0]})).iterator()
    list(blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))


def rehearse_tracking(run: Run) -> None:
    """Open the store that metrics go to: what MLflow imports for one in a database takes seconds, and the thread that
    writes metrics would do it beside the first step, whose every operation then waits for the interpreter's lock. A
    database file that this host does not have is not made."""
    file = database_file(run.uri)
    if file is not None and not file.exists():
        return

    def ask() -> None:
        try:
            run.latest()
        except Exception as error:  # a server that is away is met by the outbox
            logger.info("the tracking server could not be asked: %s", error)

    asking = threading.Thread(target=ask, name="rehearsal", daemon=True)
    asking.start()
    asking.join(_PATIENCE if file is None else _FILE_PATIENCE)
