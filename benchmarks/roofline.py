"""How near decoding comes to what the machine can do: `python benchmarks/roofline.py`.

A step of B texts must read all weights but the embedding, and B contexts of keys and values; and it multiplies each of
B states with all of them. So it takes bytes / bandwidth or operations / rate at least, whichever is longer. Both limits
are measured beside it in the same process: the fastest of some copies, and the best matrix product. Long contexts: the
passes alone (all but the sampler and the scheduler) over random keys and values, by our kernels and by PyTorch's alone,
in turns; and with a prefix that all share, over those of one. Images: one guided by three branches alone, its pixels
included, and 16 at once. Weights are random. `--busy` is for a machine with other work: one thread, and the seconds it
computes instead of those that pass. `--quick` is a smoke test of the script.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.generation.attention.choice import fastest
from calumma.model.generation.cache.contiguous import ContiguousCache
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.vocabulary import Vocabulary

benchmark = importlib.import_module("engine")  # benchmarks/engine.py: a script's own folder comes first
training = importlib.import_module("model")
COPIED = 1 << 28  # bytes: more than any cache holds
GPU_TARGETS = {1: 0.75, 32: 0.6}
CPU_TARGETS = {1: 0.8, 32: 0.6}
LONG = 2048  # positions of a long context
CLOCKS: list[Callable[[], float]] = [time.perf_counter]


@dataclass(frozen=True)
class Limits:
    """Of the machine: bytes a second from and to memory, floating-point operations a second."""

    bandwidth: float
    operations: float


@dataclass(frozen=True)
class Work:
    """What one decode step must read and compute at least."""

    bytes: float
    operations: float

    @classmethod
    def of(cls, config: ModelConfig, batch: int, context: float, size: int) -> Work:
        """`context`: positions each of the sequences attends to; `size`: bytes of a number."""
        key_value = config.kv_heads * config.head_size
        layer = config.width * (2 * config.width + 2 * key_value + 3 * config.ffn_width)
        matrices = config.layers * layer + config.width * config.vocabulary_size
        attended = config.layers * batch * context
        return cls(
            size * (matrices + 2.0 * attended * key_value),
            2.0 * batch * matrices + 4.0 * attended * config.width,
        )

    def seconds(self, limits: Limits) -> float:
        return max(self.bytes / limits.bandwidth, self.operations / limits.operations)


def bandwidth(device: str) -> float:
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        began = _now(device)
        target.copy_(source)
        best = max(best, 2 * COPIED / (_now(device) - began))
    return best


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[-1]()


def decoding(engine: Engine, shapes: benchmark.Shapes, batch: int) -> tuple[float, float]:
    """Seconds of a step in which `batch` texts get a token each (the median), and their mean context."""
    greedy = SamplingParams(shapes.answer, text=PhaseSampling(temperature=0))
    ends = {engine.vocabulary.eos, engine.vocabulary.end_turn}
    for number, prompt in enumerate(shapes.prompts(batch)):
        engine.add(Request(str(number), [0, *[token for token in prompt[1:] if token not in ends]], greedy))
    seconds: list[float] = []
    while engine.has_work:
        began = _now(shapes.device)
        events = engine.step()
        if len(events) == batch and not any(event.finish for event in events):
            seconds.append(_now(shapes.device) - began)
    later = sorted(seconds[len(seconds) // 2 :])  # graphs are recorded in the first
    return later[len(later) // 2], shapes.prompt + 0.75 * len(seconds)


def texts(shapes: benchmark.Shapes, limits: Limits, batch: int) -> Iterator[benchmark.Row]:
    transformer = benchmark.fresh(shapes)
    with torch.no_grad():  # random weights must not end an answer
        transformer.output.weight[[2, shapes.ids(text_only=True).end_turn]] = 0
    engine = Engine(transformer, shapes.ids(text_only=True), shapes.image, batch, prefix_cache=False)
    seconds, context = decoding(engine, shapes, batch)
    size = getattr(torch, shapes.dtype).itemsize
    work = Work.of(transformer.config, batch, context, size)
    share = work.seconds(limits) / seconds
    bound = "memory" if work.bytes / limits.bandwidth > work.operations / limits.operations else "arithmetic"
    wanted = training.verdict(share, GPU_TARGETS[batch]) if shapes.device == "cuda" else "for information"
    yield (
        f"{shapes.name}, {shapes.vocabulary:,} ids, {shapes.dtype}: text, batch {batch}, context {context:.0f}",
        f"least time of a decode step ({bound}) over its time",
        f"{share:.0%} ({1e3 * work.seconds(limits):.2f} : {1e3 * seconds:.2f} ms; {batch / seconds:,.0f} tokens/s)",
        wanted,
    )


@torch.inference_mode()
def long_contexts(shapes: benchmark.Shapes, limits: Limits) -> Iterator[benchmark.Row]:
    """Passes of a token a sequence, by both kernels; and of sequences with their own contexts and a shared one."""
    prompt = shapes.prompt if shapes.preset == "calumma-20m" else LONG
    shapes = replace(shapes, layers=min(shapes.layers, 2), prompt=prompt)
    transformer, size = benchmark.fresh(shapes), 32
    config, length = transformer.config, min(LONG, transformer.config.context - 8)
    blocks, most = -(-length // size), max(CPU_TARGETS)
    decoders = {kernels: Decoder(transformer, kernels=kernels) for kernels in ("auto", "torch")}
    weight = decoders["auto"].embedding
    cache = PagedCache(config, blocks * most, size, weight.device, weight.dtype)
    cache.store.copy_(torch.randn(cache.store.shape[3:]))
    tables = torch.randperm(cache.blocks).view(most, blocks).tolist()
    numbers = getattr(torch, shapes.dtype).itemsize

    def passes(kernels: str, tables: list[list[int]]) -> Callable[[], float]:
        decoder = decoders[kernels]
        _, reader = fastest(config, decoder.heads, cache, decoder.operations.native)
        contiguous = ContiguousCache(cache) if reader is None and shapes.device == "cpu" else None
        sequences = [Sequence([0] * length, length - 4, table) for table in tables]

        def seconds() -> float:
            best = float("inf")
            for number in range(3):
                for sequence in sequences:
                    sequence.cached = length - 4 + number
                began = _now(shapes.device)
                layout = BatchLayout([(sequence, 1) for sequence in sequences], size)
                tokens_T = torch.tensor(layout.tokens, device=shapes.device)
                paged = layout.step(cache, 0, torch.device(shapes.device), contiguous, reader)
                decoder.logits(decoder.hidden(tokens_T, paged))
                best = min(best, _now(shapes.device) - began)
            return best

        return seconds

    name = f"{shapes.preset}, {config.layers} layers, {shapes.vocabulary:,} ids, {shapes.dtype}, context {length}"
    for batch, target in CPU_TARGETS.items():
        least = Work.of(config, batch, length, numbers).seconds(limits)
        ours, theirs = benchmark.fastest(2, passes("auto", tables[:batch]), passes("torch", tables[:batch]))
        wanted = training.verdict(least / ours, target) if shapes.device == "cpu" else "for information"
        told = f"{least / ours:.0%} ({1e3 * least:.2f} : {1e3 * ours:.2f} ms)"
        yield f"{name}, batch {batch}", "least time of a pass over its time", told, wanted
        told = f"{least / theirs:.0%} ({1e3 * theirs:.2f} ms)"
        yield f"{name}, batch {batch}, PyTorch's kernels", "the same", told, "for information"
    for batch in (8, most):
        shared = [[*tables[0][:-1], table[-1]] for table in tables[:batch]]
        one, own = benchmark.fastest(2, passes("auto", shared), passes("auto", tables[:batch]))
        told = f"{one / own:.2f} ({1e3 * one:.2f} : {1e3 * own:.2f} ms)"
        yield (
            f"{name}, batch {batch}",
            "a pass with a shared prefix over one with own contexts",
            told,
            "for information",
        )


def images(shapes: benchmark.Shapes, tokenizer: ImageTokenizer) -> Iterator[benchmark.Row]:
    """One guided image alone, and 16 at once; codes and pixels."""
    vocabulary: Vocabulary = shapes.ids(text_only=False)
    engine = Engine(benchmark.fresh(shapes), vocabulary, shapes.image, shapes.together, prefix_cache=False)
    requests = [
        Request(str(number), prompt, SamplingParams(mode="image", seed=number))
        for number, prompt in enumerate(shapes.prompts(shapes.together))
    ]

    @torch.inference_mode()
    def draw(asked: list[Request]) -> float:
        began = _now(shapes.device)
        _, events = benchmark.run(engine, asked)
        for request in asked:
            drawn = [token for event in events if event.request_id == request.id for token in event.tokens]
            codes = [vocabulary.code_of[token] for token in drawn if token in vocabulary.code_of]
            tokenizer.decode(torch.tensor([codes], device=shapes.device))
        return _now(shapes.device) - began

    alone, together = benchmark.fastest(shapes.turns, lambda: draw(requests[:1]), lambda: draw(requests))
    side = tokenizer.config.resolution
    name = f"{shapes.name}, {shapes.dtype}: images of {side}x{side} ({shapes.image:,} codes), three branches"
    wanted = training.verdict(alone, 5, below=True) if shapes.device == "cuda" else "for information"
    yield name, "seconds of one alone", f"{alone:.2f}", wanted
    rates = f"{shapes.together / together:.2f} : {1 / alone:.2f}"
    codes = f"{shapes.together * shapes.image / together:,.0f} codes/s"
    yield name, f"images/s, {shapes.together} at once and one alone", f"{rates} ({codes})", "for information"


def shapes_of(device: str, quick: bool) -> tuple[benchmark.Shapes, ImageTokenizerConfig]:
    published = ImageTokenizerConfig()
    if quick:
        side = {"resolution": 32, "codebook_size": 64, "base_channels": 8, "multipliers": [1, 1, 1, 1]}
        small = published.model_copy(update=side | {"embedding": 8, "residual_blocks": 1})
        return benchmark.Shapes("calumma-20m", 1, 512, 16, 8, 12, device, "float32", 1, together=3), small
    if device == "cuda":
        return benchmark.Shapes("chameleon-7b", 32, 65536, 1024, 256, 256, device, "bfloat16", 2), published
    smaller = published.model_copy(update={"resolution": 64, "base_channels": 32})
    return benchmark.Shapes("calumma-125m", 12, 65536, 16, 64, 32, device, "float32", 1), smaller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether the script works, not how fast")
    parser.add_argument("--busy", action="store_true", help="one thread, and the seconds that it computes")
    parser.add_argument("--only", choices=["text", "long", "images"], help="one part alone")
    given = parser.parse_args()
    if given.busy:
        torch.set_num_threads(1)
        CLOCKS.append(time.process_time)
    shapes, picture = shapes_of(given.device, given.quick)
    case = replace(shapes.case(), tokens=4096)
    limits = Limits(bandwidth(given.device), training.ceiling(case, CLOCKS[-1]))
    print(f"Machine: {training.machine(given.device)}; ", end="")
    print(f"{limits.bandwidth / 1e9:,.0f} GB/s, {limits.operations / 1e9:,.0f} GFLOP/s in {shapes.dtype}\n")
    print("| case | measured | calumma | target |\n| --- | --- | --- | --- |", flush=True)
    tokenizer = ImageTokenizer(picture).to(given.device, getattr(torch, shapes.dtype)).eval()
    parts = {
        "text": (row for batch in GPU_TARGETS for row in texts(shapes, limits, batch)),
        "long": long_contexts(shapes, limits),
        "images": images(shapes, tokenizer),
    }
    for part in [given.only] if given.only else parts:
        for row in parts[part]:
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
