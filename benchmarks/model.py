"""A training step of the Transformer, side by side with transformers' Chameleon: `python benchmarks/model.py`.

Speed: both models, of the same configuration and weights, take turns in one process, and each counts with its fastest
step: a neighbour on the machine only ever slows one down. Peak memory: each takes its steps in a process of its own. A
step is forward, loss over a vocabulary of 65,536 (all tokens are trained), backward and AdamW (fused). Against the
limit: the step's floating-point operations a second over the best matrix product of the same process. `--quick` is a
smoke test of the script itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calumma.model.config import PRESETS, ModelConfig
from calumma.model.transformer import HeadNorm, Transformer

VOCABULARY = 65536
IMAGE_ID = 4  # transformers forbids image codes in its logits: one is left, and never a target
H200_BYTES = 141e9


@dataclass(frozen=True)
class Case:
    """One measurement. `preset`'s layers, so many of them, on `tokens` tokens in rows of `context`."""

    preset: str
    layers: int
    context: int
    tokens: int
    dtype: str
    turns: int = 3
    device: str = "cpu"
    compile: bool = False
    checkpoint: bool = False
    vocabulary: int = VOCABULARY

    @property
    def config(self) -> ModelConfig:
        shape = PRESETS[self.preset] | {"layers": self.layers, "vocabulary_size": self.vocabulary, "dropout": 0.0}
        return ModelConfig(**shape, context=max(self.context, 2))

    @property
    def name(self) -> str:
        config = self.config
        return (
            f"width {config.width}, {config.layers} layers, context {self.context}, {self.tokens} tokens, {self.dtype}"
        )

    def batch(self) -> Tensor:
        """LongTensor [B, T], no image code among them."""
        generator = torch.Generator().manual_seed(0)
        shape = (max(1, self.tokens // self.context), self.context)
        return torch.randint(IMAGE_ID + 1, self.vocabulary, shape, generator=generator).to(self.device)

    @property
    def operations(self) -> float:
        """Floating-point operations of one step: 6 a weight of each matrix and token, and causal attention's half of
        the square (two products, forward and twice backward). Recomputed activations count nothing."""
        config = self.config
        key_value = config.kv_heads * config.head_size
        layer = config.width * (2 * config.width + 2 * key_value + 3 * config.ffn_width)
        matrices = config.layers * layer + config.width * config.vocabulary_size
        attention = config.layers * self.context * config.width
        return 6.0 * self.tokens * (matrices + attention)


# -- the two implementations: a model, and its loss on a batch --


def ours(case: Case) -> Transformer:
    with torch.device("meta"):
        model = Transformer(case.config).to(getattr(torch, case.dtype))
    for module in model.to_empty(device=case.device).modules():  # never in float32, which a GPU may not hold
        if isinstance(module, nn.RMSNorm | HeadNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, HeadNorm):
            nn.init.zeros_(module.bias)
    model.initialize(0)
    model.checkpoint_activations(case.checkpoint).train()
    return model.compile_blocks() if case.compile else model


def our_loss(model: Any, tokens: Tensor, measure: bool = False) -> Tensor:
    """The mean over all tokens but each row's first, as transformers shifts them."""
    targets, mask = tokens.roll(-1, 1), torch.ones_like(tokens, dtype=torch.bool)
    mask[:, -1] = False
    image_mask = torch.zeros(model.config.vocabulary_size, dtype=torch.bool, device=tokens.device)
    normalizer = tokens.shape[0] * (tokens.shape[1] - 1)
    return model(
        tokens, targets=targets, mask=mask, image_mask=image_mask, z_loss=0.0, normalizer=normalizer, measure=measure
    ).total


def theirs(case: Case) -> nn.Module:
    import transformers

    from calumma.model.convert.names import rows, to_halves

    config = case.config
    settings = transformers.ChameleonConfig(
        vocab_size=config.vocabulary_size,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        vocabulary_map={"<image>": 5, "IMGIMGAZ": IMAGE_ID},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "num_embeddings": 1},
    )
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = transformers.ChameleonForConditionalGeneration(settings)
    del model.model.vqmodel
    model.to_empty(device=case.device)
    rotary = model.model.rotary_emb
    frequencies, _ = rotary.compute_default_rope_parameters(settings)
    rotary.inv_freq.copy_(frequencies)
    model = model.to(getattr(torch, case.dtype)).train()
    rotary.inv_freq = frequencies.to(case.device)
    ours_by_name = ours(replace(case, compile=False)).state_dict()
    theirs_by_name = model.state_dict()
    for row in rows(config):
        tensor = ours_by_name[row.ours]
        if row.rotary:
            tensor = to_halves(tensor, getattr(config, row.rotary), config.head_size)
        theirs_by_name.pop(row.hugging_face).copy_(tensor)
    assert not theirs_by_name
    if case.checkpoint:
        model.gradient_checkpointing_enable()
    return model


def their_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


Build = Callable[[Case], nn.Module]
IMPLEMENTATIONS: dict[str, tuple[Build, Callable[[nn.Module, Tensor], Tensor]]] = {
    "calumma": (ours, our_loss),
    "transformers": (theirs, their_loss),
}


class Steps:
    """A model in training; `step` takes one and says for how many seconds."""

    def __init__(self, implementation: str, case: Case) -> None:
        build, self.loss = IMPLEMENTATIONS[implementation]
        self.model, self.tokens = build(case), case.batch()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.losses: list[float] = []

    def step(self, **options: Any) -> float:
        self._wait()
        began = time.perf_counter()
        loss = self.loss(self.model, self.tokens, **options)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        seconds = time.perf_counter() - began
        self.losses.append(float(loss.detach()))
        return seconds

    def _wait(self) -> None:
        if self.tokens.is_cuda:
            torch.cuda.synchronize()


# -- measurements: each runs in a process of its own and gives a dictionary --


def speed(case: Case) -> dict[str, float]:
    """Both in turn; the first step of each is not counted. `instruments`: how much longer a step with the stability
    instruments takes, from turns of their own: a step is faster after one that left memory behind."""
    both = {name: Steps(name, case) for name in IMPLEMENTATIONS}
    for steps in both.values():
        steps.step()
    turns = [{name: steps.step() for name, steps in both.items()} for _ in range(case.turns)]
    fastest = {name: min(turn[name] for turn in turns) for name in both}
    first, second = (steps.losses[0] for steps in both.values())
    if abs(first - second) > 2e-3 * second:
        raise AssertionError(f"the same weights and batch gave losses {first} and {second}")
    return {
        "ratio": fastest["transformers"] / fastest["calumma"],
        "seconds": fastest["calumma"],
        "their_seconds": fastest["transformers"],
        "instruments": instruments(both["calumma"], case.turns),
        "products": products(both["calumma"], case.turns),
        "loss": first,
        "their_loss": second,
    }


def instruments(steps: Steps, turns: int) -> float:
    """The share by which the fastest measured step is slower than the fastest other one."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(-1, 2 * turns):
        for measured in (False, True):
            taken = steps.step(measure=measured)
            if turn >= 0:
                seconds[measured].append(taken)
    return min(seconds[True]) / min(seconds[False]) - 1


def products(steps: Steps, turns: int) -> float:
    """Fewest seconds that a step spent in matrix products, by PyTorch's profiler: none of them can be left out."""
    spent, field = [], "self_device_time_total" if steps.tokens.is_cuda else "self_cpu_time_total"
    for _ in range(turns):
        with torch.profiler.profile() as profile:
            steps.step()
        found = [e for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_")]
        spent.append(sum(getattr(e, field) for e in found) / 1e6)
    return min(spent)


def memory(case: Case, implementation: str) -> dict[str, float]:
    """Peak bytes of two steps, optimizer state included: of the process, or of what was allocated on the GPU."""
    steps = Steps(implementation, case)
    for _ in range(2):
        steps.step()
    if case.device == "cuda":
        return {"bytes": float(torch.cuda.max_memory_allocated())}
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def utilization(case: Case) -> dict[str, float]:
    """The step's operations a second over those of the best matrix product, measured before and after it."""
    before = ceiling(case)
    steps = Steps("calumma", case)
    steps.step()
    seconds = min(steps.step() for _ in range(case.turns))
    limit = max(before, ceiling(case))
    return {"achieved": case.operations / seconds, "ceiling": limit, "share": case.operations / seconds / limit}


def ceiling(case: Case, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second of the fastest of some matrix products of the case's dtype, sized like the model's."""
    dtype, best = getattr(torch, case.dtype), 0.0
    width, ffn = case.config.width, case.config.ffn_width
    for m, k, n in [
        (case.tokens, width, ffn),
        (case.tokens, width, width),
        (4096, 4096, 4096),
        (case.tokens, ffn, width),
    ]:
        a, b = (torch.randn(*shape, device=case.device).to(dtype) for shape in ((m, k), (k, n)))
        out = torch.empty(m, n, device=case.device, dtype=dtype)
        for _ in range(3):
            if case.device == "cuda":
                torch.cuda.synchronize()
            began = clock()
            torch.mm(a, b, out=out)
            if case.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2.0 * m * k * n / (clock() - began))
    return best


MEASUREMENTS: dict[str, Callable[..., dict[str, float]]] = {
    "speed": speed,
    "memory": memory,
    "utilization": utilization,
}


def measure(kind: str, case: Case, **options: str) -> dict[str, float]:
    """Run a measurement in a fresh process."""
    request = json.dumps({"kind": kind, "case": asdict(case), "options": options})
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", request]
    # glibc keeps one arena: how much of what was freed stays with the process would otherwise be chance
    settings = {"MALLOC_ARENA_MAX": "1", "KINETO_LOG_LEVEL": "99"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | settings)
    if done.returncode:
        raise SystemExit(f"{kind} of {case.name} {options or ''} failed with exit code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- the table --


def cases(device: str, quick: bool) -> tuple[list[Case], list[Case]]:
    """What is compared, and what is held against the limit."""
    if quick:
        tiny = Case("calumma-20m", 1, 64, 128, "float32", turns=1, device=device, vocabulary=512)
        return [tiny], [tiny]
    if device == "cuda":
        compared = [
            Case("calumma-1.3b", 8, context, 8192, "bfloat16", turns=10, device=device, compile=compiled)
            for context in (512, 2048)
            for compiled in (False, True)
        ]
        return compared, [Case("chameleon-7b", 4, 4096, 16384, "bfloat16", turns=10, device=device, compile=True)]
    contexts = (512, 2048)
    compared = [Case("calumma-20m", 12, context, 2048, "float32", turns=5) for context in contexts]
    compared += [Case("calumma-125m", 2, context, 2048, "bfloat16", turns=5) for context in contexts]
    compared += [Case("calumma-125m", 2, context, 2048, "float32", turns=5) for context in contexts]
    return compared, [Case("calumma-350m", 2, 512, 2048, dtype) for dtype in ("float32", "bfloat16")]


def verdict(value: float, target: float, below: bool = False) -> str:
    reached = value <= target if below else value >= target
    return f"{'<=' if below else '>='} {target:g} {'reached' if reached else 'NOT reached'}"


Row = tuple[str, str, str, str]


def report(device: str, quick: bool, part: str) -> Iterator[Row]:
    """Rows of (case, what is measured, what was found, target), as they are found."""
    compared, limited = cases(device, quick)
    for case in compared if part != "limit" else []:
        yield from side_by_side(case)
    for case in limited if part != "compared" else []:
        found = measure("utilization", case)
        rates = f"{found['achieved'] / 1e9:,.0f} of {found['ceiling'] / 1e9:,.0f} GFLOP/s"
        # the target is set for float32 on the CPU, for bfloat16 and compiled blocks on a GPU
        asked = device == "cuda" or case.dtype == "float32"
        wanted = verdict(found["share"], 0.55 if device == "cuda" else 0.6) if asked else "for information"
        yield case.name, "FLOP/s over the matmul ceiling", f"{found['share']:.0%} ({rates})", wanted
    if device == "cuda" and not quick and part != "compared":
        whole = Case("chameleon-7b", 32, 4096, 4096, "bfloat16", device="cuda", checkpoint=True, turns=1)
        used = measure("memory", whole, implementation="calumma")["bytes"]
        name = "all of chameleon-7b, context 4096, bfloat16 weights and optimizer state, activations recomputed"
        yield name, "peak memory on the GPU", f"{used / 1e9:.1f} GB", verdict(used / H200_BYTES, 1.0, below=True)


def side_by_side(case: Case) -> Iterator[Row]:
    name = case.name + (", blocks compiled (ours)" if case.compile else "")
    fast = measure("speed", case)
    ours_second, theirs_second = (case.tokens / fast[key] for key in ("seconds", "their_seconds"))
    rates = f"{fast['ratio']:.2f} ({ours_second:,.0f} : {theirs_second:,.0f})"
    yield name, "tokens/s over transformers'", rates, verdict(fast["ratio"], 1.5)
    used, others = (measure("memory", case, implementation=each)["bytes"] for each in ("calumma", "transformers"))
    sizes = f"{used / others:.2f} ({used / 1e9:.2f} : {others / 1e9:.2f} GB)"
    yield name, "peak memory over transformers'", sizes, verdict(used / others, 0.6, below=True)
    bound = f"{fast['products'] / fast['seconds']:.0%}; {fast['their_seconds'] / fast['products']:.2f}"
    yield name, "matrix products, of a step; tokens/s over transformers' if it were nothing else", bound, "the bound"
    yield name, "time of the stability instruments, of a step", f"{fast['instruments']:+.1%}", "cheap"
    yield name, "loss of the first step", f"{fast['loss']:.4f} : {fast['their_loss']:.4f}", "equal"


def machine(device: str) -> str:
    found = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in _cpu_information() if ":" in line}
    name = torch.cuda.get_device_name() if device == "cuda" else found.get("model name", platform.processor())
    bf16 = ", amx_bf16" if "amx_bf16" in found.get("flags", "") else ""
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in ("torch", "transformers"))
    return f"{name}{bf16 if device == 'cpu' else ''}, {torch.get_num_threads()} threads; {versions}"


def _cpu_information() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether the script works, not how fast")
    parser.add_argument("--part", choices=["all", "compared", "limit"], default="all", help="side by side, or limits")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        request = json.loads(given.measure)
        found = MEASUREMENTS[request["kind"]](Case(**request["case"]), **request["options"])
        print(json.dumps(found))
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no CUDA device here")
    print(f"Machine: {machine(given.device)}\n")
    print("| case | measured | calumma | target |\n| --- | --- | --- | --- |")
    for row in report(given.device, given.quick, given.part):
        print(f"| {' | '.join(row)} |", flush=True)
    if given.device == "cpu":
        print(
            "\nSkipped: bfloat16 with compiled blocks against transformers, model FLOP utilization with the 7B's layer "
            "shapes, and the memory of training the whole 7B: PyTorch finds no CUDA device here."
        )


if __name__ == "__main__":
    main()
