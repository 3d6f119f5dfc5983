"""What one GPU does with the 7B's shapes, in ten minutes: `python benchmarks/gpu.py`. No Ray, no cluster, no data.

From a checkout, with Python 3.11 or later: `pip install torch pydantic pillow`, and torchao for float8. Weights and
tokens are random. Four parts, each in a process of its own, so that one that fails costs itself alone:

parity    every attention kernel installed, and the paged decoder, beside plain arithmetic in float64
training  model FLOP utilization of some of the 7B's layers, plain, compiled, and compiled with float8 matrix products
decode    the engine's text: tokens a second, one request and sixteen
images    the engine's guided images: seconds for one, images a minute together

One table on the screen, and all numbers in a JSON file. On a CPU, or with `--quick`, the shapes are tiny: then it only
shows that the script works.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if "calumma" not in sys.modules:  # a checkout that is not installed: its folders are the package's
    package = types.ModuleType("calumma")
    package.__path__ = [str(ROOT)]
    sys.modules["calumma"] = package

try:
    import torch
    from torch import Tensor

    from calumma.model.config import ModelConfig
    from calumma.model.devices import find_gpu
    from calumma.model.generation import Engine, Request, SamplingParams
    from calumma.model.generation.attention import dense
    from calumma.model.generation.attention.choice import readers
    from calumma.model.generation.attention.packages import FLASH_PAGE
    from calumma.model.generation.attention.paged import PageReader, RecordableReader
    from calumma.model.generation.cache.paged import PagedCache
    from calumma.model.ops.attention import attend, document_mask
    from calumma.model.ops.native import NativeKernels
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install torch pydantic pillow") from error

training = importlib.import_module("model")  # benchmarks/model.py: a script's own folder comes first
engines = importlib.import_module("engine")

LIMITS = {"parity": 80.0, "training": 270.0, "decode": 110.0, "images": 140.0}  # seconds; most of it is compiling
PARTS = tuple(LIMITS)
Row = dict[str, Any]  # part, case, measured, value, unit; ok where there is a right and a wrong


# -- parity --


def reference(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, sees_BTT: Tensor) -> Tensor:
    """Attention as it is defined, in float64 on the CPU: [B, N, T, H]."""
    q, k, v = (each.double().cpu() for each in (q_BNTH, k_BKTH, v_BKTH))
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return logits.masked_fill(~sees_BTT[:, None].cpu(), float("-inf")).softmax(-1) @ v


def kernels() -> Iterator[tuple[str, Any]]:
    """PyTorch's kernels of scaled dot-product attention, each alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        if (kind := getattr(SDPBackend, name, None)) is not None:
            yield name.lower().replace("_", " "), lambda kind=kind: sdpa_kernel(kind)


def parity(device: str, quick: bool) -> Iterator[Row]:
    T, H = (32, 16) if quick else (512, 128)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    segments_BT = torch.sort(torch.randint(0, 4, (2, T), generator=generator))[0].to(device)
    causal_BTT = torch.ones(2, T, T, dtype=torch.bool, device=device).tril()
    same_BTT = causal_BTT & (segments_BT[:, :, None] == segments_BT[:, None])
    for heads, kv_heads in ((4, 4), (8, 2)):
        q_BNTH, k_BKTH, v_BKTH = (
            torch.randn(2, count, T, H, generator=generator).to(device, dtype) for count in (heads, kv_heads, kv_heads)
        )
        q, k, v = q_BNTH, k_BKTH, v_BKTH
        shape, exact = f"{heads} heads on {kv_heads}", reference(q, k, v, causal_BTT)
        for name, alone in kernels():
            yield compared(f"{name}, causal, {shape}", exact, _under, alone, attend, q, k, v, None)
        within = reference(q, k, v, same_BTT)
        yield compared(f"dense mask, documents, {shape}", within, attend, q, k, v, document_mask(segments_BT, "dense"))
        if device != "cpu":
            blocks = document_mask(segments_BT, "flex")
            yield compared(f"FlexAttention, documents, {shape}", within, attend, q, k, v, blocks)
        yield from reader_parity(device, dtype, heads, kv_heads)
        bias_B11T = torch.zeros(2, 1, 1, T, device=device, dtype=dtype)
        for function in (dense.attend_fused, dense.attend_by_products):
            name = f"decoder's {function.__name__.removeprefix('attend_')}, {shape}"
            yield compared(name, exact[:, :, -1].flatten(1), function, q[:, :, -1], k, v, bias_B11T)
    yield from paged_parity(device, quick)


def reader_parity(device: str, dtype: torch.dtype, heads: int, kv_heads: int) -> Iterator[Row]:
    """What reads pages where they are, of all that is installed: prompts and single tokens side by side, and single
    ones as a recorded pass asks for them."""
    config = ModelConfig(layers=1, width=heads * 64, heads=heads, kv_heads=kv_heads, ffn_width=8)
    generator = torch.Generator().manual_seed(1)
    for page in (32, FLASH_PAGE):
        cache = PagedCache(config, 12, page, device, dtype)
        cache.store.copy_(torch.randn(cache.store.shape, generator=generator))
        tables, counts, lengths = [[7, 2, 11], [7, 5], [3, 1], [10]], [1, 40, 1, 9], [2 * page + 3, page + 9, page, 9]
        q_TNH = torch.randn(sum(counts), heads, 64, generator=generator).to(device, dtype)
        exact = torch.cat([
            reference(*(each.transpose(0, 1)[None] for each in (q, *found)), _last(len(q), length))[0].transpose(0, 1)
            for q, table, length in zip(q_TNH.split(counts), tables, lengths, strict=True)
            for found in [[each[table].flatten(0, 1)[:length] for each in cache.by_block[0]]]
        ]).flatten(1)  # fmt: skip
        native = NativeKernels.of(cache.store)
        for name, reader in readers(cache, heads, native):
            told = f"{name} by pages of {page}, {heads} heads on {kv_heads}"
            yield compared(told, exact, _by_pages, reader, cache, tables, counts, lengths, q_TNH)
            if isinstance(reader, RecordableReader):
                last_B = torch.tensor(counts, device=device).cumsum(0) - 1
                padded = torch.tensor([(own + [0] * 3)[:3] for own in tables], device=device)
                at_B = torch.tensor(lengths, device=device) - 1
                told = f"{told}, as recorded"
                yield compared(told, exact[last_B.cpu()], _as_recorded, reader, cache, padded, at_B, q_TNH[last_B])


def _by_pages(reader: PageReader, cache: PagedCache, *given: Any) -> Tensor:
    *batch, q_TNH = given
    return reader.prepare(cache, *batch)(0, q_TNH)


def _as_recorded(reader: RecordableReader, cache: PagedCache, tables: Tensor, at_B: Tensor, q_BNH: Tensor) -> Tensor:
    return reader.prepare_fixed(cache, tables, at_B)(0, q_BNH)


def _last(tokens: int, length: int) -> Tensor:
    """BoolTensor [1, tokens, length]: what the last tokens of a sequence see."""
    return (torch.arange(length) <= torch.arange(length - tokens, length)[:, None])[None]


def paged_parity(device: str, quick: bool) -> Iterator[Row]:
    """Greedy answers through the paged cache, beside whole passes of the Transformer."""
    shapes = shapes_of(device, True)
    shapes = replace(shapes, dtype="float32")
    vocabulary, model = shapes.ids(text_only=True), engines.fresh(shapes)
    prompts = shapes.prompts(2)
    for graphs in (False, True) if device != "cpu" else (False,):
        engine = Engine(model, vocabulary, shapes.image, 2, prefix_cache=False, cuda_graphs=graphs)
        params = SamplingParams(shapes.answer, text=engines.GREEDY)
        _, events = engines.run(engine, [Request(str(n), prompt, params) for n, prompt in enumerate(prompts)])
        right = total = 0
        for number, prompt in enumerate(prompts):
            answer = [token for event in events if event.request_id == str(number) for token in event.tokens]
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *answer]], device=device))[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
            allowed = logits[:, vocabulary.size // 2 :].amax(1)  # text, which every answer may take
            right += int((chosen >= allowed - 1e-3).sum())
            total += len(answer)
        name = f"paged decoder{', recorded' if graphs else ''}: greedy tokens that whole passes choose too"
        yield {"case": name, "measured": "share", "value": right / total, "unit": "", "ok": right == total}


def compared(name: str, exact: Tensor, function: Callable[..., Tensor], *given: Any) -> Row:
    """The largest error over the largest value; a kernel that is not installed, or does not take these shapes, is said
    to be so."""
    try:
        found = function(*given)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:80]
        return {"case": name, "measured": "not here", "value": None, "unit": reason}
    error = float((found.double().cpu() - exact).abs().max() / exact.abs().max())
    limit = 1e-5 if found.dtype == torch.float32 else 2e-2
    return {"case": name, "measured": "error", "value": error, "unit": f"limit {limit:g}", "ok": error <= limit}


def _under(alone: Callable[[], Any], function: Callable[..., Tensor], *given: Any) -> Tensor:
    with alone():
        return function(*given)


# -- training --


def utilization(device: str, quick: bool) -> Iterator[Row]:
    """Forward, loss, backward and AdamW (fused), in bfloat16, of the 7B's first layers with its whole vocabulary."""
    if quick:
        case = training.Case("calumma-20m", 1, 32, 64, "float32", device=device, vocabulary=512)
    else:
        case = training.Case("chameleon-7b", 8, 4096, 8192, "bfloat16", device=device)
    found = find_gpu(torch.cuda.get_device_name()) if device == "cuda" else None
    variants = [("plain", False, False, False), ("compiled", True, False, False)]
    variants += [("compiled, recomputed", True, True, False), ("compiled, float8", True, False, True)]
    for name, compiled, recomputed, float8 in variants[:1] if quick else variants:
        told = f"{case.preset}, {case.layers} layers, {case.tokens} tokens of {case.context}: {name}"
        if float8 and (reason := float8_missing(device)):
            yield {"case": told, "measured": "not here", "value": None, "unit": reason}
            continue
        yield from _steps(
            replace(case, checkpoint=recomputed), told, compiled, float8, found[1].bfloat16 if found else None
        )


def _steps(case: Any, name: str, compiled: bool, float8: bool, peak: float | None) -> Iterator[Row]:
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = training.ours(replace(case, compile=False))
    if float8:
        from torchao.float8 import convert_to_float8_training

        for block in model.blocks:
            convert_to_float8_training(block)
    if compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=case.device == "cuda")
    tokens, seconds = case.batch(), []
    for turn in range(2 if case.device == "cpu" else 8):
        began = time.perf_counter()
        loss = training.our_loss(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if case.device == "cuda":
            torch.cuda.synchronize()
        if turn:
            seconds.append(time.perf_counter() - began)
    fastest = min(seconds)
    yield {"case": name, "measured": "tokens a second", "value": case.tokens / fastest, "unit": ""}
    yield {"case": name, "measured": "TFLOP/s", "value": case.operations / fastest / 1e12, "unit": "causal attention"}
    if peak:
        told = "of the bfloat16 peak on the data sheet"
        yield {"case": name, "measured": "MFU", "value": case.operations / fastest / peak, "unit": told}
    if case.device == "cuda":
        value = torch.cuda.max_memory_allocated() / 1e9
        yield {"case": name, "measured": "memory", "value": value, "unit": "GB"}
    finite = bool(torch.isfinite(loss))
    yield {"case": name, "measured": "loss", "value": float(loss.detach()), "unit": "", "ok": finite}


def float8_missing(device: str) -> str:
    """Why there is no float8, empty where there is."""
    try:
        importlib.import_module("torchao.float8")
    except ImportError as error:
        return f"torchao: {error}"
    if device == "cpu" or torch.cuda.get_device_capability() < (8, 9):
        return "this device has no float8"
    return ""


# -- the engine --


def shapes_of(device: str, quick: bool) -> Any:
    if quick:
        return engines.Shapes("calumma-20m", 1, 512, 16, 8, 8, device, "float32", 1, together=3)
    return engines.Shapes("chameleon-7b", 32, 65536, 1024, 256, 256, device, "bfloat16", 1)


def decode(device: str, quick: bool) -> Iterator[Row]:
    shapes = shapes_of(device, quick)
    vocabulary, model = shapes.ids(text_only=True), engines.fresh(shapes)
    params = SamplingParams(shapes.answer, text=engines.GREEDY)
    for count in (1, shapes.together):
        engine = Engine(model, vocabulary, shapes.image, count, prefix_cache=False)
        requests = [Request(str(n), prompt, params) for n, prompt in enumerate(shapes.prompts(count))]
        seconds = min(engines.run(engine, requests)[0] for _ in range(2))
        name = f"{shapes.name}, text, {count} at once, {shapes.prompt} + {shapes.answer} tokens"
        yield {"case": name, "measured": "tokens a second", "value": count * shapes.answer / seconds, "unit": ""}
        del engine


def images(device: str, quick: bool) -> Iterator[Row]:
    """With guidance: three branches an image."""
    shapes = shapes_of(device, quick)
    vocabulary, model = shapes.ids(text_only=False), engines.fresh(shapes)
    for count in (1, shapes.together):
        engine = Engine(model, vocabulary, shapes.image, count, prefix_cache=False)
        requests = [
            Request(str(n), prompt, SamplingParams(mode="image", seed=n))
            for n, prompt in enumerate(shapes.prompts(count))
        ]
        seconds = min(engines.run(engine, requests)[0] for _ in range(2))
        name = f"{shapes.name}, guided images of {shapes.image} codes, {count} at once"
        yield {"case": name, "measured": "seconds", "value": seconds, "unit": ""}
        yield {"case": name, "measured": "images a minute", "value": 60 * count / seconds, "unit": ""}
        del engine


# -- the table --

RUN: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "parity": parity,
    "training": utilization,
    "decode": decode,
    "images": images,
}


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": "CPU"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        facts |= {"cuda": torch.version.cuda}
    return facts


def part_rows(part: str, device: str, quick: bool) -> list[Row]:
    """A part's rows, measured in a process of its own but for tiny shapes; a row that says so where it failed or took
    too long."""
    if quick:
        return [{"part": part} | row for row in RUN[part](device, quick)]
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--device", device]
    command += ["--quick"] if quick else []
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMITS[part])
        lines, failed = done.stdout.splitlines(), f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        lines = (output if isinstance(output, str) else output.decode()).splitlines()
        failed = f"not done after {LIMITS[part]:g} s"
    found = [json.loads(line) for line in lines if line.startswith("{")]
    if failed:
        found.append({"case": part, "measured": "failed", "value": None, "unit": failed, "ok": False})
    return [{"part": part} | row for row in found]


def shown(row: Row) -> str:
    value = row["value"]
    number = "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    state = {True: "right", False: "WRONG", None: ""}[row.get("ok")]
    return f"| {row['part']} | {row['case']} | {row['measured']} | {number} | {row['unit']} | {state} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether the script works, not how fast")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part alone; may be given again")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="where the numbers go (default gpu.json)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not cuda:
        parser.error("PyTorch sees no CUDA device here; leave --device away for tiny shapes on the CPU")
    quick = given.quick or given.device == "cpu"
    if given.part:
        for row in RUN[given.part](given.device, quick):
            print(json.dumps(row), flush=True)
        return
    facts, rows = machine(given.device), list[Row]()
    print(f"{facts}{' (tiny shapes)' if quick else ''}\n", flush=True)
    print("| part | case | measured | value | | |\n| --- | --- | --- | ---: | --- | --- |", flush=True)
    for part in given.only or PARTS:
        for row in part_rows(part, given.device, quick):
            print(shown(row), flush=True)
            rows.append(row)
    given.output.write_text(json.dumps({"machine": facts, "tiny": quick, "rows": rows}, indent=1) + "\n")
    print(f"\nnumbers: {given.output}")
    if any(row.get("ok") is False for row in rows):
        raise SystemExit("some of it is wrong or failed: see the table")


if __name__ == "__main__":
    main()
