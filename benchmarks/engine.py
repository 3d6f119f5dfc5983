"""The generation engine by itself, no HTTP: `python benchmarks/engine.py`.

Text: greedy answers of one and of 16 prompts over transformers' `generate` with the same weights, in tokens a second.
Mixed: 16 requests (text, guided image, interleaved with a guided image first), all at once over one after the other on
the same engine, in requests a second, beside the most that the machine's memory and arithmetic leave of that ratio.
Both sides take turns in one process, and each counts with its fastest turn: a neighbour on the machine only ever slows
one down. Weights are random. `--model DIRECTORY` instead measures speculative Jacobi decoding on a trained model: the
share of drafted codes that stand, and passes an image. `--busy` is for a machine with other work: one thread, and the
seconds it computes instead of those that pass. `--quick` is a smoke test of the script. Host: what a process computes
for a step beside the model and the draw, which answer at once there.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.generation.sampling.sampler import SamplerOutput
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

training = importlib.import_module("model")  # benchmarks/model.py: a script's own folder comes first
Row = tuple[str, str, str, str]
GREEDY = PhaseSampling(temperature=0)


@dataclass(frozen=True)
class Shapes:
    """What is measured. image: codes of one. prompt, answer: text tokens."""

    preset: str
    layers: int
    vocabulary: int
    image: int
    prompt: int
    answer: int
    device: str
    dtype: str
    turns: int
    together: int = 16
    clock: Callable[[], float] = time.perf_counter

    @property
    def name(self) -> str:
        return f"{self.preset} shape" + (f", {self.layers} layers" if self.layers < 12 else "")

    def case(self) -> training.Case:
        length = self.prompt + self.answer + 2 * self.image + 8
        return training.Case(
            self.preset, self.layers, length, length, self.dtype, device=self.device, vocabulary=self.vocabulary
        )

    def ids(self, text_only: bool) -> Vocabulary:
        """The public release's order of ids; with text only, no id but the one that transformers masks is a code."""
        codes = 1 if text_only else min(8192, self.vocabulary // 8)
        names = ["begin_image", "end_image", "end_turn"]
        return Vocabulary(
            size=self.vocabulary,
            bos=0,
            pad=1,
            eos=2,
            unknown=3,
            image_codes=list(range(4, 4 + codes)),
            **{name: 4 + codes + number for number, name in enumerate(names)},
        )

    def prompts(self, count: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        low = self.vocabulary // 2  # text ids in either vocabulary
        return [
            [0, *torch.randint(low, self.vocabulary, (self.prompt - 1,), generator=generator).tolist()]
            for _ in range(count)
        ]


def fresh(shapes: Shapes) -> Transformer:
    return training.ours(shapes.case()).eval()


def run(
    engine: Engine, requests: list[Request], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, list[Event]]:
    """Seconds for all of them together, and their events."""
    began = clock()
    for request in requests:
        engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step()
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began, events


def fastest(turns: int, *works: Callable[[], float]) -> list[float]:
    """The fewest seconds of each, in turns; a first turn is not counted."""
    seconds = [[work() for work in works] for _ in range(turns + 1)][1:]
    return [min(turn[i] for turn in seconds) for i in range(len(works))]


def mixed_requests(shapes: Shapes, vocabulary: Vocabulary) -> list[Request]:
    """A third each of text, images guided by three branches, and interleaved answers that begin with such an image."""
    requests = []
    for number, prompt in enumerate(shapes.prompts(shapes.together)):
        kind = number % 3
        params: dict[str, Any] = {"seed": number}
        if kind == 0:
            params |= {"max_tokens": shapes.answer}
        elif kind == 1:
            params |= {"mode": "image"}
        else:
            room = shapes.image + 2 + shapes.answer // 2
            params |= {"mode": "interleaved", "max_tokens": room, "max_images": 1, "prefix": (vocabulary.begin_image,)}
        requests.append(Request(str(number), prompt, SamplingParams(**params)))
    return requests


def mixed(shapes: Shapes, targeted: bool) -> Iterator[Row]:
    vocabulary = shapes.ids(text_only=False)
    engine = Engine(fresh(shapes), vocabulary, shapes.image, shapes.together, prefix_cache=False)
    requests = mixed_requests(shapes, vocabulary)

    def one_by_one() -> float:
        return sum(run(engine, [request], shapes.clock)[0] for request in requests)

    def at_once() -> float:
        return run(engine, requests, shapes.clock)[0]

    alone, together = fastest(shapes.turns, one_by_one, at_once)
    rates = f"{alone / together:.2f} ({len(requests) / together:.2f} : {len(requests) / alone:.2f})"
    yield (
        f"{shapes.name}, {shapes.vocabulary:,} ids: {shapes.together} mixed requests, {shapes.image} codes an image, "
        f"{shapes.answer} text tokens",
        "requests/s together over one at a time",
        rates,
        training.verdict(alone / together, 4) if targeted else "for information",
    )
    if shapes.device == "cuda":
        return  # recorded passes go by what counts them
    limits = roofline_limits(shapes)
    least_alone, least_together = (least_seconds(engine, work, limits) for work in (one_by_one, at_once))
    yield (
        f"the same, by {limits.bandwidth / 1e9:,.0f} GB/s and {limits.operations / 1e9:,.0f} GFLOP/s, measured here",
        "least seconds one at a time over those together",
        f"{least_alone / least_together:.2f} ({least_alone:.2f} : {least_together:.2f} s, of {alone:.2f} : "
        f"{together:.2f} s: {least_alone / alone:.0%} and {least_together / together:.0%})",
        "for information",
    )


def roofline_limits(shapes: Shapes) -> Any:
    roofline = importlib.import_module("roofline")  # which imports this script
    roofline.CLOCKS.append(shapes.clock)
    return roofline.Limits(roofline.bandwidth(shapes.device), training.ceiling(shapes.case(), shapes.clock))


def least_seconds(engine: Engine, work: Callable[[], float], limits: Any) -> float:
    """What the passes of some work take at least: each reads its matrices once and multiplies all its rows by them;
    attention, sampler and scheduler take no time."""
    decoder, least = engine._runner.decoder, [0.0]
    hidden, logits = decoder.hidden, decoder.logits
    config = decoder.transformer.config
    size = decoder.transformer.output.weight.element_size()
    key_value = config.kv_heads * config.head_size
    layers = config.layers * config.width * (2 * config.width + 2 * key_value + 3 * config.ffn_width)

    def count(numbers: int, rows: int) -> None:
        least[0] += max(size * numbers / limits.bandwidth, 2 * rows * numbers / limits.operations)

    def counted_hidden(tokens_T: torch.Tensor, *given: Any) -> torch.Tensor:
        count(layers, len(tokens_T))
        return hidden(tokens_T, *given)

    def counted_logits(x_RD: torch.Tensor, columns: slice | None = None) -> torch.Tensor:
        logits_RC = logits(x_RD, columns)
        count(config.width * logits_RC.shape[1], len(x_RD))
        return logits_RC

    decoder.hidden, decoder.logits = counted_hidden, counted_logits  # type: ignore[method-assign]
    try:
        work()
    finally:
        decoder.hidden, decoder.logits = hidden, logits  # type: ignore[method-assign]
    return least[0]


def text(shapes: Shapes, count: int) -> Iterator[Row]:
    vocabulary = shapes.ids(text_only=True)
    engine = Engine(fresh(shapes), vocabulary, shapes.image, count, prefix_cache=False)
    other = training.theirs(shapes.case()).eval()
    prompts = torch.tensor(shapes.prompts(count), device=shapes.device)
    params = SamplingParams(shapes.answer, text=GREEDY)
    requests = [Request(str(number), prompt, params) for number, prompt in enumerate(prompts.tolist())]
    answers: dict[str, list[int]] = {}

    def ours() -> float:
        seconds, events = run(engine, requests, shapes.clock)
        for request in requests:
            answers[request.id] = [token for e in events if e.request_id == request.id for token in e.tokens]
        return seconds

    @torch.inference_mode()
    def theirs() -> float:
        began = shapes.clock()
        found = other.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=shapes.answer,
            min_new_tokens=shapes.answer,
            do_sample=False,
            pad_token_id=1,
        )
        seconds = shapes.clock() - began
        answers["theirs"] = found[:, shapes.prompt :].flatten().tolist()
        return seconds

    ours_seconds, their_seconds = fastest(shapes.turns, ours, theirs)
    own = [token for request in requests for token in answers[request.id]]
    same = sum(a == b for a, b in zip(own, answers["theirs"], strict=False)) / (count * shapes.answer)
    tokens = count * shapes.answer
    yield (
        f"{shapes.name}: text, batch {count}, {shapes.prompt} + {shapes.answer} tokens, greedy; {same:.0%} the same",
        "tokens/s over transformers' generate",
        f"{their_seconds / ours_seconds:.2f} ({tokens / ours_seconds:,.0f} : {tokens / their_seconds:,.0f})",
        training.verdict(their_seconds / ours_seconds, 1.5),
    )


def host(shapes: Shapes, count: int) -> Iterator[Row]:
    """Of `count` texts, with and without passes issued ahead."""
    vocabulary = shapes.ids(text_only=False)
    steps = 8 if shapes.answer < 64 else shapes.answer // 2
    for ahead in (False, True):
        engine = Engine(fresh(shapes), vocabulary, shapes.image, count, ahead=ahead, cuda_graphs=False)
        decoder, device = engine._runner.decoder, shapes.device
        x_TD = torch.zeros(count * shapes.prompt, decoder.transformer.config.width, device=device)
        logits_RC = torch.zeros(count, 1, device=device)
        drawn = torch.full((count,), vocabulary.text_ids[-1], device=device), torch.zeros(count, device=device)
        decoder.hidden = lambda tokens_T, *_, x_TD=x_TD: x_TD[: len(tokens_T)]  # type: ignore[method-assign]
        decoder.logits = lambda x_RD, *_, found=logits_RC: found[: len(x_RD)]  # type: ignore[method-assign]
        engine._runner.sampler.sample = (
            lambda logits_RC, *_, drawn=drawn: SamplerOutput(  # type: ignore[method-assign]
                *(each[: len(logits_RC)] for each in drawn)
            )
        )
        seconds = []
        for turn in range(shapes.turns):
            for number, prompt in enumerate(shapes.prompts(count)):
                engine.add(Request(f"{turn} {number}", prompt, SamplingParams(shapes.answer, seed=number)))
            while engine.statistics.counters.text_tokens < count * (1 + turn * shapes.answer):
                engine.step()
            began = time.process_time()
            for _ in range(steps):
                engine.step()
            seconds.append((time.process_time() - began) / steps)
            while engine.has_work:
                engine.step()
        yield (
            f"{count} texts" + (", passes issued ahead" if ahead else ""),
            "host's time of a step beside the model and the draw",
            f"{1000 * min(seconds):.2f} ms",
            "<= 1 ms",
        )


def drafts(directory: str, device: str) -> Iterator[Row]:
    """Guided images of a trained model, with windows of several sizes."""
    from calumma.model import Document, Text, load

    model = load(directory, device)
    numbers = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    asked = [Document((Text(f"Draw the digit {numbers[seed % 10]}.", "user"),)) for seed in range(16)]
    prompts = [encoded.ids for encoded in model.encoder.encode_many(asked, complete=False)]
    for window in (0, 2, 4, 8, 16):
        engine = Engine(model.transformer, model.vocabulary, model.image_length, image_burst=1, jacobi_window=window)
        requests = [
            Request(str(seed), prompt, SamplingParams(mode="image", seed=seed)) for seed, prompt in enumerate(prompts)
        ]
        seconds, _ = run(engine, requests)
        found = engine.statistics
        rate = f"{found.acceptance:.0%} stand, {found.counters.steps} passes, {seconds:.2f} s"
        yield (
            f"16 images of {model.image_length} codes, window {window}",
            "speculative Jacobi decoding",
            rate,
            "measured",
        )


def shapes_of(device: str, quick: bool) -> tuple[Shapes, list[Shapes]]:
    """Of the comparison with transformers, and of the mixed requests; the first of these has the target."""
    if quick:
        tiny = Shapes("calumma-20m", 1, 512, 16, 8, 8, device, "float32", 1, together=6)
        return tiny, [tiny]
    if device == "cuda":
        large = Shapes("chameleon-7b", 32, 65536, 1024, 256, 256, device, "bfloat16", 2)
        return large, [large]
    quickstart = Shapes("calumma-20m", 4, 2048, 16, 32, 64, device, "float32", 5)
    small = Shapes("calumma-20m", 12, 65536, 256, 32, 256, device, "float32", 2)
    return small, [quickstart, replace(small, image=64, answer=64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether the script works, not how fast")
    parser.add_argument(
        "--busy", action="store_true", help="one CPU thread, and its own seconds instead of the clock's"
    )
    parser.add_argument("--only", choices=["mixed", "text", "host"], help="one part alone")
    parser.add_argument("--model", help="a model directory: speculative decoding of its images instead")
    given = parser.parse_args()
    compared, together = shapes_of(given.device, given.quick)
    if given.busy:
        if given.device != "cpu":
            parser.error("--busy measures a CPU thread's seconds; it needs --device cpu")
        torch.set_num_threads(1)
        compared = replace(compared, clock=time.process_time)
        together = [replace(shapes, clock=time.process_time) for shapes in together]
    print(f"Machine: {training.machine(given.device)}\n", flush=True)
    print("| case | measured | calumma | target |\n| --- | --- | --- | --- |")
    rows: list[Iterator[Row]] = []
    if given.model:
        rows = [drafts(given.model, given.device)]
    else:
        if given.only in (None, "text"):
            rows += [text(compared, count) for count in (1, compared.together)]
        if given.only in (None, "mixed"):
            rows += [mixed(shapes, shapes is together[0]) for shapes in together]
        if given.only in (None, "host"):
            rows.append(host(replace(together[0], layers=1, answer=compared.answer // 2), 32))
    for row in chain.from_iterable(rows):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
