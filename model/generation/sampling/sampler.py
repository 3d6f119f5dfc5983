"""Masks, repetition penalty, temperature and filters for all rows of a phase at once, on the device.

Per-request settings lie in tables of one row a seat; a step gathers its rows. Random numbers come from a table too: a
request's own generator fills its row when it is seated, and the n-th id of its answer takes the n-th few numbers. So a
request's tokens depend on its seed alone, whoever shares the batch and however often it is preempted, and a step draws
nothing.

Shape suffixes: R requests (rows), V vocabulary, C columns of it (V in text, the image ids' in images), B runs of
columns, S seats, N ids of an answer, P phases (text, image), K most likely ids, X random numbers of an id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calumma.model.generation.request import MOST_LOGPROBS, SamplingParams
from calumma.model.generation.sampling.categorical import TRIES, draw_by_rejection, largest
from calumma.model.generation.sampling.filters import thresholds
from calumma.model.vocabulary import Vocabulary

TEXT, IMAGE = 0, 1


@dataclass(frozen=True)
class SamplingMetadata:
    """What the rows of a step ask for, all or some: the caller knows, and the device is not asked.

    random: a temperature; filtered: top-p, top-k or min-p; penalized: generated ids that count, at most so many;
    top: so many most likely ids to report.
    """

    random: bool = False
    filtered: bool = False
    penalized: int = 0
    top: int = 0


@dataclass(frozen=True)
class SamplerOutput:
    """LongTensor [R] ids, FloatTensor [R] log-probabilities; [R, top] of the most likely ids where asked for."""

    token_R: Tensor
    logprob_R: Tensor
    top_ids_RK: Tensor | None = None
    top_logprobs_RK: Tensor | None = None


class Sampler:
    """`size` logits a row, of which the vocabulary names the first; `longest` is the most ids of an answer."""

    def __init__(self, vocabulary: Vocabulary, size: int, seats: int, longest: int, device: torch.device) -> None:
        text = [*vocabulary.text_ids, vocabulary.eos, vocabulary.end_turn, vocabulary.begin_image]
        codes = vocabulary.image_ids
        self.begin_image, self.nothing = vocabulary.begin_image, vocabulary.pad
        self.columns = (slice(0, size), slice(codes[0], codes[-1] + 1))  # by phase: what its logits are computed for
        self.bias = (_bias(text, self.columns[TEXT]).to(device), _bias(codes, self.columns[IMAGE]).to(device))
        self.text_V = torch.zeros(size, dtype=torch.bool)
        self.text_V[torch.tensor(vocabulary.text_ids, dtype=torch.long)] = True
        self.text_V = self.text_V.to(device)
        # temperature, top_p, min_p, top_k, repetition_penalty
        self.settings_SP5 = torch.zeros(seats, 2, 5, device=device)
        self.seen_SN = torch.full((seats, longest + 1), self.nothing, dtype=torch.long, device=device)
        self.uniform_SNX = torch.zeros(seats, longest + 1, TRIES + 1, device=device)
        self._room = torch.empty(0, device=device)

    def seat(self, seat: int, params: SamplingParams, seed: int, answer: list[int]) -> None:
        """A request takes a seat: its settings, random numbers and answer so far take the seat's row."""
        rows = [[p.temperature, p.top_p, p.min_p, p.top_k, p.repetition_penalty] for p in (params.text, params.image)]
        self.settings_SP5[seat] = torch.tensor(rows)
        self.seen_SN[seat] = self.nothing
        if answer:
            ids = torch.tensor(answer, device=self.seen_SN.device)
            self.seen_SN[seat, : len(answer)] = torch.where(self.text_V[ids], ids, self.nothing)
        self.uniform_SNX[seat] = torch.rand(self.uniform_SNX.shape[1:], generator=torch.Generator().manual_seed(seed))

    def sample(
        self,
        logits_RC: Tensor,
        phase: int,
        seats_R: Tensor,
        number_R: Tensor,
        begins_R: Tensor | None,
        metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """One id for each row of a phase, from its logits of `columns[phase]`, which are overwritten.

        seats_R: whose settings; number_R: which id of the answer (LongTensor [R]); begins_R, BoolTensor [R]: whether an
        image may begin, for text.
        """
        offset = self.columns[phase].start
        logits_RC += self.bias[phase]
        if begins_R is not None:
            logits_RC[:, self.begin_image - offset].masked_fill_(~begins_R, float("-inf"))
        top_R1, token_R1 = largest(logits_RC)
        scratch_RC = self._scratch(logits_RC)
        normalizer_R1 = top_R1 - torch.softmax(logits_RC, -1, out=scratch_RC).gather(1, token_R1).log_()
        top_ids = top_logprobs = None
        if metadata.top:
            top_logprobs, top_ids = logits_RC.topk(min(metadata.top, MOST_LOGPROBS, logits_RC.shape[1]))
            top_logprobs, top_ids = top_logprobs - normalizer_R1, top_ids + offset
        seen_RN = own_RN = None
        if metadata.penalized:
            penalty_R1 = self.settings_SP5[seats_R, phase, 4:]
            seen_RN = self.seen_SN[seats_R, : metadata.penalized]
            own_RN = logits_RC.gather(1, seen_RN)
            weakened_RN = torch.where(own_RN > 0, own_RN / penalty_R1, own_RN * penalty_R1)
            top_R1, token_R1 = largest(logits_RC.scatter_(1, seen_RN, weakened_RN))
        if metadata.random:
            settings_R5 = self.settings_SP5[seats_R, phase]
            temperature_R1 = settings_R5[:, :1]
            # relative to the maximum, so that no temperature, however small, overflows
            torch.sub(logits_RC, top_R1, out=scratch_RC).div_(torch.where(temperature_R1 > 0, temperature_R1, 1.0))
            scratch_RC.exp_()
            filters_3R = settings_R5[:, 1:4].T if metadata.filtered else None
            drawn_R1 = draw_by_rejection(scratch_RC, filters_3R, self.uniform_SNX[seats_R, number_R])
            token_R1 = torch.where(temperature_R1 > 0, drawn_R1, token_R1)
        if seen_RN is not None and own_RN is not None:
            logits_RC.scatter_(1, seen_RN, own_RN)  # before the penalty, for the log-probability
        logprob_R = (logits_RC.gather(1, token_R1) - normalizer_R1)[:, 0]
        token_R = token_R1[:, 0] + offset
        if phase == TEXT:
            self.seen_SN[seats_R, number_R] = torch.where(self.text_V[token_R], token_R, self.nothing)
        return SamplerOutput(token_R, logprob_R, top_ids, top_logprobs)

    def image_probabilities(
        self, logits_RC: Tensor, seats_R: Tensor, metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor]:
        """What image codes are drawn from, FloatTensor [R, C], and their log-probabilities, as in Event; from logits as
        `sample` takes them."""
        logits_RC += self.bias[IMAGE]
        settings_R5 = self.settings_SP5[seats_R, IMAGE]
        temperature_R1 = settings_R5[:, :1]
        top_R1, token_R1 = largest(logits_RC)
        p_RC = ((logits_RC - top_R1) / torch.where(temperature_R1 > 0, temperature_R1, 1.0)).softmax(-1)
        if metadata.filtered:
            p_RC.masked_fill_(p_RC < thresholds(p_RC, *settings_R5[:, 1:4].T)[:, None], 0)
            p_RC /= p_RC.sum(-1, keepdim=True)
        certain_RC = torch.zeros_like(p_RC).scatter_(1, token_R1, 1.0)
        return torch.where(temperature_R1 > 0, p_RC, certain_RC), logits_RC.log_softmax(-1)

    def _scratch(self, like_RC: Tensor) -> Tensor:
        """Room as large as the logits, the same at every step: fresh memory costs as much as arithmetic."""
        if self._room.numel() < like_RC.numel():
            self._room = torch.empty(like_RC.numel(), device=like_RC.device)
        return self._room[: like_RC.numel()].view_as(like_RC)


def _bias(allowed: list[int], columns: slice) -> Tensor:
    """FloatTensor [C]: 0 where an id is allowed, -inf elsewhere; ids the vocabulary does not know are never allowed."""
    bias_C = torch.full((columns.stop - columns.start,), float("-inf"))
    bias_C[torch.tensor(allowed, dtype=torch.long) - columns.start] = 0
    return bias_C
