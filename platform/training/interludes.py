"""What comes between the steps of a training: losses on held-out data, early stopping by them, samples, tasks."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calumma.platform.tracking.writer import BackgroundWriter
from calumma.platform.training import publication
from calumma.platform.training.assignment import Assignment
from calumma.platform.training.construction import build
from calumma.platform.training.construction.sources import DirectoryWeights
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.preferences.objective import PreferenceObjective
from calumma.platform.training.steps import early, engine, held_out, meters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Interludes:
    """Of one worker: every worker calls each method at the same step, and the first has a writer. What is measured goes
    into the stage's report, and so into its checkpoints."""

    def __init__(
        self,
        assignment: Assignment,
        worker: Worker,
        run: DeepSpeedEngine,
        writer: BackgroundWriter | None,
        watchdog: Watchdog,
        report: dict[str, Any],
        objective: PreferenceObjective | None,
        image_mask_V: Tensor,
    ) -> None:
        self._assignment, self._worker, self._engine, self._writer = assignment, worker, run, writer
        self._spec, self._watchdog, self._report = assignment.spec, watchdog, report
        self._objective, self._image_mask_V = objective, image_mask_V
        stopping = assignment.spec.early_stopping
        self._stopper = early.EarlyStopper(stopping, report, assignment.output) if stopping else None
        self.last_held_out: dict[str, dict[str, float]] = {}
        """Losses that were measured after the last step."""

    @property
    def stopped(self) -> bool:
        """Whether the held-out loss has not fallen for long enough."""
        return self._stopper is not None and self._stopper.stopped

    def after_step(self, done: int) -> None:
        """What is due after `done` steps, before the end."""
        spec = self._spec
        tasks_every = spec.evaluation.every if spec.evaluation else None
        due = [every is not None and done % every == 0 and done < spec.steps for every in
               (spec.held_out_every, spec.samples_every if spec.samples else None, tasks_every)]  # fmt: skip
        due[0] |= done == spec.steps and spec.publish == "best"  # before its checkpoint, which is compared by it
        if due[0] and spec.held_out:
            measured = self.held_out(done)
            self.last_held_out = measured if done == spec.steps else {}
            if self._stopper is not None and self._stopper.record(done, self._report["held_out_loss"]):
                self._keep_best(self._stopper)
        if due[1]:
            publication.log_samples(self._assignment, self._engine, self._writer, done, self._watchdog.beat)
        if due[2]:
            publication.log_evaluation(self._assignment, self._engine, self._writer, done, self._watchdog.beat)

    def held_out(self, done: int) -> dict[str, dict[str, float]]:
        """Losses on held-out data, by its name; logged by the first worker."""
        losses_of, objective, spec = {}, self._objective, self._spec
        for name, uri in spec.held_out.items():
            place = spec.locate(uri)
            with objective.apart() if objective else nullcontext():
                losses_of[name] = held_out.measure(
                    self._engine,
                    place,
                    self._image_mask_V,
                    self._worker.rank // spec.sequence_parallel,
                    self._worker.world // spec.sequence_parallel,
                    self._watchdog.beat,
                    spec.data.reader(),
                    objective.losses if objective else engine.losses,
                )
                if objective:
                    losses_of[name] = {"loss": losses_of[name]["loss"]} | objective.metrics()
        means = [values["loss"] for values in losses_of.values() if "loss" in values]
        if means:
            self._report |= {"held_out_loss": sum(means) / len(means), "held_out_step": done}
            self._report["held_out_of"] = {name: spec.locate(uri) for name, uri in spec.held_out.items()}
        for name, values in losses_of.items():
            perplexities = {key.replace("loss", "perplexity"): meters.exponential(v) for key, v in values.items()}
            more = values if objective else values | perplexities
            found = {f"held_out/{name}/{key}": value for key, value in more.items() if math.isfinite(value)}
            if self._writer is not None:
                self._writer.log(found, done)
        return losses_of

    def return_to_best(self, report: dict[str, Any]) -> None:
        """Let the engine have the weights that had the lowest held-out loss, where those at the end have a higher one.
        Raises StorageError."""
        best, last = self._stopper.best if self._stopper else None, report.get("held_out_loss", math.inf)
        if self._stopper is None or best is None or last <= best:
            return
        report |= {"held_out_loss": best, "best_step": report["early"]["step"]}
        kept = DirectoryWeights(self._stopper.place, early.FILE)
        build.fill(self._engine, kept, frozen=False, beat=self._watchdog.beat)

    def _keep_best(self, stopper: early.EarlyStopper) -> None:
        weights = engine.gathered_weights(self._engine, keep=self._worker.is_main, beat=self._watchdog.beat)
        names = {name for name, p in self._engine.module.named_parameters() if p.requires_grad}
        if self._worker.is_main:
            stopper.keep({name: weight for name, weight in weights.items() if name in names})
