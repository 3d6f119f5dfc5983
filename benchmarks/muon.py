"""Muon beside AdamW: `python benchmarks/muon.py STORAGE [--steps 200]`, STORAGE that of `calumma quickstart --colour`.

The same model, from the same weights, takes the same batches of stage 1 of the recipe in colour, in this process and
without DeepSpeed, once with each optimizer and learning rate; the loss of every twenty steps (nats a token, as it is
trained) and the milliseconds of an optimizer's step and of all of it. `--busy`: one thread. torch's own Muon is
stepped once beside ours, on the same gradients, for its time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.shards.row_groups import RowGroupReader
from calumma.platform.storage.manifest import Manifest
from calumma.platform.streaming.plan import Plan
from calumma.platform.training.construction.sources import CodeRows
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine, held_out, muon, schedule

RECIPE = Path(__file__).parents[1] / "jobs" / "recipes" / "emoji" / "stage1.yaml"
TOLD = 20  # steps between two rows
RATES = {"adamw": (0.003, 0.006), "muon": (0.005, 0.01)}


def optimizer_of(kind: str, model: Transformer, spec: PretrainSpecification) -> torch.optim.Optimizer:
    o = spec.optimizer
    groups = engine.parameter_groups(model, o.weight_decay)
    settings: dict[str, Any] = {"lr": o.learning_rate, "betas": (o.beta1, o.beta2), "eps": o.eps}
    if kind == "muon":
        return muon.Muon(muon.groups(model, groups, o.momentum), **settings)
    return torch.optim.AdamW(groups, **settings)


def run(
    kind: str, rate: float, spec: PretrainSpecification, root: Path, steps: int
) -> tuple[list[float], float, float]:
    """(losses, milliseconds of the optimizer's step, milliseconds of a step)."""
    vocabulary = Vocabulary.model_validate_json((root / "tokenizers/text/vocabulary.json").read_text())
    assert spec.model is not None
    model = Transformer(spec.model.model_copy(update={"vocabulary_size": vocabulary.size})).initialize(spec.seed)
    with torch.no_grad():
        CodeRows(str(root / "tokenizers/image"), vocabulary.image_codes).settle(model.embedding.weight, spec.seed)
    image_mask_V = torch.zeros(vocabulary.size, dtype=torch.bool)
    image_mask_V[torch.tensor(vocabulary.image_codes)] = True
    manifests = {str(root / place): Manifest.read(str(root / place)) for place in spec.mixture}
    weights = {str(root / place): weight for place, weight in spec.mixture.items()}
    plan = Plan(spec.seed, weights, manifests, spec.micro_batches)
    reader, optimizer = RowGroupReader(plan.context), optimizer_of(kind, model, spec)
    torch.manual_seed(spec.seed)
    losses, stepping, began, total = list[float](), 0.0, time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, rate, spec.schedule, spec.schedule.total_steps or spec.steps)
        batches = [held_out.read_row_group(reader, found) for found in plan.step(step)]
        trained = sum(int(batch.mask[:, 1:].sum()) for batch in batches)
        for batch in batches:
            found = model(
                batch.tokens[:, :-1],
                batch.segments[:, :-1],
                targets=batch.tokens[:, 1:],
                mask=batch.mask[:, 1:],
                image_mask=image_mask_V,
                z_loss=spec.z_loss,
                normalizer=max(trained, 1),
            )
            found.total.backward()
            total += float(found.total.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer.gradient_clip)
        before = time.perf_counter()
        optimizer.step()
        stepping += time.perf_counter() - before
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % TOLD == 0:
            losses.append(total / TOLD)
            print(f"{kind} at {rate}: step {step + 1}, {losses[-1]:.3f}", flush=True)
            total = 0.0
    return losses, 1000 * stepping / steps, 1000 * (time.perf_counter() - began) / steps


def times(shape: ModelConfig) -> tuple[float, float]:
    """Milliseconds of one step of the blocks' matrices, ours and torch's, the least of three."""
    found = []
    for ours in (True, False):
        model = Transformer(shape).initialize(0)
        groups = [g for g in muon.groups(model, engine.parameter_groups(model, 0.1), None) if g["muon"]]
        matrices = [p for group in groups for p in group["params"]]
        optimizer = muon.Muon(groups, lr=0.01) if ours else torch.optim.Muon(matrices, lr=0.01)
        seconds = []
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn_like(matrix)
            before = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - before)
        found.append(1000 * min(seconds))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", type=Path, help="colour/storage, after `calumma quickstart --colour`")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--busy", action="store_true", help="one thread")
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    recipe = yaml.safe_load(RECIPE.read_text())
    spec = PretrainSpecification.model_validate(recipe | {"storage": str(options.storage)})
    assert spec.model is not None
    rows = {
        (kind, rate): run(kind, rate, spec, options.storage.absolute(), options.steps)
        for kind, rates in RATES.items()
        for rate in rates
    }
    shown = range(2 * TOLD, options.steps + 1, 2 * TOLD)
    print("| optimizer | rate | " + " | ".join(f"{step} steps" for step in shown) + " | its step | a step |")
    print("|" + "---|" * (len(shown) + 4))
    for (kind, rate), (losses, stepping, whole) in rows.items():
        reached = " | ".join(f"{losses[step // TOLD - 1]:.2f}" for step in shown)
        print(f"| {kind} | {rate} | {reached} | {stepping:.0f} ms | {whole:.0f} ms |")
    ours, theirs = times(spec.model.model_copy(update={"vocabulary_size": 2048}))  # the blocks alone are moved
    print(json.dumps({"matrices, ours, ms": round(ours), "torch.optim.Muon, ms": round(theirs)}))


if __name__ == "__main__":
    main()
