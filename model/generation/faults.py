"""What a pass that goes wrong costs: the requests at fault, or where memory is short the newest of the tenant with
most, and nobody else.

A pass that raises has changed nothing (ModelRunner), so it can be tried again with fewer requests, whose tokens are
what they would have been. Of several requests those are at fault whose passes raise by themselves. Where none succeeds
it is the engine that is broken: StepFailed names who was in the step. A group of processes cannot agree on less.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal

import torch

from calumma.model.generation.passes.ahead import AheadPasses
from calumma.model.generation.passes.output import RunnerOutput
from calumma.model.generation.passes.runner import ModelRunner
from calumma.model.generation.request import Failure, FailureKind
from calumma.model.generation.scheduler import ScheduledRequest

log = logging.getLogger(__name__)

# Steps of one request each that may raise, one after the other, before it is put down to the engine.
MOST_IN_A_ROW = 3
# In messages of PyTorch's allocators, cuBLAS and cuDNN.
MEMORY_WORDS = ("out of memory", "not enough memory", "t allocate memory", "cannot allocate memory", "alloc_failed")


class StepFailed(RuntimeError):
    """The engine is broken. request_ids: who was in its last step; they are never to be tried again elsewhere, others
    may be."""

    def __init__(self, request_ids: tuple[str, ...], cause: BaseException) -> None:
        super().__init__(f"a step of {len(request_ids)} requests failed: {described(cause)}")
        self.request_ids = request_ids


class FaultContainment:
    """Runs passes."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._in_a_row = 0

    def run(self, scheduled: list[ScheduledRequest], steps: int) -> list[RunnerOutput]:
        """`ModelRunner.run`; with a Failure for requests that cannot be computed. Raises StepFailed."""
        outputs: list[RunnerOutput] = []
        left, forgot = list(scheduled), False
        while left:
            try:
                outputs += self._runner.run(left, steps)
                self._in_a_row = 0
                return outputs
            except Exception as error:
                fault = error.with_traceback(None)  # which would keep the pass's memory
            if self._runner.decoder.shard.count > 1:
                raise StepFailed(_ids(scheduled), fault) from fault
            if not out_of_memory(fault):
                isolated = self._isolate(left, steps, fault)
                if isolated is None:
                    raise StepFailed(_ids(scheduled), fault) from fault
                return outputs + isolated
            if not forgot:
                self._runner.forget_room()
                forgot = True
                continue
            newest = _newest(left)
            log.warning("out of memory: gave up %s, the newest of %d requests", newest.state.request.id, len(left))
            message = f"out of memory in a step of {len(left)} requests: the newest was given up ({described(fault)})"
            outputs.append(RunnerOutput(newest.state, [], [], Failure("out of memory", message)))
            left.remove(newest)
        return outputs

    def issue(self, ahead: AheadPasses) -> bool:
        """Whether one more pass could be issued; where not, nothing has changed. Raises StepFailed."""
        try:
            ahead.issue()
            return True
        except Exception as error:
            return self._gave_up(ahead, error)

    def read(self, ahead: AheadPasses) -> list[RunnerOutput] | None:
        """What a pass drew that was issued ahead; None where that cannot be had: nothing has changed then. Raises
        StepFailed."""
        try:
            return ahead.read()
        except Exception as error:
            self._gave_up(ahead, error)
            return None

    def _gave_up(self, ahead: AheadPasses, error: Exception) -> Literal[False]:
        """What went wrong goes wrong again in `run`, which finds out whom it is about."""
        if self._runner.decoder.shard.count > 1:
            raise StepFailed(_ids(ahead.items), error) from error
        log.warning("a pass that was issued ahead is given up: %s", described(error))
        if self._runner.contiguous is not None:
            self._runner.contiguous.clear()
        return False

    def _isolate(self, scheduled: list[ScheduledRequest], steps: int, fault: Exception) -> list[RunnerOutput] | None:
        """Find who is at fault, by halves, and run the others; None where it is nobody but the engine."""
        outputs: list[RunnerOutput] = []
        parts, succeeded = [(scheduled, fault)], False
        while parts:
            part, fault = parts.pop()
            if lost(fault):
                return None
            if len(part) == 1:
                log.warning("request %s failed alone: %s", part[0].state.request.id, described(fault))
                kind: FailureKind = "out of memory" if out_of_memory(fault) else "error"
                outputs.append(RunnerOutput(part[0].state, [], [], Failure(kind, described(fault))))
                continue
            for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                try:
                    outputs += self._runner.run(half, steps)
                    succeeded = True
                except Exception as error:
                    parts.append((half, error.with_traceback(None)))
        self._in_a_row = 0 if succeeded else self._in_a_row + 1
        engines = not succeeded and (len(scheduled) > 1 or self._in_a_row >= MOST_IN_A_ROW)
        return None if engines else outputs


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, the device's or the host's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY_WORDS)


def lost(error: BaseException) -> bool:
    """Whether a device will compute nothing more (https://docs.nvidia.com/cuda: sticky errors)."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def described(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _newest(scheduled: list[ScheduledRequest]) -> ScheduledRequest:
    """Of the tenant with most sequences, among those of the lowest priority."""
    held = Counter[tuple[int, str]]()
    for item in scheduled:
        held[item.state.request.priority, item.state.request.tenant] += len(item.counts)

    def rank(item: ScheduledRequest) -> tuple[int, int, int]:
        request = item.state.request
        return request.priority, held[request.priority, request.tenant], item.state.arrival

    return max(scheduled, key=rank)


def _ids(scheduled: list[ScheduledRequest]) -> tuple[str, ...]:
    return tuple(item.state.request.id for item in scheduled)
