"""Host memory and storage of a group that starts: what each worker holds, reads, and needs on the way.

    python benchmarks/construction.py                 300 million parameters, 4 workers, ZeRO 3, on CPUs
    python benchmarks/construction.py --workers 2 --layers 4 --width 256

Each worker's peak is that of its own process from its imports on, over its part of the training state: weights, float32
masters and gradients, and from a checkpoint the optimizer's moments. Three starts: from a seed (and a checkpoint is
written), from that checkpoint at the same size, from it with a worker less.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.training.checkpoints import catalog, resumption, saver
from calumma.platform.training.construction import build, heap
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine
from calumma.platform.training.steps.held_out import HeldOutBatch

CODES = 64
TARGET = 1.3  # times its part, that a worker may need at its peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3), help="of ZeRO")
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    given = parser.parse_args()
    shape = ModelConfig(
        layers=given.layers,
        width=given.width,
        heads=given.width // 64,
        kv_heads=given.width // 64,
        ffn_width=given.width * 11 // 4,
        context=64,
        vocabulary_size=16_384,
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(shape).parameters())
    print(f"{parameters / 1e6:.0f} million parameters, ZeRO {given.stage}, {given.precision}")
    with tempfile.TemporaryDirectory(prefix="calumma-construction-") as folder:
        starts = [("seed", given.workers), ("checkpoint", given.workers), ("checkpoint", max(1, given.workers - 1))]
        for number, (source, world) in enumerate(starts):
            settings = (world, shape.model_dump(), given.stage, given.precision, source, folder, number)
            torch.multiprocessing.spawn(start, settings, nprocs=world)
            found = [json.loads(Path(folder, f"{number}-{rank}.json").read_text()) for rank in range(world)]
            report(parameters, world, given.stage, given.precision, source, found)


def start(
    rank: int, world: int, shape: dict[str, Any], stage: int, precision: str, source: str, folder: str, number: int
) -> None:
    """One worker: build the engine, fill it, and, from the seed, take a step and write a checkpoint."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    import deepspeed  # noqa: F401 -- the first of its imports are not what is measured

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{number}", rank=rank, world_size=world
    )
    config = ModelConfig.model_validate(shape)
    spec = PretrainSpecification.model_validate(
        {
            "storage": folder,
            "mixture": {"tokens": 1.0},
            "output": f"{folder}/stage",
            "model": {key: value for key, value in shape.items() if key != "vocabulary_size"},
            "steps": 10,
            "micro_batches": world,
            "precision": precision,
            "zero_stage": stage,
        }
    )
    codes = list(range(config.vocabulary_size - CODES, config.vocabulary_size))
    names = ("pad", "bos", "eos", "unknown", "begin_image", "end_image", "end_turn")
    vocabulary = Vocabulary(
        size=config.vocabulary_size, image_codes=codes, **{name: number for number, name in enumerate(names)}
    )
    # What libraries load and allocate once, whatever the model's size, is not what is measured.
    small = config.model_copy(update={"layers": 1, "width": 64, "heads": 1, "kv_heads": 1, "ffn_width": 64})
    warm_up = build.describe(small, spec, vocabulary)
    engine_of_small = build.initialize(warm_up, spec, world, torch.device("cpu"))
    build.fill(engine_of_small, warm_up.source(small, build.Base(None, 0), torch.device("cpu")))
    read = count_reads()
    before, began = resident("VmRSS"), time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    base = build.Base(None, 0)
    with heap.returned_at_once():  # as a stage starts
        described = build.describe(config, spec, vocabulary)
        run = build.initialize(described, spec, world, torch.device("cpu"))
        if source == "seed":
            build.fill(run, described.source(config, base, torch.device("cpu")))
        else:
            found = catalog.newest(f"{folder}/stage")
            assert found is not None
            resumption.load(run, found)
    result = {"peak": resident("VmHWM") - before, "seconds": time.monotonic() - began, "read": sum(read)}
    Path(folder, f"{number}-{rank}.json").write_text(json.dumps(result))
    if source == "seed":
        rows = HeldOutBatch(torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9).bool(), torch.zeros(1, 9).long())
        mask = torch.zeros(config.vocabulary_size, dtype=torch.bool)
        engine.step(run, [rows], engine.count_tokens([rows], mask, run.device), mask, 0.0, world)
        uri = catalog.checkpoint_uri(f"{folder}/stage", 1)
        saver.save(run, uri, spec, {}, {"step": 1, "schedule_step": 1, "tokens": {}, "base": base.to_json()})


def count_reads() -> list[int]:
    """Bytes of each range that this process asks storage for from here on."""
    asked, usual = list[int](), storage.read_range

    def counted(uri: str, offset: int, length: int, *given: Any) -> bytes:
        asked.append(length)
        return usual(uri, offset, length, *given)

    storage.read_range = counted  # type: ignore[assignment]
    return asked


def resident(name: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def report(parameters: int, world: int, stage: int, precision: str, source: str, found: list[dict[str, float]]) -> None:
    weights = 2 if precision == "bfloat16" else 4
    masters = 0 if precision == "float32" and stage in (0, 3) else 4  # elsewhere the weights are their own
    divided = parameters / world
    gradients = 4 if stage else 0  # DeepSpeed makes room for those that a worker owns when it starts
    own = (divided if stage == 3 else parameters) * weights + (divided if stage else parameters) * (
        masters + gradients + (8 if source == "checkpoint" else 0)
    )
    peak = max(worker["peak"] for worker in found)
    line = f"from a {source}, {world} workers: part {own / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB ({peak / own:.2f}x)"
    if source == "checkpoint":
        line += f", read {sum(worker['read'] for worker in found) / (12 * parameters):.4f} of the state"
    missed = "" if source == "seed" or peak <= TARGET * own else f"  MISSED: {TARGET}x"
    print(f"{line}, {max(worker['seconds'] for worker in found):.1f} s{missed}", flush=True)


if __name__ == "__main__":
    main()
