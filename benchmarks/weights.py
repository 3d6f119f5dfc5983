"""The engine with weights in float32, bfloat16 and int8: `python benchmarks/weights.py [--layers 4]`.

For each, bytes of the weights, and the seconds that one thread computes for a pass that takes in prompts of 64 tokens,
and for one that draws a token of each; the dtypes take turns in one process, and the fastest of three counts. Weights
are random, of the 1.3B shape.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.loading import read_transformer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.model.weights import LazyTensor, write_weights

CODES = list(range(1500, 1516))
IDS = Vocabulary(size=2048, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=CODES)
KINDS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "int8": (torch.bfloat16, True)}
TURNS, TOKENS = 3, 12


def seconds(engine: Engine, prompts: int) -> tuple[float, float]:
    """Of the pass that takes prompts in, and of one that draws."""
    for number in range(prompts):
        params = SamplingParams(TOKENS, "text", text=PhaseSampling(0))
        engine.add(Request(str(number), [IDS.bos, *[10 + number] * 64], params))
    begin = time.process_time()
    engine.step()
    taken, steps = time.process_time(), engine.statistics.counters.steps
    while engine.has_work:
        engine.step()
    return taken - begin, (time.process_time() - taken) / max(1, engine.statistics.counters.steps - steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig.model_validate(
        {"preset": "calumma-1.3b", "vocabulary_size": IDS.size, "layers": options.layers, "context": 256}
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save(folder)
        weights = Transformer(config).initialize(0).state_dict()
        write_weights(Path(folder), {name: LazyTensor.of(weight) for name, weight in weights.items()})
        transformers = {name: read_transformer(folder, dtype=d, int8=int8) for name, (d, int8) in KINDS.items()}
        engines = {name: Engine(each, IDS, 16, prefix_cache=False) for name, each in transformers.items()}
        found = {
            (name, prompts): [seconds(engine, prompts) for _ in range(TURNS)]
            for prompts in (1, 16)
            for name, engine in engines.items()
        }
        for name, each in transformers.items():
            size = sum(weight.numel() * weight.element_size() for weight in each.parameters())
            cells = [f"{1000 * min(column):.0f}" for n in (1, 16) for column in zip(*found[name, n], strict=True)]
            print(f"| {name} | {size / 1e6:.0f} MB | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
