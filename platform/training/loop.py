"""What every training worker runs: the same optimizer steps on any number of workers, checkpoints, and the model.

The driver's side is `stage.py`. Nothing here decides what to train on: the plan does (platform/data/plan.py).
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.config import TrainSpecification
from calumma.platform.data.manifest import MANIFEST, Manifest
from calumma.platform.tracking import BackgroundWriter, Run, flatten
from calumma.platform.training import checkpoint, engine, held_out, samples
from calumma.platform.training.checkpoint import Checkpoint
from calumma.platform.training.schedule import learning_rate
from calumma.platform.training.workers import TrainingFailed, Worker, join

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MODEL = "model"  # folder of the model directory in a stage's output


@dataclass(frozen=True)
class Assignment:
    """What the driver has settled, the same for all workers. URIs are absolute."""

    spec: TrainSpecification
    config: ModelConfig
    vocabulary: Vocabulary
    run: Run
    output: str
    inputs: dict[str, str]
    """What the training data and the starting point are: directory -> fingerprint."""
    initial: str | None
    """Model directory whose weights are the starting point; none: fresh weights."""
    continued: Checkpoint | None
    """Checkpoint of an earlier stage whose optimizer and schedule go on here."""
    resume: Checkpoint | None
    """Checkpoint of this stage."""
    epochs_a_step: dict[str, float] = field(default_factory=dict)
    """Source -> the part of it that a step passes through."""

    @property
    def found(self) -> Checkpoint | None:
        """The checkpoint to start from."""
        return self.resume or self.continued

    @property
    def offset(self) -> int:
        """Steps of the schedule that earlier stages have taken."""
        return self.continued.schedule_step if self.continued else 0

    @property
    def first_step(self) -> int:
        return self.resume.step if self.resume else 0

    @property
    def total_steps(self) -> int:
        """Length of the whole schedule."""
        return self.spec.schedule.total_steps or self.offset + self.spec.steps


def train(config: dict[str, Any]) -> dict[str, Any]:
    """The worker's loop: train, measure, publish the model directory; the stage's report (on every rank)."""
    assignment: Assignment = config["assignment"]
    worker = join()
    torch.manual_seed(assignment.spec.seed)
    found = assignment.found
    starting = found if found and checkpoint.fits(found, assignment.spec, worker.world) else None
    transformer = _build(assignment, whole=starting is None)
    transformer.checkpoint_activations(assignment.spec.checkpoint_activations)
    if assignment.spec.compile:
        transformer.compile_blocks()
    run = engine.initialize(transformer, assignment.spec, worker.world)
    if starting:
        checkpoint.load(run, starting)
    image_mask_V = assignment.vocabulary.mask(assignment.vocabulary.image_ids).to(run.device)
    writer = BackgroundWriter(assignment.run) if worker.leads else None
    try:
        report = _steps(assignment, worker, run, image_mask_V, writer)
        report["held_out"] = {
            name: held_out.measure(run, assignment.spec.locate(uri), image_mask_V, worker.rank, worker.world)
            for name, uri in assignment.spec.held_out.items()
        }
        report["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in run.module.parameters())
        weights = engine.gathered_weights(run, keep=worker.leads)
        if writer is not None:
            for name, found in report["held_out"].items():
                writer.log({f"held_out/{name}/{key}": value for key, value in found.items()}, assignment.spec.steps)
            _publish(assignment, worker, weights, report, writer)
    finally:
        if writer is not None:
            writer.close()
    return report


def _build(assignment: Assignment, whole: bool) -> Transformer:
    """The Transformer, with its starting weights unless (`whole` is false) a checkpoint brings them."""
    transformer = Transformer(assignment.config)
    if not whole:
        return transformer
    if assignment.found:
        transformer.load_state_dict(checkpoint.weights(assignment.found))
    elif assignment.initial:
        from calumma.model.directory import read_transformer

        with storage.local_copy(assignment.initial) as path:
            transformer.load_state_dict(read_transformer(path, dtype=torch.float32).state_dict())
    else:
        transformer.initialize(assignment.spec.seed)
    return transformer


@dataclass
class _Interval:
    """Sums since the last report: this worker's losses, everybody's counts."""

    device: torch.device
    began: float = field(default_factory=time.monotonic)
    local: Tensor = field(init=False)
    text: float = 0.0
    image: float = 0.0
    tokens: float = 0.0

    def __post_init__(self) -> None:
        self.local = torch.zeros(3, dtype=torch.float64, device=self.device)

    def add(self, local: Tensor, counts: engine.Counts) -> None:
        self.local += local
        self.text += counts.text
        self.image += counts.image
        self.tokens += counts.tokens

    def metrics(self) -> dict[str, float]:
        """Means over the interval and all workers (every worker must call it): losses in nats a token, without the
        z-loss; `z` is the mean of log(Z)^2."""
        text_nll, image_nll, z_sum = engine.everywhere(self.local).tolist()
        found = held_out.by_modality(text_nll, self.text, image_nll, self.image)
        found["z"] = z_sum / max(self.text + self.image, 1.0)
        found["tokens_per_second"] = self.tokens / max(time.monotonic() - self.began, 1e-9)
        return found


def _steps(
    assignment: Assignment,
    worker: Worker,
    run: DeepSpeedEngine,
    image_mask_V: Tensor,
    writer: BackgroundWriter | None,
) -> dict[str, Any]:
    """All steps from where the stage stands to its end, with metrics and checkpoints; the report so far."""
    spec = assignment.spec
    report = _report_so_far(assignment)
    if assignment.first_step >= spec.steps:
        return report
    began, seen = time.monotonic(), 0.0
    interval = _Interval(run.device)
    for step, group in _data(worker):
        done = step + 1
        rate = learning_rate(
            assignment.offset + step, spec.optimizer.learning_rate, spec.schedule, assignment.total_steps
        )
        engine.set_learning_rate(run, rate)
        counts = engine.count(group, image_mask_V, run.device)
        seeds = (spec.seed, assignment.offset + step, worker.rank) if assignment.config.dropout else None
        last = done == spec.steps
        reports = done % spec.log_every == 0 or last or step == assignment.first_step
        local, stability = engine.step(
            run, group, counts, image_mask_V, spec.z_loss, worker.world, seeds, measure=reports and worker.leads
        )
        interval.add(local, counts)
        report["tokens"]["text"] += counts.text
        report["tokens"]["image"] += counts.image
        seen += counts.tokens
        if reports:
            metrics = interval.metrics()
            metrics |= {"learning_rate": rate, "gradient_norm": float(run.get_global_grad_norm() or 0.0)}
            metrics |= flatten({"epochs": {uri: done * part for uri, part in assignment.epochs_a_step.items()}})
            report |= {key: metrics[key] for key in ("loss", "loss_text", "loss_image") if key in metrics}
            if writer is not None:
                measured = {f"stability/{name}": float(value) for name, value in stability.items()}
                known = {key: value for key, value in (metrics | measured).items() if math.isfinite(value)}
                writer.log({**known, "step": done}, done)
            if not held_out.finite(metrics):
                raise TrainingFailed(_diverged(done, metrics, spec, assignment.output))
            interval = _Interval(run.device)
        if done % spec.checkpoint_every == 0 or last:
            report |= {"step": done, "schedule_step": assignment.offset + done}
            uri = checkpoint.location(assignment.output, done)
            checkpoint.save(run, uri, spec, assignment.inputs, report)
            if writer is not None:
                writer.log_dict(copy.deepcopy({"uri": uri, **report}), f"checkpoints/step-{done:08d}.json")
            interval.began = time.monotonic() if interval.tokens == 0 else interval.began
    report["tokens_per_second"] = seen / max(time.monotonic() - began, 1e-9)
    return report


def _report_so_far(assignment: Assignment) -> dict[str, Any]:
    if assignment.resume is None:
        return {"step": 0, "schedule_step": assignment.offset, "tokens": {"text": 0.0, "image": 0.0}}
    kept = ("step", "schedule_step", "tokens", "loss", "loss_text", "loss_image")
    return {key: value for key, value in assignment.resume.manifest.report.items() if key in kept}


def _data(worker: Worker) -> Any:
    import ray.train

    from calumma.platform.data.stream import micro_batches

    return micro_batches(ray.train.get_dataset_shard("train"), worker.rank, worker.world)


def _diverged(step: int, metrics: dict[str, float], spec: TrainSpecification, output: str) -> str:
    found = ", ".join(f"{key} {value:g}" for key, value in metrics.items() if not math.isfinite(value))
    return (
        f"training diverged before step {step} ({found}): lower optimizer.learning_rate "
        f"(now {spec.optimizer.learning_rate:g}) or lengthen schedule.warmup_steps; checkpoints up to here stay "
        f"in {checkpoint.folder(output)}"
    )


def _publish(
    assignment: Assignment, worker: Worker, weights: dict[str, Tensor], report: dict[str, Any], writer: BackgroundWriter
) -> None:
    """Write the model directory to storage, its manifest last, and log sample answers. One worker calls it."""
    from calumma.model import load
    from calumma.model.directory import save_model

    spec = assignment.spec
    uri = storage.join(assignment.output, MODEL)
    transformer = Transformer(assignment.config).to(next(iter(weights.values())).dtype)
    transformer.load_state_dict(weights)
    with (
        tempfile.TemporaryDirectory(prefix="calumma-model-") as local,
        storage.local_copy(spec.locate(spec.text_tokenizer)) as text_tokenizer,
        storage.local_copy(spec.locate(spec.image_tokenizer)) as image_tokenizer,
    ):
        save_model(local, transformer, text_tokenizer, image_tokenizer)
        files = sorted(path for path in Path(local).rglob("*") if path.is_file())
        entries = [checkpoint.entry(path, local) for path in files]
        storage.delete(storage.join(uri, MANIFEST))
        storage.upload(local, uri)
        Manifest(
            kind=MODEL,
            files=entries,
            specification=spec.model_dump(mode="json"),
            report=report,
            inputs=assignment.inputs,
        ).write(uri)
        if not spec.samples:
            return
        model = load(local, worker.device)
        answers = samples.sample(model, spec.samples, spec.job == "finetune", spec.seed)
        for number, (prompt, answer) in enumerate(zip(spec.samples, answers, strict=True)):
            writer.log_image(samples.render(prompt, answer), f"samples/{number:02d}.png")
