"""One process of an engine for test_tensor_parallel_rules.py: `tensor_parallel_rules_worker.py RANK WORLD FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from calumma.model.config import ModelConfig
from calumma.model.generation import Constraint, Engine, PhaseSampling, Request, SamplingParams, Shard
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
V = Vocabulary(
    size=40, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
POISON = 39  # an id that no pass can compute
PROMPT = [V.bos, V.begin_image, 7, 9, 14, 8, V.end_image, 18, 20, 20]


class Stripes:
    """A grammar of ids whose remainders by 3 follow each other; it may end after every third."""

    def __init__(self, taken: int = 0) -> None:
        self.taken = taken

    may_begin_image = False

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        may = np.zeros(len(mask_W) * 32, dtype=bool)
        may[[token for token in range(V.size) if token % 3 == self.taken % 3]] = True
        may[[V.eos, V.end_turn]] = self.taken % 3 == 0
        mask_W[:] = np.packbits(may, bitorder="little").view(np.int32)

    def advance(self, token: int) -> None:
        if token % 3 != self.taken % 3:
            raise ValueError(f"id {token} is not of stripe {self.taken % 3}")
        self.taken += 1

    def copy(self) -> Stripes:
        return Stripes(self.taken)


def transformer() -> Transformer:
    config = ModelConfig(vocabulary_size=V.size, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=64)
    made, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4, generator=generator)
        made.output.weight[[V.eos, V.end_turn]] = 0  # seldom the likeliest
        made.embedding.weight[POISON] = float("nan")
    return made.eval()


def requests() -> list[Request]:
    hot = PhaseSampling(1.2, 0.9, 1.3, presence_penalty=0.5, frequency_penalty=0.5)
    sound: dict[str, Any] = {"text": hot, "bad_words": ((POISON,), (20, 21))}
    common: dict[str, Any] = {"max_tokens": 20, **sound}
    return [
        Request("penalized", PROMPT, SamplingParams(**common, seed=2**63)),
        Request("poisoned prompt", [*PROMPT, POISON, 18], SamplingParams(**common, seed=1)),
        Request("grammar", PROMPT, SamplingParams(**common, seed=2, constraint=Constraint("json"), min_tokens=7)),
        Request(
            "poison drawn", PROMPT, SamplingParams(20, allowed_ids=(20, POISON), logit_bias=((POISON, 2.0),), seed=4)
        ),
        Request("images", PROMPT, SamplingParams(**common, mode="interleaved", seed=3, prefix=(V.begin_image, 7))),
        Request("biased", PROMPT, SamplingParams(**common, logit_bias=((18, 3.0),), ignore_eos=True, seed=6)),
        Request("nothing left", PROMPT, SamplingParams(9, allowed_ids=(20,), bad_words=((20, 20),), seed=7)),
    ]


def answers(shard: Shard | None) -> dict[str, list[Any]]:
    """Tokens, end and failure by request; empty where this process follows another."""
    options: dict[str, Any] = {"block_size": 4, "cache_tokens": 184, "prefill_tokens": 5}
    engine = Engine(transformer(), V, N, shard=shard, constraints=lambda _: Stripes(), **options)
    if shard is not None and shard.index:
        engine.follow()
        return {}
    found: dict[str, list[Any]] = {}
    for request in requests():
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            kept = found.setdefault(event.request_id, [[], None, None, None])
            kept[0] += event.tokens
            kept[1:] = event.finish, event.failure and event.failure.kind, event.stop_id
    engine.close()
    return found


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    found = answers(Shard.of(None))
    if rank == 0:
        (folder / f"answers{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
