"""What every training worker runs: the same optimizer steps on any number of workers, metrics, checkpoints.

The driver's side is `stage.py`; what keeps a group of workers alive is `group/`; what follows the last step is
`publication.py`. Nothing here decides what to train on: the plan does (platform/streaming/plan.py).
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from calumma.platform import storage
from calumma.platform.tracking.mirrors import Mirrors
from calumma.platform.tracking.names import flatten
from calumma.platform.tracking.writer import BackgroundWriter
from calumma.platform.training import publication
from calumma.platform.training.assignment import Assignment
from calumma.platform.training.checkpoints import catalog, resumption
from calumma.platform.training.errors import Stopped, TrainingFailed
from calumma.platform.training.group.entry import watchdog_of
from calumma.platform.training.group.supervisor import Supervisor
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker, set_up_worker
from calumma.platform.training.interludes import Interludes
from calumma.platform.training.preferences.objective import PreferenceObjective
from calumma.platform.training.preferences.reference import reference_scores
from calumma.platform.training.standby import recall
from calumma.platform.training.standby.leaving import Interruptible
from calumma.platform.training.starting import base_of, report_so_far, require_undamaged_start, start_engine
from calumma.platform.training.steps import engine, faults, meters, sequence
from calumma.platform.training.steps.schedule import learning_rate
from calumma.platform.training.trainable import parameters, quantized

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def train(config: dict[str, Any]) -> dict[str, Any]:
    """The worker's loop: train, measure, publish the model directory; the stage's report (on every rank)."""
    assignment: Assignment = config["assignment"]
    limit = assignment.spec.resources.recovery.hang_seconds
    with watchdog_of(config, limit, storage.join(assignment.output, "stacks")) as watchdog:
        return _train(assignment, watchdog)


def _train(assignment: Assignment, watchdog: Watchdog) -> dict[str, Any]:
    worker = set_up_worker()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # what it does not take is sent again from the outbox
    spec = assignment.spec
    torch.manual_seed(spec.seed)
    steps = _steps(assignment, worker)
    watchdog.enter("reading what it starts from")
    require_undamaged_start(assignment)
    run = start_engine(assignment, worker, watchdog)
    writer = None
    if worker.is_main:
        config = spec.model_dump(mode="json")
        mirrors = Mirrors(spec.tracking, assignment.run.id, config, spec.run_name)
        writer = BackgroundWriter(assignment.run, storage.join(assignment.output, "tracking"), mirrors=mirrors)
    try:
        if writer is not None:
            publication.log_inputs(assignment, worker, writer)
        stage = _Stage(assignment, worker, run, writer, watchdog, steps)
        stage.score_reference(resumed=assignment.first_step > 0)
        report = stage.run()
        report.pop("faults", None)  # what they were is among the incidents
        for name in ("base", "peak_flops"):
            report.pop(name, None)
        watchdog.enter("held-out measurement")
        report["held_out"] = stage.interludes.last_held_out or stage.interludes.held_out(report["step"])
        names = [name for name, p in run.module.named_parameters() if p.requires_grad]
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in run.module.named_parameters()}
        sizes |= {name: weight.numel for name, weight in quantized.weights_of(run.module).items()}
        report["parameters"] = sum(size for name, size in sizes.items() if not parameters.is_added(name))
        report["trained_parameters"] = sum(sizes[name] for name in names)
        if spec.early_stopping:
            stage.interludes.return_to_best(report)
        else:
            _return_to_published(assignment, run, report, watchdog)
        if spec.samples:
            watchdog.enter("samples")
            publication.log_samples(assignment, run, writer, None, watchdog.beat)
        if spec.evaluation:
            watchdog.enter("evaluation")
            publication.log_evaluation(assignment, run, writer, report["step"], watchdog.beat)
        watchdog.enter("publishing")
        weights = engine.gathered_weights(run, keep=worker.is_main, beat=watchdog.beat)
        if writer is not None:
            publication.publish_model(assignment, weights, report, watchdog.beat)
    finally:
        engine.release(run)
        if writer is not None:
            writer.close()
    return report


def _return_to_published(
    assignment: Assignment, run: DeepSpeedEngine, report: dict[str, Any], watchdog: Watchdog
) -> None:
    """Let the engine have the weights of the model directory: of the last step, or of the best checkpoint. Every worker
    calls it. Raises StorageError when the best one cannot be read."""
    best = catalog.best(assignment.output) if assignment.spec.publish == "best" else None
    report["published_step"] = best.step if best is not None else assignment.spec.steps
    if best is not None and best.step != assignment.spec.steps:
        report["held_out_loss"] = best.manifest.report["held_out_loss"]
        resumption.load(run, best, beat=watchdog.beat, spec=assignment.spec)


def train_from_newest(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs: the loop, from the newest whole checkpoint there is when this group starts."""
    assignment: Assignment = config["assignment"]
    assignment.run.check_output()
    resume = resumption.agreed_checkpoint(assignment.output, assignment.spec, assignment.inputs, assignment.origin)
    if assignment.spec.resources.recovery.copy_every is not None:
        resume = recall.agreed(assignment.run.id, beyond=resume.step if resume else 0) or resume
    try:
        return train(config | {"assignment": replace(assignment, resume=resume)})
    except Stopped as stopped:
        return {"stopped": str(stopped)}


class _Stage:
    """The steps of one worker, from where the stage stands to its end."""

    def __init__(
        self,
        assignment: Assignment,
        worker: Worker,
        run: DeepSpeedEngine,
        writer: BackgroundWriter | None,
        watchdog: Watchdog,
        steps: Iterator[tuple[int, list[Any]]],
    ) -> None:
        """`steps`: each with this worker's micro-batches, from the first that is to be taken on."""
        self.assignment, self.worker, self.engine, self.writer = assignment, worker, run, writer
        self.watchdog, self.steps = watchdog, steps
        self.spec = assignment.spec
        self.report = report_so_far(assignment) | {"base": base_of(assignment).to_json()}
        self.faults = faults.FaultHandler(self.spec.faults, self.report, self.spec.steps)
        self.image_mask_V = assignment.vocabulary.mask(assignment.vocabulary.image_ids).to(run.device)
        preference = assignment.preference
        self.objective = PreferenceObjective(preference, self.image_mask_V) if preference else None
        self.clock, self.interruptible = meters.ActivityClock(), Interruptible()
        self.interval = meters.LossInterval(run.device, first_step=assignment.first_step)
        self.interludes = Interludes(
            assignment, worker, run, writer, watchdog, self.report, self.objective, self.image_mask_V
        )
        self.utilization = meters.Utilization(run.module, run.device, self.spec.precision, worker.world)

    def score_reference(self, resumed: bool) -> None:
        """What the model at the start says of all pairs, where the loss takes it. Every worker calls it."""
        if self.objective is None or self.objective.preference.loss == "orpo":
            return
        spec, assignment = self.spec, self.assignment
        self.objective.reference = reference_scores(
            self.engine,
            self.objective.scores,
            assignment.output,
            sorted({spec.locate(uri) for uri in (*spec.mixture, *spec.held_out.values())}),
            assignment.inputs,
            self.worker.rank,
            self.worker.world,
            spec.data.reader(),
            resumed,
        )

    def run(self) -> dict[str, Any]:
        """All steps, with metrics and checkpoints; the report so far."""
        spec, first = self.spec, self.assignment.first_step
        held = isinstance(self.assignment.resume, recall.Held)  # by one of these workers, a moment ago
        if first >= spec.steps or self.interludes.stopped:
            return self.report
        if self.worker.is_main:
            self.report["peak_flops"] = self.utilization.measure(self.report.get("peak_flops") if held else None)
        began, seen = time.monotonic(), 0.0
        with Supervisor(self.engine, self.assignment, self.worker, self._published, self.watchdog) as supervisor:
            if spec.faults.action == "roll_back" and first == 0:
                self._save(supervisor, 0, due=True)  # something to go back to
            if first == 0 and self.assignment.initial and spec.held_out_every and spec.held_out:
                self.report["held_out_before"] = self.interludes.held_out(0)  # what is to be kept, or to be bettered
            for step, group in self._timed(self.steps):
                supervisor.check_step(step)
                seen += self._step(supervisor, step, group)
                last = step + 1 == spec.steps or self.interludes.stopped
                self._save(supervisor, step + 1, due=(step + 1) % spec.checkpoint_every == 0 or last)
                if last:
                    break
                if held and step == first:
                    gc.collect()  # what the group before has left
        self.report["tokens_per_second"] = seen / max(time.monotonic() - began, 1e-9)
        return self.report

    def _step(self, supervisor: Supervisor, step: int, group: list[Any]) -> float:
        """One step and what is told of it; tokens trained on."""
        spec, assignment, done = self.spec, self.assignment, step + 1
        if done <= self.faults.resume_after:
            return 0.0
        rate = learning_rate(
            assignment.offset + step, spec.optimizer.learning_rate, spec.schedule, assignment.total_steps
        )
        engine.set_learning_rate(self.engine, rate)
        last = done == spec.steps
        reports = done % spec.log_every == 0 or last or step == assignment.first_step
        with self.clock("compute"):
            if self.objective:
                counts = self.objective.count(group, self.engine.device)
            else:
                counts = engine.count_tokens(group, self.image_mask_V, self.engine.device, spec.sequence_parallel)
            seeds = (spec.seed, assignment.offset + step) if assignment.drops else None
            judged: list[tuple[float | None, faults.Cause | None]] = []

            def accept(sums_3: torch.Tensor) -> bool:
                loss = float(sums_3[0] + sums_3[1]) / counts.trained if counts.trained else None
                judged.append((loss, self.faults.guard.judge(loss)))
                return judged[0][1] is None

            with self.interruptible:
                local, stability = engine.step(
                    self.engine,
                    group,
                    counts,
                    self.image_mask_V,
                    spec.z_loss,
                    self.worker.world,
                    seeds,
                    spec.image_loss_weight,
                    measure=reports and self.worker.rank < spec.sequence_parallel,
                    accept=accept,
                    losses_of=self.objective.losses if self.objective else None,
                )
            stability = sequence.combined(self.engine, stability)
            norm = engine.gradient_norm(self.engine)
        (loss, cause), trained = judged[0], 0.0
        if cause is None and not math.isfinite(norm):
            cause = "gradient"
        if cause is None:
            self.faults.guard.record_good(loss)
            self.interval.add(local, counts)
            trained = counts.tokens
            if self.objective:
                self.report["pairs"] = self.report.get("pairs", 0.0) + counts.text
            else:
                self.report["tokens"]["text"] += counts.text
                self.report["tokens"]["image"] += counts.image
        else:
            self._handle_bad_step(supervisor, done, cause, loss)
        if reports:
            self._report(done, rate, norm, {name: float(value) for name, value in stability.items()})
        self._interlude(done)
        return trained

    def _report(self, done: int, rate: float, norm: float, stability: dict[str, float]) -> None:
        """Log an interval's metrics and begin the next. Every worker calls it."""
        metrics = self.interval.metrics(self.spec.z_loss)
        if self.objective:  # of pairs, which have no perplexity and no modality
            metrics = {name: metrics[name] for name in ("loss", "tokens_per_second") if name in metrics}
            metrics |= self.objective.metrics()
        self.report |= {key: metrics[key] for key in ("loss", "loss_text", "loss_image") if key in metrics}
        speed, steps = metrics["tokens_per_second"], done - self.interval.first_step
        whole = time.monotonic() - self.interval.began
        metrics |= self.utilization.metrics(speed) | self.clock.read() | meters.peak_memory(self.engine.device)
        metrics |= {f"stability/{name}": value for name, value in stability.items()} | self.faults.guard.metrics()
        metrics |= {"learning_rate": rate, "gradient_norm": norm, "step": done, "workers": self.worker.world}
        passed = {uri: done * part for uri, part in self.assignment.epochs_a_step.items()}
        metrics |= flatten({"epochs": passed}) if passed else {}
        metrics["seconds_left"] = whole / max(steps, 1) * (self.spec.steps - done)
        self._log(metrics, done)
        self.interval = meters.LossInterval(self.engine.device, first_step=done)

    def _interlude(self, done: int) -> None:
        began = time.monotonic()
        with self.clock("evaluation"):
            self.interludes.after_step(done)
        self.interval.paused += time.monotonic() - began

    def _handle_bad_step(self, supervisor: Supervisor, done: int, cause: faults.Cause, loss: float | None) -> None:
        """A bad step. Raises TrainingFailed when there were too many in a row."""

        def failure_report() -> str:
            supervisor.wait_until_published()
            return faults.divergence_report(
                done,
                self.faults.incidents,
                self.spec.faults,
                self.spec.optimizer.learning_rate,
                catalog.checkpoints_folder(self.assignment.output),
                branch_from=catalog.newest_step(self.assignment.output),
            )

        self.faults.handle(done, cause, loss, self.writer, lambda: self._roll_back(supervisor), failure_report)

    def _roll_back(self, supervisor: Supervisor) -> int:
        """Weights, optimizer and counts of tokens as of the last checkpoint; its step."""
        assignment = self.assignment
        with self.clock("checkpoint"):
            supervisor.wait_until_published()
            checkpoint = resumption.load_newest(
                self.engine, assignment.output, self.spec, assignment.inputs, assignment.origin, self.watchdog.beat
            )
            if checkpoint is None:
                place = catalog.checkpoints_folder(assignment.output)
                raise TrainingFailed(f"there is no checkpoint in {place} to roll back to")
        self.report["tokens"] = dict(checkpoint.tokens)
        return checkpoint.step

    def _save(self, supervisor: Supervisor, done: int, due: bool) -> None:
        """Whatever the end of a step asks for: a checkpoint, or to stop."""
        self.report |= {"step": done, "schedule_step": self.assignment.offset + done} | self.faults.state(saved=due)
        before = supervisor.seconds
        with self.clock("checkpoint"):
            supervisor.after_step(done, self.report, due)
        self.interval.paused += supervisor.seconds - before

    def _published(self, uri: str, report: dict[str, Any]) -> None:
        """A checkpoint is in storage: a model of the run's in MLflow. Called from a thread of the first worker."""
        if self.writer is not None:
            names = ("loss", "loss_text", "loss_image", "held_out_loss")
            publication.log_checkpoint(self.writer, uri, report, names)

    def _timed(self, steps: Iterable[tuple[int, list[Any]]]) -> Iterator[tuple[int, list[Any]]]:
        """The same, and the time that waiting for them takes is measured."""
        iterator = iter(steps)
        while True:
            with self.clock("data"):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def _log(self, metrics: dict[str, float], done: int) -> None:
        if self.writer is not None:
            self.writer.log({key: value for key, value in metrics.items() if math.isfinite(value)}, done)


def _steps(assignment: Assignment, worker: Worker) -> Iterator[tuple[int, list[Any]]]:
    """The data of the steps that are left. They are laid out and read from now on, beside what else it takes to start:
    Ray Data may have to start processes of its own."""
    from calumma.platform.streaming.tensors import begun

    first = assignment.first_step
    if first >= assignment.spec.steps:
        return iter(())
    return begun(lambda: _micro_batches(worker, first), worker.device)


def _micro_batches(worker: Worker, first: int) -> Any:
    import ray.train

    from calumma.platform.streaming.tensors import PlanShard, micro_batches

    shard = cast(PlanShard, ray.train.get_dataset_shard("train"))
    return micro_batches(shard.iterator(first), worker.rank, worker.world)
