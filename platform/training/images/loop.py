"""What every worker of an image tokenizer's training runs: the steps, their metrics, checkpoints.

The driver's side is `stage.py`, one step is `objective.py`. As with a stage of the model, `group/` keeps the workers
alive, and a group goes on from the newest whole checkpoint, on any number of workers.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from calumma.platform import storage
from calumma.platform.storage.manifest import file_entries
from calumma.platform.tokenizing.text_tokenizer import delete_tokenizer
from calumma.platform.tracking import provenance
from calumma.platform.tracking.writer import BackgroundWriter
from calumma.platform.training import publication
from calumma.platform.training.assignment import ImageAssignment
from calumma.platform.training.checkpoints import catalog, resumption
from calumma.platform.training.construction import heap
from calumma.platform.training.errors import Stopped, TrainingFailed
from calumma.platform.training.group.entry import watchdog_of
from calumma.platform.training.group.supervisor import Supervisor
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker, set_up_worker
from calumma.platform.training.images import data
from calumma.platform.training.images.augmentation import seen_in_step
from calumma.platform.training.images.data import Pool
from calumma.platform.training.images.measure import ReconstructionErrors, comparison, measure_reconstruction
from calumma.platform.training.images.objective import ImageTraining, StepMeasures
from calumma.platform.training.images.streaming import ImageStream
from calumma.platform.training.sections import Schedule
from calumma.platform.training.steps import faults, meters
from calumma.platform.training.steps.schedule import learning_rate

KIND = "image_tokenizer"
_PERIODS = 50  # in which codes must be used, or are moved
_RESTART_SHARE = 0.7  # share of the steps in which unused codes are moved; then the codebook settles
# Training images, at most, that tell which codes are in use, evenly from all: so many, and of a large codebook or few
# codes an image as many as have so many codes for each of the codebook.
_MEASURED_IMAGES, _MEASURED_CODES = 1_000, 64
_PICTURED_IMAGES = 16  # images in the picture of reconstructions
_RESUMED_FIELDS = (
    "step", "schedule_step", "loss", "held_out_loss", "held_out_step", "seconds", "faults", "incidents",
)  # fmt: skip


def train(config: dict[str, Any]) -> dict[str, Any]:
    """The worker's loop, from the newest whole checkpoint that there is when this group starts; the report (on rank 0,
    elsewhere empty)."""
    submitted: ImageAssignment = config["assignment"]
    limit = submitted.spec.resources.recovery.hang_seconds
    with watchdog_of(config, limit, storage.join(submitted.output, "stacks")) as watchdog:
        return _train(submitted, watchdog)


def _train(submitted: ImageAssignment, watchdog: Watchdog) -> dict[str, Any]:
    worker = set_up_worker()
    heap.kept_for_the_next_step()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # what it does not take is sent again from the outbox
    submitted.run.check_output()
    assignment = replace(
        submitted, resume=resumption.agreed_checkpoint(submitted.output, submitted.spec, submitted.inputs)
    )
    writer = None
    if worker.is_main:
        writer = BackgroundWriter(assignment.run, backup=storage.join(assignment.output, "tracking"))
    try:
        if writer is not None:
            writer.log_dict(provenance.environment() | {"workers": worker.world}, "environment.json")
            writer.log_data(assignment.inputs, "training")
        watchdog.enter("reading images")
        loop = Loop(assignment, worker, writer, watchdog)
        try:
            loop.run()
            watchdog.enter("publishing")
            return loop.publish()
        finally:
            if isinstance(loop.pool, ImageStream):
                loop.pool.close()
    except Stopped as stopped:
        return {"stopped": str(stopped)}
    finally:
        if writer is not None:
            writer.close()


class Loop:
    """The steps of one worker, from where training stands to its end."""

    def __init__(
        self,
        assignment: ImageAssignment,
        worker: Worker,
        writer: BackgroundWriter | None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.assignment, self.worker, self.writer, self.watchdog = assignment, worker, writer, watchdog
        spec = self.spec = assignment.spec
        self.pool: Pool | ImageStream
        if spec.stream:
            self.pool = ImageStream(spec, worker, assignment.first_step)
        else:
            self.pool = Pool(data.read_pool(spec, spec.documents, worker), worker, data.load_weight_function(spec))
        self.held_out = data.read_pool(spec, spec.held_out, worker) if spec.held_out else None
        self.training = ImageTraining(spec, worker)
        self.report: dict[str, Any] = {"step": 0, "schedule_step": 0, "seconds": 0.0}
        if assignment.resume is not None:
            self.training.load(resumption.read_whole(assignment.resume))
            self.report = {k: v for k, v in assignment.resume.manifest.report.items() if k in _RESUMED_FIELDS}
        self.faults = faults.FaultHandler(spec.faults, self.report, spec.steps)
        usual = Schedule(kind="cosine", warmup_steps=min(100, spec.steps // 10), final=0.02)
        self.schedule = spec.schedule or usual
        self.period = max(1, spec.steps // _PERIODS)
        self.clock = meters.ActivityClock()
        self.began = time.monotonic() - self.report["seconds"]
        self._new_interval(assignment.first_step)

    def run(self) -> None:
        """All steps, with metrics and checkpoints."""
        spec, first = self.spec, self.assignment.first_step
        if first >= spec.steps:
            return
        with Supervisor(self.training, self.assignment, self.worker, self._published, self.watchdog) as supervisor:
            if spec.faults.action == "roll_back" and first == 0:
                self._save(supervisor, 0, due=True)  # something to go back to
            for step in range(first, spec.steps):
                supervisor.check_step(step)
                if step >= self.faults.resume_after:
                    self._step(supervisor, step)
                self._save(supervisor, step + 1, due=(step + 1) % spec.checkpoint_every == 0 or step + 1 == spec.steps)

    def publish(self) -> dict[str, Any]:
        """Measure the tokenizer and write it to storage; the report with its files, on the first worker."""
        spec, tokenizer = self.spec, self.training.tokenizer
        report: dict[str, Any] = {"steps": spec.steps, "seconds": self.report["seconds"], "workers": self.worker.world}
        report |= {"incidents": self.report.get("incidents", [])} | self._measured()
        report |= {"training_images": self.pool.size, "parameters": sum(p.numel() for p in tokenizer.parameters())}
        if self.writer is None:
            return {}
        self._log({key: value for key, value in report.items() if isinstance(value, float)}, spec.steps)
        self._picture("samples/reconstructions.png")
        with tempfile.TemporaryDirectory(prefix="calumma-image-tokenizer-") as folder:
            tokenizer.save(folder)
            report["files"] = [entry.model_dump(mode="json") for entry in file_entries(folder)]
            self.assignment.run.check_output()
            delete_tokenizer(spec.locate(spec.output), KIND)
            storage.upload(folder, spec.locate(spec.output))
        return report

    def _step(self, supervisor: Supervisor, step: int) -> None:
        spec, training, done = self.spec, self.training, step + 1
        with self.clock("data"):
            x = seen_in_step(data.as_floats(self._images()), spec, step, training.first)
        rate = learning_rate(step, spec.learning_rate, self.schedule, spec.steps)
        with self.clock("compute"):
            measures = training.compute_gradients(x, step)
            # Judged by what is never below 0: the adversarial part of the whole may be.
            loss = measures.parts["reconstruction"] if math.isfinite(measures.loss) else measures.loss
            cause = self.faults.guard.judge(loss) or (None if math.isfinite(measures.norm) else "gradient")
            if cause is None:
                self.faults.guard.record_good(loss)
                training.take_step(rate)
        if cause is not None:
            self._handle_bad_step(supervisor, done, cause, loss)
        metrics: dict[str, float] = {}
        last = done == spec.steps
        if cause is None and (done % self.period == 0 or last):
            metrics |= self._end_period(done, x)
        if done % (spec.log_every or self.period) == 0 or last:
            metrics |= self._metrics(done, rate, measures if cause is None else None)
        self._log(metrics, done)
        if spec.held_out_every is not None and done % spec.held_out_every == 0 and not last:
            self._evaluate(done)

    def _images(self) -> Tensor:
        """ByteTensor [B, 3, H, W]: this worker's share of the next global batch."""
        if isinstance(self.pool, ImageStream):
            return self.pool.take()
        return self.pool.take(self.pool.draw(self.spec.batch, self.training.generator))

    def _end_period(self, done: int, x_BCHW: Tensor) -> dict[str, float]:
        """Count the codes in use, and move the others; every worker calls it."""
        metrics = {"codes_in_use": self.training.codes_in_use()}
        if done < _RESTART_SHARE * self.spec.steps:
            self.training.restart(x_BCHW)
        self.training.begin_period()
        return metrics

    def _metrics(self, done: int, rate: float, measures: StepMeasures | None) -> dict[str, float]:
        """Of the newest step, unless it was not taken, and since the last metrics."""
        metrics: dict[str, float] = {}
        if measures is not None:
            self.report["loss"] = measures.loss
            metrics = {"loss": measures.loss, **measures.parts, "gradient_norm": measures.norm}
        steps, whole = done - self._interval_step, time.monotonic() - self._interval_began
        speed = steps * self.spec.batch / max(whole - self._paused, 1e-9)
        metrics |= {"learning_rate": rate, "images_per_second": speed, "step": done, "workers": self.worker.world}
        metrics |= self.clock.read() | meters.peak_memory(self.worker.device) | self.faults.guard.metrics()
        metrics["seconds_left"] = whole / max(steps, 1) * (self.spec.steps - done)
        self._new_interval(done)
        return metrics

    def _new_interval(self, done: int) -> None:
        self._interval_step, self._interval_began, self._paused = done, time.monotonic(), 0.0

    def _evaluate(self, done: int) -> None:
        """Reconstruction on the way: its errors and a picture."""
        began = time.monotonic()
        with self.clock("evaluation"):
            metrics = self._measured()
            self.report["held_out_step"] = done
            self._log({key: value for key, value in metrics.items() if isinstance(value, float)}, done)
            self._picture(f"samples/step-{done:08d}/reconstructions.png")
        self._paused += time.monotonic() - began

    def _measured(self) -> dict[str, Any]:
        """Reconstruction of held-out images (of training images where there are none), and the share of codes that
        these and training images use; every worker calls it."""

        def measured(images: Tensor) -> ReconstructionErrors:
            return measure_reconstruction(
                self.training.tokenizer,
                images,
                all_reduce=self.training.all_reduce,
                beat=self.watchdog.beat if self.watchdog else None,
            )

        config, images = self.spec.model, self.pool.images
        most = max(_MEASURED_IMAGES, -(-_MEASURED_CODES * config.codebook_size // config.codes_per_image))
        trained = measured(images[:: max(1, -(-len(images) * self.worker.world // most))])
        held_out = trained if self.held_out is None else measured(self.held_out)
        self.report["held_out_loss"] = held_out.squared
        return {
            "image_reconstruction_error": held_out.squared,
            "pixel_error": held_out.absolute,
            "measured_on": "documents" if self.held_out is None else "held_out",
            "measured_images": held_out.images,
            "codebook_used": (trained.used_K | held_out.used_K).float().mean().item(),
        }

    def _picture(self, path: str) -> None:
        images = self.pool.images if self.held_out is None else self.held_out
        if self.writer is not None and len(images):
            self.writer.log_image(comparison(self.training.tokenizer, images[:_PICTURED_IMAGES]), path)

    def _handle_bad_step(self, supervisor: Supervisor, done: int, cause: faults.Cause, loss: float) -> None:
        place = catalog.checkpoints_folder(self.assignment.output)

        def roll_back() -> int:
            with self.clock("checkpoint"):
                supervisor.wait_until_published()
                checkpoint = resumption.agreed_checkpoint(self.assignment.output, self.spec, self.assignment.inputs)
                if checkpoint is None:
                    raise TrainingFailed(f"there is no checkpoint in {place} to roll back to")
                self.training.load(
                    resumption.read_whole(checkpoint), draws=False
                )  # other images than those that led here
            return checkpoint.step

        def failure_report() -> str:
            return faults.divergence_report(
                done,
                self.faults.incidents,
                self.spec.faults,
                self.spec.learning_rate,
                place,
                "learning_rate",
                warmup=None,
            )

        self.faults.handle(done, cause, loss, self.writer, roll_back, failure_report)

    def _save(self, supervisor: Supervisor, done: int, due: bool) -> None:
        """Whatever the end of a step asks for: a checkpoint, or to stop."""
        self.report |= {"step": done, "schedule_step": done, "seconds": time.monotonic() - self.began}
        self.report |= self.faults.state(saved=due)
        before = supervisor.seconds
        with self.clock("checkpoint"):
            supervisor.after_step(done, self.report, due)
        self._paused += supervisor.seconds - before

    def _published(self, uri: str, report: dict[str, Any]) -> None:
        if self.writer is not None:
            publication.log_checkpoint(self.writer, uri, report, ("loss", "held_out_loss"))

    def _log(self, metrics: dict[str, float], done: int) -> None:
        if self.writer is not None and metrics:
            self.writer.log({key: value for key, value in metrics.items() if math.isfinite(value)}, done)
