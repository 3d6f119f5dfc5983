"""`loading_worker.py FOLDER`: bytes that loading takes at its peak beyond those of the weights, as the operating system
counts them, by how the model of a folder is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from calumma.model import weights
from calumma.model.generation import Shard, read_shard
from calumma.model.loading import read_transformer
from calumma.model.transformer import Transformer

CHUNK = 2 * 2**20


def resident(line: str) -> int:
    """VmRSS: bytes of this process that are in memory; VmHWM: the most there have been."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(each for each in status if each.startswith(line)).split()[1])


def beyond(load: Callable[[], Transformer]) -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
    except OSError:  # not everywhere
        before = resident("VmHWM")
    transformer = load()
    held = sum(weight.numel() * weight.element_size() for weight in transformer.parameters())
    return resident("VmHWM") - before - held


def main(folder: str) -> None:
    torch.set_num_threads(1)
    weights.CHUNK_BYTES = CHUNK
    half = torch.bfloat16
    loads: dict[str, Callable[[], Transformer]] = {
        "bfloat16": lambda: read_transformer(folder, dtype=half),
        "int8": lambda: read_transformer(folder, dtype=half, int8=True),
        "first shard": lambda: read_shard(folder, Shard(0, 2), dtype=half),
        "second shard": lambda: read_shard(folder, Shard(1, 2), dtype=half, int8=True),
    }
    read_shard(folder, Shard(0, 16), dtype=half, int8=True)  # whatever a first use needs
    # The least of three: the kernel's counts lag, and what else the process does only adds.
    print(json.dumps({name: min(beyond(load) for _ in range(3)) for name, load in loads.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
