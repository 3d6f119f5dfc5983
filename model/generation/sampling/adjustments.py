"""What a request changes about its logits before one is drawn: masks, biases, penalties; and how that is taken back, so
that log-probabilities are the model's own.

In vLLM's order (https://docs.vllm.ai/en/latest/api/vllm/v1/sample/sampler.html): what may come at all, then biases,
then the repetition penalty, then frequency and presence.

Shape suffixes: R requests (rows), C columns of the vocabulary, S seats, N ids seen, K biased ids, W words of 32 bits of
a mask, P = 2 penalties.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from calumma.model.generation.request import SamplingParams

LARGEST = torch.finfo(torch.float32).max
Replaced = tuple[Tensor, Tensor]  # columns [R, X] and what stood there


@dataclass(frozen=True)
class Adjusted:
    """What was replaced in logits, in order."""

    replaced: list[Replaced] = field(default_factory=list)

    def take_back(self, logits_RC: Tensor) -> None:
        """Masked ids stay masked."""
        for columns_RX, before_RX in reversed(self.replaced):
            logits_RC.scatter_(1, columns_RX, before_RX)


class Adjustments:
    """Tables of a row a seat. `longest` is the most ids of prompt and answer; `nothing` an id that never comes, which
    fills rows up."""

    def __init__(self, seats: int, longest: int, nothing: int, device: torch.device) -> None:
        self.nothing, self.device = nothing, device
        # of the prompt first, each once, where they count; then the answer's, `nothing` for what is no text
        self.seen_SN = torch.full((seats, longest + 1), nothing, dtype=torch.long, device=device)
        # repetition, presence and frequency penalty
        self.penalties_S3 = torch.zeros(seats, 3, device=device)
        self.biased_SK = torch.empty(seats, 0, dtype=torch.long, device=device)
        self.bias_SK = torch.empty(seats, 0, device=device)

    def seat(self, seat: int, params: SamplingParams, seen: list[int]) -> None:
        """seen: ids that count for penalties: of the prompt, then of the answer so far."""
        text = params.text
        penalties = [text.repetition_penalty, text.presence_penalty, text.frequency_penalty]
        self.penalties_S3[seat] = torch.tensor(penalties)
        if text.penalized:
            self.seen_SN[seat] = self.nothing
            self.seen_SN[seat, : len(seen)] = torch.tensor(seen, dtype=torch.long)
        biases = params.logit_bias
        if len(biases) > self.biased_SK.shape[1]:
            self._widen(len(biases))
        self.biased_SK[seat], self.bias_SK[seat] = self.nothing, 0
        if biases:
            ids, values = zip(*biases, strict=True)
            self.biased_SK[seat, : len(ids)] = torch.tensor(ids)
            self.bias_SK[seat, : len(ids)] = torch.tensor(values, dtype=torch.float32)

    def forget(self, seat: int, number: int) -> None:
        """What was noted as the id of this number among those seen is none."""
        self.seen_SN[seat, number] = self.nothing

    def apply(
        self,
        logits_RC: Tensor,
        seats_R: Tensor,
        first_R: Tensor,
        seen: int,
        counted: bool,
        biased: int,
        mask_RW: Tensor | None,
        scratch_RC: Tensor,
    ) -> Adjusted:
        """Change logits in place. first_R: where the answer's ids begin among those seen. seen, biased: at most so many
        ids of a row count; counted: whether any row's count of them does; mask_RW, Int32Tensor: bits of what may come.
        `scratch` is overwritten."""
        adjusted = Adjusted()
        if mask_RW is not None:
            forbid(logits_RC, mask_RW)
        if biased:
            columns_RK = self.biased_SK[seats_R, :biased]
            before_RK = logits_RC.gather(1, columns_RK)
            logits_RC.scatter_(1, columns_RK, before_RK + self.bias_SK[seats_R, :biased])
            adjusted.replaced.append((columns_RK, before_RK))
        if seen:
            columns_RN = self.seen_SN[seats_R, :seen]
            before_RN = logits_RC.gather(1, columns_RN)
            after_RN = self._penalize(before_RN, seats_R, columns_RN, first_R, counted, scratch_RC)
            logits_RC.scatter_(1, columns_RN, after_RN)
            adjusted.replaced.append((columns_RN, before_RN))
        return adjusted

    def _penalize(
        self,
        logits_RN: Tensor,
        seats_R: Tensor,
        columns_RN: Tensor,
        first_R: Tensor,
        counted: bool,
        scratch_RC: Tensor,
    ) -> Tensor:
        repetition_R1, presence_R1, frequency_R1 = self.penalties_S3[seats_R].split(1, dim=1)
        weak_RN = torch.where(logits_RN > 0, logits_RN / repetition_R1, logits_RN * repetition_R1)
        if counted:
            generated_RN = torch.arange(columns_RN.shape[1], device=self.device) >= first_R[:, None]
            counts_RC = scratch_RC.zero_().scatter_add_(1, columns_RN, generated_RN.float())
            count_RN = counts_RC.gather(1, columns_RN)
            weak_RN = weak_RN - frequency_R1 * count_RN - presence_R1 * (count_RN > 0)
        # finite however large a penalty, but for what is masked
        return torch.where(logits_RN.isinf(), logits_RN, weak_RN.clamp_(-LARGEST, LARGEST))

    def _widen(self, needed: int) -> None:
        """Room for so many biases a seat, and as many again."""
        ids_SK, values_SK = self.biased_SK, self.bias_SK
        shape = (len(ids_SK), 2 * needed)
        self.biased_SK = torch.full(shape, self.nothing, dtype=torch.long, device=self.device)
        self.bias_SK = torch.zeros(shape, device=self.device)
        self.biased_SK[:, : ids_SK.shape[1]], self.bias_SK[:, : ids_SK.shape[1]] = ids_SK, values_SK


def forbid(logits_RC: Tensor, mask_RW: Tensor) -> None:
    """Set the logits of ids whose bit is 0 to -inf, in place; ids beyond the mask stay."""
    shift_32 = torch.arange(32, dtype=torch.int32, device=mask_RW.device)
    forbidden_RV = ((mask_RW[:, :, None] >> shift_32) & 1 == 0).flatten(1)
    size = min(logits_RC.shape[1], forbidden_RV.shape[1])
    logits_RC[:, :size].masked_fill_(forbidden_RV[:, :size], float("-inf"))
