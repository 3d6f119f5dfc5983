"""Bad steps: a loss or gradient that is not finite, a loss that spikes; what becomes of them, when they are too many.

Every worker judges the same sums over all workers by the same history, so all come to the same verdict without asking.
The history is part of each checkpoint's report: a run that resumes judges as one that never stopped.
A step that was skipped or undone keeps its number: a number is a global batch of the plan, and a step of the schedule.
PaLM went around loss spikes in this way (arXiv 2204.02311, section 5.1): back to a checkpoint, on behind the bad data.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from calumma.platform.tracking.writer import BackgroundWriter
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.sections import Faults

Cause = Literal["loss", "gradient", "spike"]


@dataclass(frozen=True)
class Incident:
    """One bad step, numbered from 1."""

    step: int
    cause: Cause
    loss: float
    median: float | None
    action: Literal["skip", "roll_back"]
    back_to: int | None = None
    """The step whose checkpoint the weights returned to."""
    resumed_after: int | None = None
    """The last step whose data was left out."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Incident:
        """The inverse of `to_json`."""
        return cls(**{**values, "loss": float(values["loss"])})

    def describe(self) -> str:
        what = {"loss": f"loss {self.loss:g}", "gradient": "a gradient that is not finite"}.get(
            self.cause, f"loss {self.loss:g} at a running median of {self.median or 0:g}"
        )
        done = "skipped" if self.action == "skip" else f"back to step {self.back_to}, on after {self.resumed_after}"
        return f"step {self.step}: {what}; {done}"

    def to_json(self) -> dict[str, Any]:
        """As JSON, which knows no infinity."""
        return asdict(self) | {"loss": self.loss if math.isfinite(self.loss) else str(self.loss)}


@dataclass
class LossGuard:
    """Judges the steps in order. `recent` are the losses of good ones."""

    rules: Faults
    recent: deque[float] = field(default_factory=deque)
    in_a_row: int = 0
    skipped: int = 0
    rolled_back: int = 0

    def judge(self, loss: float | None) -> Cause | None:
        """What is wrong with a step of this mean loss (nats; None: it had nothing to train), before it is taken."""
        if loss is None:
            return None
        if not math.isfinite(loss):
            return "loss"
        median = self.median
        if self.rules.spike_factor is not None and median is not None and loss > self.rules.spike_factor * median:
            return "spike"
        return None

    @property
    def median(self) -> float | None:
        """Of the last `window` good losses; None before there are so many."""
        return statistics.median(self.recent) if len(self.recent) >= self.rules.window else None

    def record_good(self, loss: float | None) -> None:
        """A step was taken."""
        if loss is not None:
            self.recent.append(loss)
            while len(self.recent) > self.rules.window:
                self.recent.popleft()
        if self.rules.action == "skip":
            self.in_a_row = 0

    def record_checkpoint(self) -> None:
        """A checkpoint was written: a roll-back will not come back to before it."""
        if self.rules.action == "roll_back":
            self.in_a_row = 0

    def record_bad(self) -> None:
        """A step was not taken, or undone."""
        self.in_a_row += 1
        if self.rules.action == "skip":
            self.skipped += 1
        else:
            self.rolled_back += 1

    @property
    def too_many(self) -> bool:
        return self.in_a_row > self.rules.in_a_row

    def metrics(self) -> dict[str, float]:
        return {"faults/skipped": float(self.skipped), "faults/rolled_back": float(self.rolled_back)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint's report keeps."""
        return {
            "recent": list(self.recent),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "rolled_back": self.rolled_back,
        }

    @classmethod
    def from_state(cls, rules: Faults, state: dict[str, Any] | None) -> LossGuard:
        """As it was when the checkpoint was written; a new one without it."""
        state = state or {}
        recent = deque(float(loss) for loss in state.get("recent", ()))
        counts = {name: int(state.get(name, 0)) for name in ("in_a_row", "skipped", "rolled_back")}
        return cls(rules, recent, **counts)


class FaultHandler:
    """The bad steps of a run, as one worker of it keeps them."""

    def __init__(self, rules: Faults, report: dict[str, Any], steps: int) -> None:
        """`report` is that of the checkpoint that the run goes on from."""
        self._rules, self._steps = rules, steps
        self.guard = LossGuard.from_state(rules, report.get("faults"))
        self.incidents = [Incident.from_json(incident) for incident in report.get("incidents", [])]
        self.resume_after = max((incident.resumed_after or 0 for incident in self.incidents), default=0)
        """The last step whose data a roll-back leaves out."""

    def handle(
        self,
        step: int,
        cause: Cause,
        loss: float | None,
        writer: BackgroundWriter | None,
        roll_back: Callable[[], int],
        failure_report: Callable[[], str],
    ) -> None:
        """A bad step, the same on all workers: it was not taken; go back if so specified, by `roll_back`, which returns
        to which step. Raises TrainingFailed, with `failure_report()`, when there were too many in a row."""
        self.guard.record_bad()
        incident = Incident(step, cause, math.nan if loss is None else loss, self.guard.median, self._rules.action)
        if self._rules.action == "roll_back":
            back = roll_back()
            self.resume_after = min(step + self._rules.around, self._steps)
            incident = replace(incident, back_to=back, resumed_after=self.resume_after)
        self.incidents.append(incident)
        if writer is not None:
            writer.log(self.guard.metrics(), step)
            writer.log_dict(incident.to_json(), f"faults/step-{step:08d}.json")
        if self.guard.too_many:
            text = failure_report()
            if writer is not None:
                writer.log_dict(
                    {"report": text, "incidents": [i.to_json() for i in self.incidents]}, "faults/report.json"
                )
            raise TrainingFailed(text)

    def state(self, saved: bool) -> dict[str, Any]:
        """What a checkpoint's report keeps; `saved`: it is about to be written."""
        if saved:
            self.guard.record_checkpoint()
        return {"incidents": [incident.to_json() for incident in self.incidents], "faults": self.guard.state()}


def divergence_report(
    step: int,
    incidents: list[Incident],
    rules: Faults,
    rate: float,
    folder: str,
    field: str = "optimizer.learning_rate",
    warmup: str | None = "schedule.warmup_steps",
    branch_from: int = -1,
) -> str:
    """Why the run ends, for the person who decides how to go on. `field` and `warmup` name the specification's;
    `branch_from`: the step of the checkpoint to go on from with other settings, if there is one."""
    listing = "\n".join(f"  {incident.describe()}" for incident in incidents[-(rules.in_a_row + 1) :])
    spike = " or raise faults.spike_factor if these losses are what this data has" if rules.spike_factor else ""
    return (
        f"training diverged before step {step}: more than {rules.in_a_row} bad steps in a row (faults.in_a_row)\n"
        f"{listing}\n"
        f"Lower {field} (now {rate:g}), {f'lengthen {warmup}, ' if warmup else ''}look at the data of these "
        f"steps,{spike or ' or'} start again from an earlier checkpoint; those up to here stay in {folder}"
        + (
            f"\nWith another rate it goes on by resume: {{from: {branch_from}, allow: [learning_rate]}}"
            * (branch_from > 0)
        )
    )
