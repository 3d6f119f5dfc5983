"""Learning rates as a pure function of the step: linear warm-up, then decay (paper sections 2.3 and 3.2)."""

from __future__ import annotations

import math

from calumma.platform.training.sections import Schedule


def learning_rate(step: int, peak: float, schedule: Schedule, total_steps: int) -> float:
    """The rate with which step number `step` (from 0, over all stages) is taken.

    It rises linearly over `warmup_steps` and falls from `peak` to `peak * final` at `total_steps`; beyond, it stays.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = max(1, total_steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    if schedule.kind == "exponential":
        return peak * schedule.final**done
    return peak * (schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2)
