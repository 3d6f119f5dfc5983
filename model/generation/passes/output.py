"""What a pass gives each of its requests, on the host.

Shape suffixes: R requests, S passes, K most likely ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calumma.model.generation.request import Failure, Logprob
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.sampling.sampler import BROKEN, SamplerOutput

NOT_FINITE = Failure(
    "not finite", "the model's logits for this request are not numbers: its weights are broken, or overflow their dtype"
)


@dataclass
class RunnerOutput:
    """What a pass drew for a request; no tokens where only its prompt was asked about. failure: it went wrong after
    these tokens."""

    state: RequestState
    tokens: list[int]
    logprobs: list[Logprob]
    failure: Failure | None = None


class HostSample:
    """A sample on its way to the host, behind what the device was given before and beside what it is given later.
    top: most likely ids of a row."""

    def __init__(self, sample: SamplerOutput) -> None:
        self.top = 0 if sample.top_ids_RK is None else sample.top_ids_RK.shape[1]
        parts = [sample.token_R, sample.logprob_R, sample.top_ids_RK, sample.top_logprobs_RK]
        self._sample = SamplerOutput(*(None if part is None else _to_host(part) for part in parts))  # type: ignore[arg-type]
        self._event: torch.cuda.Event | None = None
        if sample.token_R.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> SamplerOutput:
        """It, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._sample


def _to_host(part: Tensor) -> Tensor:
    if not part.is_cuda:
        return part
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)


def read_samples(states: list[RequestState], samples: list[SamplerOutput], top: int) -> list[RunnerOutput]:
    """The samples of one or several passes, read from the device at once. top: most likely ids that were asked for. A
    request fails at the first of its ids that is BROKEN."""
    tokens_RS = torch.stack([sample.token_R for sample in samples], dim=1).tolist()
    values_RS = torch.stack([sample.logprob_R for sample in samples], dim=1).tolist()
    tops = [id_logprob_pairs(sample.top_ids_RK, sample.top_logprobs_RK) for sample in samples] if top else []
    outputs = []
    for row, (state, tokens, values) in enumerate(zip(states, tokens_RS, values_RS, strict=True)):
        most, failure = state.params.logprobs or 0, None
        if BROKEN in tokens:
            failure, tokens = NOT_FINITE, tokens[: tokens.index(BROKEN)]
        logprobs = [
            Logprob(value, possible(tops[step][row][:most]) if most else ())
            for step, value in enumerate(values[: len(tokens)])
        ]
        outputs.append(RunnerOutput(state, tokens, logprobs, failure))
    return outputs


def id_logprob_pairs(ids_RK: Tensor | None, logprobs_RK: Tensor | None) -> list[list[tuple[int, float]]]:
    """(id, log-probability) of each row's most likely ids; an empty list for None."""
    if ids_RK is None or logprobs_RK is None:
        return []
    return [list(zip(*row, strict=True)) for row in zip(ids_RK.tolist(), logprobs_RK.tolist(), strict=True)]


def possible(pairs: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Those that are not masked."""
    return tuple(pair for pair in pairs if pair[1] > -math.inf)
