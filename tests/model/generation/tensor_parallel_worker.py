"""One process of an engine for test_tensor_parallel.py: `tensor_parallel_worker.py RANK WORLD FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams, Shard, read_shard
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.model.weights import LazyTensor, write_weights

N = 4  # codes of an image
V = Vocabulary(
    size=29, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
IMAGE = [V.begin_image, 7, 9, 14, 8, V.end_image]
BIASES = {"query_key_value_bias": True, "attention_output_bias": True, "feed_forward_bias": True}
CASES: list[dict[str, Any]] = [
    {"norm_order": "pre"},
    {"norm_order": "swin", "query_key_norm": False},
    {"query_key_norm": "rms", "own_head_size": 12, "tied": True, **BIASES},  # as text models have it
]
READ = (0, 2)  # cases whose weights are read from disk
OPTIONS: list[dict[str, Any]] = [{}, {"jacobi_window": 2, "block_size": 4, "cache_tokens": 184}]


def answers(shard: Shard | None, folder: Path) -> list[dict[str, list[int]]]:
    """Of every case, by request; empty where this process follows another. READ cases' weights are read from disk, the
    others' cut from what is in memory."""
    found = []
    for number, case in enumerate(CASES):
        config = ModelConfig(
            vocabulary_size=V.size, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=64, **case
        )
        transformer, generator = Transformer(config), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                if parameter.dim() == 2 or (name.endswith("bias") and "norm" not in name):
                    parameter.normal_(std=0.4, generator=generator)
            transformer.output.weight[[V.eos, V.end_turn]] = 0  # seldom the likeliest
        place = folder / f"case{number}"
        if number in READ and shard is None:
            place.mkdir()
            config.save(place)
            write_weights(place, {name: LazyTensor.of(tensor) for name, tensor in transformer.state_dict().items()})
        elif number in READ and shard is not None:
            whole = sum(parameter.numel() for parameter in transformer.parameters())
            transformer = read_shard(place, shard)
            assert sum(parameter.numel() for parameter in transformer.parameters()) < 1.4 * whole / shard.count
        for options in OPTIONS:
            engine = Engine(transformer, V, N, shard=shard, **options)
            if shard is not None and shard.index:
                engine.follow()
                continue
            got: dict[str, list[int]] = {}
            hot = PhaseSampling(1.2, 0.9, 1.2)
            for seed, mode in enumerate(("text", "image", "interleaved", "interleaved")):
                prefix = (V.begin_image,) if seed == 2 else ()
                params = SamplingParams(
                    20, mode, text=hot, image=PhaseSampling(1.0), seed=seed, prefix=prefix, prompt_logprobs=0
                )
                engine.add(Request(str(seed), [V.bos, *IMAGE, 18, 20 + seed], params))
                for event in engine.step():
                    got.setdefault(event.request_id, []).extend(event.tokens)
            engine.add(Request("gone", [V.bos, 17], SamplingParams(20)))
            engine.abort("gone")
            while engine.has_work:
                for event in engine.step():
                    got.setdefault(event.request_id, []).extend(event.tokens)
            engine.close()
            found.append(got)
    return found


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    found = answers(Shard.of(None), folder)
    shard = Shard.of(None)
    assert (shard.least(7 + rank), shard.least(7 - rank)) == (7, 8 - world)
    if rank == 0:
        (folder / f"answers{world}.json").write_text(json.dumps(found))
    dist.barrier()  # one that leaves earlier may take the connections of the others with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
