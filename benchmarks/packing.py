"""Attention over rows packed with documents, forward and backward: `python benchmarks/packing.py`.

Each document alone (`Runs`), as training on a CPU does it, beside all behind PyTorch's dense mask, in turns; one
thread, as a worker has, and the seconds that it computes, the fewest of each. `--quick` is a smoke test of the script.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from calumma.model.ops.attention import attend, document_mask

training = importlib.import_module("model")  # benchmarks/model.py: a script's own folder comes first

# Rows, tokens, heads, numbers of a head: passes of the recipes of the quickstart and in colour.
PACKED = ((8, 256, 4, 32), (4, 576, 5, 32))
LENGTHS = (12, 30, 60, 120, 250)  # tokens of a document


def documents(quick: bool) -> Iterator[tuple[str, str, str, str]]:
    for rows, tokens, heads, size in PACKED[: 1 if quick else None]:
        generator = torch.Generator().manual_seed(0)
        shape = (rows, heads, tokens, size)
        qkv = [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]
        for length in LENGTHS[: 1 if quick else None]:
            segments_BT = torch.arange(tokens).expand(rows, -1) // length

            def seconds(form: Any, qkv: Any = qkv, segments_BT: Tensor = segments_BT) -> float:
                began = time.process_time()
                out = attend(*qkv, document_mask(segments_BT, form))
                torch.autograd.grad(out, qkv, torch.ones_like(out))
                return time.process_time() - began

            turns = [(seconds("dense"), seconds("runs")) for _ in range(3 if quick else 30)]
            masked, alone = (min(each) for each in zip(*turns, strict=True))
            yield (
                f"{rows} rows of {tokens} tokens, {heads} heads of {size}: documents of {length}",
                "attention behind a dense mask over each alone",
                f"{masked / alone:.2f} ({1e3 * masked:.1f} : {1e3 * alone:.1f} ms)",
                "for information",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="whether the script works, not how fast")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Machine: {training.machine('cpu')}\n")
    print("| case | measured | calumma | target |\n| --- | --- | --- | --- |")
    for row in documents(given.quick):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
