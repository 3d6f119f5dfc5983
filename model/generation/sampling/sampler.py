"""Masks, penalties, temperature and filters for all rows of a phase at once, on the device.

Per-request settings lie in tables of one row a seat; a step gathers its rows. Random numbers come from a table too,
which holds those of the draws that each seat is at: the n-th id of an answer takes the n-th few numbers of its seed. So
a request's tokens depend on its seed alone, whoever shares the batch and however often it is preempted, and a step
draws nothing.

A row whose logits are no numbers gets the id BROKEN, which goes to the host with the others' ids; it changes nothing
about them.

Shape suffixes: R requests (rows), V vocabulary, C columns of it (V in text, the image ids' in images), B runs of
columns, S seats, N ids of an answer, P phases (text, image), K most likely ids, X random numbers of an id, W words of
32 bits of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calumma.model.generation.request import LIKELY, MOST_LOGPROBS, SamplingParams
from calumma.model.generation.sampling.adjustments import Adjusted, Adjustments
from calumma.model.generation.sampling.categorical import TRIES, draw_by_rejection, largest
from calumma.model.generation.sampling.filters import thresholds
from calumma.model.generation.sampling.randomness import SeatNumbers
from calumma.model.vocabulary import Vocabulary

TEXT, IMAGE = 0, 1
BROKEN = -1  # where an id would be, of a row whose logits are no numbers


@dataclass(frozen=True)
class SamplingMetadata:
    """What the rows of a step ask for, all or some: the caller knows, and the device is not asked.

    random: a temperature; filtered: top-p, top-k or min-p; trimmed: filters that are not `proposes`; penalized: any
    penalty; seen: ids that count for penalties, at most so many; counted: it matters how often; biased: so many biases
    at most; top: so many most likely ids to report.
    """

    random: bool = False
    filtered: bool = False
    trimmed: bool = False
    penalized: bool = False
    seen: int = 0
    counted: bool = False
    biased: int = 0
    top: int = 0


@dataclass(frozen=True)
class SamplerOutput:
    """LongTensor [R] ids, or BROKEN; FloatTensor [R] log-probabilities; [R, top] of the most likely ids where asked
    for."""

    token_R: Tensor
    logprob_R: Tensor
    top_ids_RK: Tensor | None = None
    top_logprobs_RK: Tensor | None = None


@dataclass(frozen=True)
class TextRows:
    """What is known of rows in text besides. LongTensor [R] seen_R: where the id goes among those the request has seen;
    BoolTensor [R] begins_R: whether an image may begin; Int32Tensor [R, W] mask_RW: bits of the ids that may come."""

    seen_R: Tensor
    begins_R: Tensor
    mask_RW: Tensor | None = None


class Sampler:
    """`size` logits a row, of which the vocabulary names the first; `longest` is the most ids of an answer."""

    def __init__(self, vocabulary: Vocabulary, size: int, seats: int, longest: int, device: torch.device) -> None:
        text = [*vocabulary.text_ids, vocabulary.eos, vocabulary.end_turn, vocabulary.begin_image]
        codes = vocabulary.image_ids
        self.begin_image = vocabulary.begin_image
        self.columns = (slice(0, size), slice(codes[0], codes[-1] + 1))  # by phase: what its logits are computed for
        self.bias = (_bias(text, self.columns[TEXT]).to(device), _bias(codes, self.columns[IMAGE]).to(device))
        self.text_V = torch.zeros(size, dtype=torch.bool)
        self.text_V[torch.tensor(vocabulary.text_ids, dtype=torch.long)] = True
        self.text_V = self.text_V.to(device)
        # temperature, top_p, min_p, top_k
        self.settings_SP4 = torch.zeros(seats, 2, 4, device=device)
        self.adjustments = Adjustments(seats, longest, vocabulary.pad, device)
        self.numbers = SeatNumbers(seats, TRIES + 1, device)
        self._room = torch.empty(0, device=device)

    def seat(self, seat: int, params: SamplingParams, seed: int, seen: list[int], answered: int) -> None:
        """A request takes a seat: its settings and the ids that count for penalties so far take the seat's row; the
        next id of its answer is the one of this number."""
        rows = [[p.temperature, p.top_p, p.min_p, p.top_k] for p in (params.text, params.image)]
        self.settings_SP4[seat] = torch.tensor(rows)
        self.adjustments.seat(seat, params, seen)
        self.numbers.seat(seat, seed, answered)

    def sample(
        self,
        logits_RC: Tensor,
        phase: int,
        seats_R: Tensor,
        number_R: Tensor,
        text: TextRows | None,
        metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """One id for each row of a phase, from its logits of `columns[phase]`, which are overwritten.

        seats_R: whose settings; number_R: which id of the answer (LongTensor [R]), for which the caller has reserved
        `numbers`.
        """
        offset = self.columns[phase].start
        logits_RC += self.bias[phase]
        if text is not None:
            logits_RC[:, self.begin_image - offset].masked_fill_(~text.begins_R, float("-inf"))
        top_R1, token_R1 = largest(logits_RC)
        scratch_RC = self._scratch(logits_RC)
        normalizer_R1 = top_R1 - torch.softmax(logits_RC, -1, out=scratch_RC).gather(1, token_R1).log_()
        top_ids = top_logprobs = None
        if metadata.top:
            top_logprobs, top_ids = logits_RC.topk(min(metadata.top, MOST_LOGPROBS, logits_RC.shape[1]))
            top_logprobs, top_ids = top_logprobs - normalizer_R1, top_ids + offset
        adjusted = Adjusted()
        if text is not None and (metadata.seen or metadata.biased or text.mask_RW is not None):
            adjusted = self.adjustments.apply(
                logits_RC,
                seats_R,
                text.seen_R - number_R,
                metadata.seen,
                metadata.counted,
                metadata.biased,
                text.mask_RW,
                scratch_RC,
            )
            top_R1, token_R1 = largest(logits_RC)
        sound_R1 = (normalizer_R1 + top_R1).isfinite()
        if metadata.random:
            settings_R4 = self.settings_SP4[seats_R, phase]
            temperature_R1 = settings_R4[:, :1]
            # relative to the maximum, so that no temperature, however small, overflows
            torch.sub(logits_RC, top_R1, out=scratch_RC).div_(torch.where(temperature_R1 > 0, temperature_R1, 1.0))
            scratch_RC.exp_()
            filters_3R = settings_R4[:, 1:].T if metadata.filtered else None
            drawn_R1 = draw_by_rejection(scratch_RC, filters_3R, self.numbers.of(seats_R, number_R))
            token_R1 = torch.where(temperature_R1 > 0, drawn_R1, token_R1)
        adjusted.take_back(logits_RC)
        logprob_R = (logits_RC.gather(1, token_R1) - normalizer_R1)[:, 0]
        token_R = token_R1[:, 0] + offset
        if text is not None and metadata.penalized:
            seen_R = torch.where(self.text_V[token_R], token_R, self.adjustments.nothing)
            self.adjustments.seen_SN[seats_R, text.seen_R] = seen_R
        token_R.masked_fill_(~sound_R1[:, 0], BROKEN)
        return SamplerOutput(token_R, logprob_R, top_ids, top_logprobs)

    def image_probabilities(
        self, logits_RC: Tensor, seats_R: Tensor, metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor]:
        """What image codes are drawn from, FloatTensor [R, C], and their log-probabilities, as in Event; from logits as
        `sample` takes them. Where a request's filter `proposes`, it is left to who draws. Rows whose logits are no
        numbers are none either."""
        logits_RC += self.bias[IMAGE]
        settings_R4 = self.settings_SP4[seats_R, IMAGE]
        temperature_R1 = settings_R4[:, :1]
        top_R1, token_R1 = largest(logits_RC)
        p_RC = ((logits_RC - top_R1) / torch.where(temperature_R1 > 0, temperature_R1, 1.0)).softmax(-1)
        if metadata.trimmed:
            top_p_R, min_p_R, top_k_R = settings_R4[:, 1:].T
            left_R = (top_p_R >= LIKELY) & (min_p_R <= 0) & (top_k_R <= 0)
            top_p_R = torch.where(left_R, 1.0, top_p_R)
            p_RC.masked_fill_(p_RC < thresholds(p_RC, top_p_R, min_p_R, top_k_R)[:, None], 0)
            p_RC /= p_RC.sum(-1, keepdim=True)
        certain_RC = torch.zeros_like(p_RC).scatter_(1, token_R1, 1.0)
        logprobs_RC = logits_RC.log_softmax(-1)
        sound_R1 = logprobs_RC.gather(1, token_R1).isfinite()
        p_RC = torch.where(temperature_R1 > 0, p_RC, certain_RC)
        return p_RC.masked_fill_(~sound_R1, float("nan")), logprobs_RC

    def forget_room(self) -> None:
        """Give the memory of `_scratch` back."""
        self._room = torch.empty(0, device=self._room.device)

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
