"""Stability at small scale: the norms that query-key norm, z-loss, dropout and norm order bound, with and without them.

A large model diverges late and after its norms have grown for long (paper section 2.3); at a high learning rate a small
one shows the growth within minutes ("Small-scale proxies for large-scale Transformer training instabilities", arXiv
2309.14322). Each variant is one task of one process in plain PyTorch; all curves are metrics of one MLflow run.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from calumma.model import vocabulary as model_vocabulary
from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.shards.row_groups import RowGroupReader, all_micro_batches
from calumma.platform.specification import SpecificationError, with_absolute_storage
from calumma.platform.storage.manifest import Manifest, file_entries
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run
from calumma.platform.training.specification import AblateSpecification
from calumma.platform.training.steps import engine, held_out
from calumma.platform.training.steps.schedule import learning_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from calumma.platform.streaming.plan import Plan

KIND = "ablation"
Points = list[dict[str, float]]
# What is drawn: the curve's name, its title, whether the axis is logarithmic.
PANELS = (
    ("loss", "loss, nats a token", False),
    ("log_z", "mean log Z", False),
    ("query_norm", "largest mean query norm of a layer", True),
    ("attention_logit_max", "largest attention logit", True),
    ("activation_rms", "residual stream after the last layer, RMS", True),
)


def run(spec: AblateSpecification, run: Run, progress: Progress) -> Manifest:
    """Train all variants at all learning rates and publish curves and figure. Raises SpecificationError."""
    import ray

    original, spec = spec, with_absolute_storage(spec)
    mixture = [spec.locate(uri) for uri in spec.mixture]
    missing = [uri for uri in mixture if Manifest.find(uri) is None]
    if missing:
        raise SpecificationError(f"mixture: no token shards are published at {missing[0]}; run the job tokenize first")
    cases = [(name, rate) for rate in spec.learning_rates for name in spec.variants]
    task = ray.remote(num_cpus=spec.resources.cpus_per_worker, num_gpus=spec.resources.gpus_per_worker)(train_variant)
    waiting = {task.remote(spec, name, rate): (name, rate) for name, rate in cases}
    curves: dict[tuple[str, float], Points] = {}
    while waiting:
        progress(len(curves), len(cases), f"{len(waiting)} of {len(cases)} trainings left")
        (done, *_), _ = ray.wait(list(waiting), num_returns=1)
        name, rate = waiting.pop(done)
        curves[(name, rate)] = points = ray.get(done)
        for point in points:
            known = {key: value for key, value in point.items() if key != "step" and math.isfinite(value)}
            run.log_metrics({f"{key}/{name}/{rate:g}": value for key, value in known.items()}, int(point["step"]))
    output = spec.locate(spec.output)
    storage.delete(output)
    picture = io.BytesIO()
    figure(spec, curves).savefig(picture, format="png", dpi=110)
    storage.write_bytes(storage.join(output, "ablation.png"), picture.getvalue())
    records = [{"variant": name, "learning_rate": rate, "curve": points} for (name, rate), points in curves.items()]
    storage.write_bytes(storage.join(output, "curves.json"), json.dumps(records).encode())
    with storage.local_copy(output) as path:
        run.log_artifact(Path(path, "ablation.png"))
    manifest = Manifest(
        kind=KIND,
        files=file_entries(output),
        specification=original.model_dump(mode="json"),
        report={"run": run.id, **summary(curves)},
        inputs=fingerprints([*mixture, spec.locate(spec.text_tokenizer)]),
    )
    manifest.write(output)
    progress(len(cases), len(cases))
    return manifest


def train_variant(spec: AblateSpecification, name: str, rate: float) -> Points:
    """One training: a point every `log_every` steps, until the end or the first loss that is not finite.

    Its loss is the mean since the last point; all else is measured, without dropout, on the same micro-batch of each
    source again and again: how text and images take turns does not show. Raises ShardError and StorageError.
    """
    from calumma.platform.streaming.plan import Plan

    config, z_loss = spec.variant(name)
    vocabulary = Vocabulary.model_validate_json(
        storage.read_bytes(storage.join(spec.locate(spec.text_tokenizer), model_vocabulary.FILE))
    )
    mixture = {spec.locate(uri): weight for uri, weight in spec.mixture.items()}
    manifests = {uri: Manifest.read(uri) for uri in mixture}
    plan = Plan(spec.seed, mixture, manifests, spec.micro_batches)
    device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    image_mask_V = vocabulary.mask(vocabulary.image_ids).to(device)
    shape = config.model_copy(update={"vocabulary_size": vocabulary.size})
    reader = RowGroupReader(plan.context)
    probes = [
        held_out.read_row_group(reader, all_micro_batches(uri, manifest)[0]) for uri, manifest in manifests.items()
    ]
    return _train(spec, shape, z_loss, rate, plan, reader, image_mask_V, probes)


def _train(
    spec: AblateSpecification,
    shape: ModelConfig,
    z_loss: float,
    rate: float,
    plan: Plan,
    reader: RowGroupReader,
    image_mask_V: torch.Tensor,
    probes: list[held_out.HeldOutBatch],
) -> Points:
    device, o = image_mask_V.device, spec.optimizer
    torch.manual_seed(spec.seed)
    transformer = Transformer(shape).initialize(spec.seed).to(device)
    groups = engine.parameter_groups(transformer, o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(o.beta1, o.beta2), eps=o.eps)
    points, nll, trained = Points(), 0.0, 0
    for step in range(spec.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, rate, spec.schedule, spec.steps)
        batches = [held_out.read_row_group(reader, found) for found in plan.step(step)]
        targets = sum(int(batch.mask[:, 1:].sum()) for batch in batches)
        for batch in batches:
            found = engine.losses(transformer, batch, image_mask_V, z_loss=z_loss, normalizer=max(targets, 1))
            found.total.backward()
            nll += float(found.sums.text_nll + found.sums.image_nll)
        trained += targets
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), o.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        diverged = not math.isfinite(nll)
        if (step + 1) % spec.log_every == 0 or step == 0 or diverged:
            point = {"step": step + 1, "loss": nll / max(trained, 1), "gradient_norm": float(norm)}
            points.append(point | _norms(transformer, probes, image_mask_V))
            nll, trained = 0.0, 0
        if diverged:
            break
    return points


@torch.no_grad()
def _norms(
    transformer: Transformer, probes: list[held_out.HeldOutBatch], image_mask_V: torch.Tensor
) -> dict[str, float]:
    """Of the instruments of all layers (model/ops/stability.py) the ones that are drawn: means over the probes, of the
    attention logit the maximum."""
    transformer.eval()
    each = [_largest(engine.losses(transformer, batch, image_mask_V, measure=True).stability) for batch in probes]
    transformer.train()
    means = {name: sum(values[name] for values in each) / len(each) for name in each[0]}
    return means | {"attention_logit_max": max(values["attention_logit_max"] for values in each)}


def _largest(stability: dict[str, torch.Tensor]) -> dict[str, float]:
    """By measure the layer that matters: the largest, and of the residual stream the last."""

    def layers(name: str) -> list[float]:
        return [float(value) for key, value in sorted(stability.items()) if key.endswith(f"/{name}")]

    return {
        "log_z": float(stability["log_z"]),
        "query_norm": max(layers("query_norm")),
        "attention_logit_max": max(layers("attention_logit_max")),
        "activation_rms": layers("activation_rms")[-1],
    }


def summary(curves: dict[tuple[str, float], Points]) -> dict[str, float]:
    """The last value of what is drawn, by variant and learning rate."""
    return {
        f"{name}, {rate:g}: {key}": points[-1][key]
        for (name, rate), points in curves.items()
        for key, _, _ in PANELS
        if points and math.isfinite(points[-1].get(key, math.nan))
    }


def figure(spec: AblateSpecification, curves: dict[tuple[str, float], Points]) -> Figure:
    """A row a measure, a column a learning rate, a line a variant."""
    from matplotlib.figure import Figure

    rates = spec.learning_rates
    drawn = Figure(figsize=(5 * len(rates) + 1, 2.4 * len(PANELS)), layout="constrained")
    grid = drawn.subplots(len(PANELS), len(rates), squeeze=False, sharex=True)
    for row, (key, title, logarithmic) in enumerate(PANELS):
        for column, rate in enumerate(rates):
            axes = grid[row][column]
            for name in spec.variants:
                points = [point for point in curves.get((name, rate), []) if key in point]
                axes.plot([point["step"] for point in points], [point[key] for point in points], label=name, lw=1.3)
            if logarithmic:
                axes.set_yscale("log")
            axes.set_title(f"{title}; learning rate {rate:g}", fontsize=9)
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    grid[0][0].legend(fontsize=8)
    return drawn
