"""Training under Ray Train and DeepSpeed beside a bare PyTorch loop of the same model: `python benchmarks/training.py`.

The whole stage runs (`run_stage`: data through Ray Data, metrics, checkpoints), with one worker and with two; the bare
loop takes the same steps of the same micro-batches in a process of its own, and two such loops side by side show what
the machine leaves of twice one's speed. On a CPU each has one thread, so that Ray's
own processes, which a training node has cores for, do not count as the loop's. Each counts with its fastest intervals
of ten steps: a neighbour on the machine only ever slows one down. Further: the share of a step that waits for data, how
long a checkpoint stops training beside a plain `torch.save` of the same state, and the time from kill -9 of a worker
to the next optimizer step. On a GPU: `--gpus 1 --preset calumma-1.3b`, model FLOP utilization of the full loop.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.document import Document, Text
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.transformer import Transformer
from calumma.platform import storage
from calumma.platform.cluster import capacity, connection
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards.row_groups import RowGroupReader
from calumma.platform.specification import Tracking
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing.specification import TextTokenizerSpecification, TokenizeSpecification
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.group.worker import THREADS_VARIABLE
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.standby.copies import Copies
from calumma.platform.training.standby.keeper import Keeper
from calumma.platform.training.steps import engine, held_out

SMALL = {"layers": 6, "width": 256, "heads": 4, "kv_heads": 4, "ffn_width": 768}
CODES = 16
FASTEST = 3  # intervals whose median counts
SPARE_SECONDS = 4  # of a processor that a spare has used before it waits


def corpus(root: str, context: int, micro_batch: int) -> None:
    """Python's reference text, tokenized into packed shards, with the tokenizers that a stage asks for."""
    from calumma.platform.tokenizing.actor import TokenizingActor
    from calumma.platform.tokenizing.text_tokenizer import train_text_tokenizer

    documents = [Document((Text(text),)) for text in pydoc_data.topics.topics.values()]
    data = document_shards.to_parquet(documents)
    storage.write_bytes(f"{root}/curated/text/documents.parquet", data)
    entry = FileEntry.from_bytes("documents.parquet", data, rows=len(documents))
    Manifest(kind="curated", files=[entry]).write(f"{root}/curated/text")
    spec = TextTokenizerSpecification(
        storage=root, tracking=_tracking(root), documents=["curated/text"], vocabulary_size=2048, image_codes=CODES
    )
    with job_run(spec) as run:
        train_text_tokenizer(spec, run, no_progress)
    shape = ImageTokenizerConfig(
        resolution=8, codebook_size=CODES, embedding=4, base_channels=4, multipliers=[1, 1], residual_blocks=1
    )
    ImageTokenizer(shape).save(f"{root}/tokenizers/image")
    tokenize = TokenizeSpecification(storage=root, documents=["curated/text"], context=context, micro_batch=micro_batch)
    made = TokenizingActor(tokenize.model_dump(mode="json"))(
        {
            "shards": document_shards.shards(f"{root}/curated/text"),
            "seed": 0,
            "output": f"{root}/tokens/text",
            "shard_prefix": "tokens",
            "receipt": f"{root}/receipt.json",
        },
    )
    files = [FileEntry.model_validate(found) for found in made["files"]]
    Manifest(kind="tokens", files=files, specification=tokenize.model_dump(mode="json")).write(f"{root}/tokens/text")


def _tracking(root: str) -> Tracking:
    return Tracking(uri=f"{root}/mlflow")


def specification(root: str, given: argparse.Namespace, **fields: Any) -> PretrainSpecification:
    shape = {"preset": given.preset} if given.preset else SMALL
    values: dict[str, Any] = {
        "storage": root,
        "tracking": {"uri": f"{root}/mlflow"},
        "resources": {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 1 if given.gpus else 0},
        "mixture": {"tokens/text": 1.0},
        "output": "stages/one",
        "model": {**shape, "context": given.context, "dropout": 0.0, "vocabulary_size": 0},
        "steps": given.steps,
        "micro_batches": given.micro_batches,
        "optimizer": {"learning_rate": 3e-4},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "precision": "bfloat16" if given.gpus else "float32",
        "compile": bool(given.gpus),
        "zero_stage": 1,
        "checkpoint_every": given.steps,
    }
    return PretrainSpecification.model_validate(values | fields)


# -- the bare loop, in a process of its own --


def bare(root: str, given: argparse.Namespace, threads: int) -> dict[str, float]:
    """Tokens a second of the fastest intervals, and the seconds of a plain `torch.save` of model and optimizer."""
    from calumma.platform.streaming.plan import Plan

    spec = specification(root, given)
    torch.set_num_threads(threads)
    device = torch.device("cuda" if given.gpus else "cpu")
    assert spec.model is not None
    size = json.loads(Path(root, "tokenizers/text/vocabulary.json").read_text())["size"]
    transformer = Transformer(spec.model.model_copy(update={"vocabulary_size": size})).initialize(0).to(device)
    if spec.compiled:
        transformer.compile_blocks()
    o = spec.optimizer
    groups = engine.parameter_groups(transformer, o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps)
    place = f"{root}/tokens/text"
    plan = Plan(spec.seed, {place: 1.0}, {place: Manifest.read(place)}, spec.micro_batches)
    image_mask_V = torch.zeros(size, dtype=torch.bool, device=device)
    reader = RowGroupReader(plan.context)
    steps = [[held_out.read_row_group(reader, found) for found in plan.step(step)] for step in range(given.steps)]
    speeds, began, tokens = [], time.perf_counter(), 0
    for done, batches in enumerate(steps, start=1):
        trained = sum(int(batch.mask[:, 1:].sum()) for batch in batches)
        for batch in batches:
            tokens_BT, mask, segments = (x.to(device) for x in (batch.tokens, batch.mask, batch.segments))
            with torch.autocast(device.type, torch.bfloat16, enabled=spec.precision == "bfloat16"):
                found = transformer(
                    tokens_BT[:, :-1],
                    segments[:, :-1],
                    targets=tokens_BT[:, 1:],
                    mask=mask[:, 1:],
                    image_mask=image_mask_V,
                    z_loss=spec.z_loss,
                    normalizer=max(trained, 1),
                )
            found.total.backward()
            tokens += int((segments[:, 1:] >= 0).sum())
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), o.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if given.gpus:
            torch.cuda.synchronize()
        if done % spec.log_every == 0:
            now = time.perf_counter()
            speeds.append(tokens / (now - began))
            began, tokens = now, 0
    return {"tokens_per_second": fastest(speeds)}


def stalls(given: argparse.Namespace, threads: int) -> dict[str, float]:
    """How long a checkpoint stops training, beside `torch.save` of the same state to the same disk."""
    from calumma.platform.training.checkpoints.saver import Saver

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if given.gpus else "cpu")
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="calumma-benchmark-", dir=given.folder) as folder:
        backend = "nccl" if given.gpus else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        spec = specification(folder, given)
        shape = ModelConfig.model_validate({"preset": given.preset or "calumma-20m", "context": 64})
        run = engine.initialize(Transformer(shape).initialize(0), spec, 1)
        tokens = torch.zeros(1, 9, dtype=torch.long, device=run.device)
        mask = torch.zeros(shape.vocabulary_size, dtype=torch.bool, device=run.device)
        batch = held_out.HeldOutBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens))
        engine.step(run, [batch], engine.Counts(8, 0, 8), mask, 0.0, 1)  # brings the optimizer's state into being
        state = {
            "module": run.module_state_dict(),
            "optimizer": run.optimizer.state_dict(),
        }
        stopped, plain, whole = [], [], []
        with Saver(spec, {}) as saver:
            for turn in range(given.turns + 1):
                began = time.perf_counter()
                torch.save(state, Path(folder, "plain.pt"))
                plain.append(time.perf_counter() - began)
                began = time.perf_counter()
                report = {"step": turn, "schedule_step": turn, "tokens": {}}
                saver.save(run, catalog.checkpoint_uri(folder, turn), report)
                stopped.append(time.perf_counter() - began)
                saver.wait_until_published()
                whole.append(time.perf_counter() - began)
                storage.delete(catalog.checkpoint_uri(folder, turn))
        size = Path(folder, "plain.pt").stat().st_size
        keeper, held = Keeper("here"), []
        copies = Copies(lambda: [keeper], every=1, first=0)
        for turn in range(1, given.turns + 3):
            began = time.perf_counter()
            copies.after_step(run, turn, {"step": turn})
            held.append(time.perf_counter() - began)
        keeper.close()
    # the first copy also allocates the memory that the others use again
    return {
        "stall": min(stopped[1:]),
        "first": stopped[0],
        "plain": min(plain[1:]),
        "published": min(whole[1:]),
        "held": min(held[2:]),  # the first two fill their slots' pages
        "bytes": float(size),
    }


# -- the stage, under Ray Train --


def fastest(speeds: list[float]) -> float:
    return statistics.median(sorted(speeds)[-FASTEST:])


def history(run: Run, name: str) -> list[float]:
    """Values by step, without the first: it compiles, allocates, and fills buffers."""
    return [m.value for m in sorted(run.client.get_metric_history(run.id, name), key=lambda m: m.step)][1:]


def whole_stage(root: str, given: argparse.Namespace, workers: int) -> dict[str, float]:
    from calumma.platform.training.stage import run_stage

    spec = specification(root, given, output=f"stages/{workers}")
    resources = spec.resources.model_copy(update={"workers": workers})
    spec = spec.model_copy(update={"resources": resources})
    with job_run(spec) as run:
        run_stage(spec, run, no_progress)
    data, compute = (history(run, f"seconds/{name}") for name in ("data", "compute"))
    found = {
        "tokens_per_second": fastest(history(run, "tokens_per_second")),
        "waiting": sum(data) / max(sum(data) + sum(compute), 1e-9),
    }
    if utilization := history(run, "mfu"):
        found["mfu"] = fastest(utilization)
    return found


def killed(root: str, given: argparse.Namespace, recovery: dict[str, Any], workers: int) -> dict[str, float]:
    """Seconds from kill -9 of a worker to the end of the next optimizer step, those of a step, and steps that were
    taken twice. Where there are spares, once one has imported and rehearsed all."""
    from calumma.platform.training.stage import run_stage

    every, output = 5, f"stages/killed-{len(recovery)}"
    spec = specification(root, given, output=output, steps=80, checkpoint_every=every, log_every=1)
    resources = spec.resources.model_dump() | {"recovery": recovery, "workers": workers}
    spec = PretrainSpecification.model_validate(spec.model_dump() | {"resources": resources})
    place, at = spec.locate(output), list[float]()

    def found() -> list[psutil.Process]:
        alive = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # which has just ended
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    alive.append((process.create_time(), process))
        return [process for _, process in sorted(alive, key=lambda each: each[0])]

    def ready() -> bool:
        if catalog.newest_step(place) < every:
            return False
        spares = found()[workers:]
        waiting = [p for p in spares if sum(p.cpu_times()[:2]) > SPARE_SECONDS and p.cpu_percent(3.0) < 5]
        return bool(waiting) or not recovery.get("spares")

    def kill() -> None:
        at.append(time.time())
        found()[0].kill()

    once(ready, kill)
    with job_run(spec) as run:
        manifest = run_stage(spec, run, no_progress)
    (moment,) = at
    history = sorted(run.client.get_metric_history(run.id, "loss"), key=lambda m: m.timestamp)
    before = [m.step for m in history if m.timestamp / 1000 <= moment]
    after = [m.timestamp / 1000 for m in history if m.timestamp / 1000 > moment]
    # what was still on its way to MLflow when the worker died comes at once; the new group's first step after a gap
    gaps = [(later - earlier, later) for earlier, later in zip([moment, *after], after, strict=False)]
    seconds, lost = max(gaps)[1] - moment, max(before) - manifest.report["groups"][-1]["step"]
    return {"seconds": seconds, "lost": lost, "step": statistics.median(gap for gap, _ in gaps)}


def once(happened: Callable[[], bool], act: Callable[[], None]) -> None:
    def wait() -> None:
        while not happened():
            time.sleep(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()


def in_a_process(what: str, root: str, threads: int) -> dict[str, float]:
    (found,) = in_processes(1, what, root, threads)
    return found


def in_processes(number: int, what: str, root: str, threads: int) -> list[dict[str, float]]:
    """The same in so many processes at once, which know nothing of each other."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", what, "--root", root, "--threads", str(threads)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    printed = [process.communicate()[0] for process in started]
    if failed := [process.returncode for process in started if process.returncode]:
        raise SystemExit(f"{what} failed with exit code {failed[0]}")
    return [json.loads(output.splitlines()[-1]) for output in printed]


def verdict(value: float, target: float, below: bool = False) -> str:
    reached = value <= target if below else value >= target
    return f"{'<=' if below else '>='} {target:g} {'reached' if reached else 'NOT reached'}"


def table(root: str, given: argparse.Namespace) -> None:
    print("| what | measured | target |\n|---|---|---|", flush=True)

    def row(what: str, found: str, target: str = "") -> None:
        print(f"| {what} | {found} | {target} |", flush=True)

    cores = capacity.cores()
    stall = in_a_process("stalls", root, cores)
    ratio = stall["stall"] / stall["plain"]
    row("state of a checkpoint", f"{stall['bytes'] / 1e6:.0f} MB")
    row("plain torch.save of the same", f"{stall['plain']:.3f} s")
    row("training stands still", f"{stall['stall']:.3f} s, {ratio:.3f} of it", verdict(ratio, 0.25, below=True))
    row("the same, first checkpoint of a process", f"{stall['first']:.3f} s")
    row("until it is published", f"{stall['published']:.3f} s")
    row(
        "training stands still for a copy in memory",
        f"{stall['held']:.3f} s, {stall['held'] / stall['plain']:.3f} of it",
    )
    if given.only == "stalls":
        return
    corpus(root, given.context, given.micro_batch)
    threads = cores if given.gpus else 1
    os.environ[THREADS_VARIABLE] = str(threads)
    before = in_a_process("bare", root, threads)["tokens_per_second"]
    beside = [] if given.gpus == 1 else in_processes(2, "bare", root, threads)
    with connection.embedded(lean=True):
        one = whole_stage(root, given, 1)
        two = None if given.gpus == 1 else whole_stage(root, given, 2)
        group = 1 if given.gpus == 1 else 2
        kill = killed(root, given, {}, group)
        kept = killed(root, given, {"copy_every": 1, "spares": True}, group)
    loop = max(before, in_a_process("bare", root, threads)["tokens_per_second"])
    row("bare PyTorch loop", f"{loop:.0f} tokens/s")
    share = one["tokens_per_second"] / loop
    row("stage, one worker", f"{one['tokens_per_second']:.0f} tokens/s, {share:.3f} of it", verdict(share, 0.95))
    if two is not None:
        per = two["tokens_per_second"] / one["tokens_per_second"] / 2
        apart = sum(found["tokens_per_second"] for found in beside)
        row("two bare loops side by side", f"{apart:.0f} tokens/s, {apart / loop / 2:.3f} of twice as many as one")
        row("stage, two workers", f"{two['tokens_per_second']:.0f} tokens/s, {per:.3f} of twice one", verdict(per, 0.9))
    row("waiting for data", f"{one['waiting']:.2%} of a step", verdict(one["waiting"], 0.02, below=True))
    if given.gpus and "mfu" in one:
        row("model FLOP utilization", f"{one['mfu']:.1%}", "torchtitan: 33-39 % (H100, 8B)")
    for what, found, target in (
        (f"kill -9 of one of {group} to the next optimizer step", kill, ""),
        ("the same from memory, with a spare", kept, verdict(kept["seconds"], 2, below=True)),
    ):
        twice = f"{found['lost']} steps taken twice"
        row(what, f"{found['seconds']:.1f} s, of them {found['step']:.1f} s for that step; {twice}", target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences")
    parser.add_argument("--micro-batches", type=int, default=2, help="a step")
    parser.add_argument("--turns", type=int, default=5, help="checkpoints")
    parser.add_argument("--preset", help="a published shape instead of a small one")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--folder", help="where checkpoints are written; default: the temporary folder")
    parser.add_argument("--only", choices=["stalls"])
    parser.add_argument("--measure", choices=["bare", "stalls"], help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure == "bare":
        print(json.dumps(bare(given.root, given, given.threads)))
    elif given.measure == "stalls":
        print(json.dumps(stalls(given, given.threads)))
    else:
        with tempfile.TemporaryDirectory(prefix="calumma-benchmark-", dir=given.folder) as root:
            table(root, given)


if __name__ == "__main__":
    main()
