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
import torch.nn.functional as F
from torch import Tensor

from calumma.model.generation.request import MOST_LOGPROBS, SamplingParams
from calumma.model.vocabulary import Vocabulary

TEXT, IMAGE = 0, 1
FEW = 64  # most likely tokens that are looked at first
MANY = 1 << 14  # tokens that are too many to be sorted
ONE_UPPER = 0x3F80  # the upper 16 bits of 1.0
RUN = 256  # columns that are summed up, or looked through for the largest, at once
TRIES = 4  # ids that are proposed for a nucleus before it is made out
LIKELY = 0.5  # top_p from which a proposed id is likely enough to lie in the nucleus


@dataclass(frozen=True)
class Needs:
    """What the rows of a step ask for, all or some: the caller knows, and the device is not asked.

    random: a temperature; filtered: top-p, top-k or min-p; penalized: generated ids that count, at most so many;
    top: so many most likely ids to report.
    """

    random: bool = False
    filtered: bool = False
    penalized: int = 0
    top: int = 0


@dataclass(frozen=True)
class Drawn:
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
        needs: Needs,
    ) -> Drawn:
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
        if needs.top:
            top_logprobs, top_ids = logits_RC.topk(min(needs.top, MOST_LOGPROBS, logits_RC.shape[1]))
            top_logprobs, top_ids = top_logprobs - normalizer_R1, top_ids + offset
        seen_RN = own_RN = None
        if needs.penalized:
            penalty_R1 = self.settings_SP5[seats_R, phase, 4:]
            seen_RN = self.seen_SN[seats_R, : needs.penalized]
            own_RN = logits_RC.gather(1, seen_RN)
            weakened_RN = torch.where(own_RN > 0, own_RN / penalty_R1, own_RN * penalty_R1)
            top_R1, token_R1 = largest(logits_RC.scatter_(1, seen_RN, weakened_RN))
        if needs.random:
            settings_R5 = self.settings_SP5[seats_R, phase]
            temperature_R1 = settings_R5[:, :1]
            # relative to the maximum, so that no temperature, however small, overflows
            torch.sub(logits_RC, top_R1, out=scratch_RC).div_(torch.where(temperature_R1 > 0, temperature_R1, 1.0))
            scratch_RC.exp_()
            filters_3R = settings_R5[:, 1:4].T if needs.filtered else None
            drawn_R1 = propose(scratch_RC, filters_3R, self.uniform_SNX[seats_R, number_R])
            token_R1 = torch.where(temperature_R1 > 0, drawn_R1, token_R1)
        if seen_RN is not None and own_RN is not None:
            logits_RC.scatter_(1, seen_RN, own_RN)  # before the penalty, for the log-probability
        logprob_R = (logits_RC.gather(1, token_R1) - normalizer_R1)[:, 0]
        token_R = token_R1[:, 0] + offset
        if phase == TEXT:
            self.seen_SN[seats_R, number_R] = torch.where(self.text_V[token_R], token_R, self.nothing)
        return Drawn(token_R, logprob_R, top_ids, top_logprobs)

    def image_probabilities(self, logits_RC: Tensor, seats_R: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
        """What image codes are drawn from, FloatTensor [R, C], and their log-probabilities, as in Event; from logits as
        `sample` takes them."""
        logits_RC += self.bias[IMAGE]
        settings_R5 = self.settings_SP5[seats_R, IMAGE]
        temperature_R1 = settings_R5[:, :1]
        top_R1, token_R1 = largest(logits_RC)
        p_RC = ((logits_RC - top_R1) / torch.where(temperature_R1 > 0, temperature_R1, 1.0)).softmax(-1)
        if needs.filtered:
            p_RC.masked_fill_(p_RC < thresholds(p_RC, *settings_R5[:, 1:4].T)[:, None], 0)
            p_RC /= p_RC.sum(-1, keepdim=True)
        certain_RC = torch.zeros_like(p_RC).scatter_(1, token_R1, 1.0)
        return torch.where(temperature_R1 > 0, p_RC, certain_RC), logits_RC.log_softmax(-1)

    def _scratch(self, like_RC: Tensor) -> Tensor:
        """Room as large as the logits, the same at every step: fresh memory costs as much as arithmetic."""
        if self._room.numel() < like_RC.numel():
            self._room = torch.empty(like_RC.numel(), device=like_RC.device)
        return self._room[: like_RC.numel()].view_as(like_RC)


def propose(weights_RC: Tensor, filters_3R: Tensor | None, uniform_RX: Tensor) -> Tensor:
    """LongTensor [R, 1]: what `draw` gives, in distribution, from weights that need not sum to 1; overwritten.

    An id drawn from all lies in the nucleus where the ids more likely than itself do not reach top_p. If so it is the
    one, else the next is tried: no row is sorted, which for a flat one costs more than the model. Rows with other
    filters, or none of whose tries lies inside, are drawn from exactly; so are all where the host would have to wait
    for the device to know.
    """
    if filters_3R is None:
        return invert(weights_RC, uniform_RX[:, 0])
    if weights_RC.is_cuda:
        return draw(weights_RC.div_(weights_RC.sum(-1, keepdim=True)), filters_3R, uniform_RX[:, -1])
    top_p_R, min_p_R, top_k_R = filters_3R
    tried_R = (top_p_R >= LIKELY) & (min_p_R <= 0) & (top_k_R <= 0)
    ids_R1 = torch.full((len(weights_RC), 1), -1)
    rows = tried_R.nonzero()[:, 0]
    for attempt in range(TRIES):
        if not rows.numel():
            break
        own_RC = weights_RC if len(rows) == len(weights_RC) else weights_RC[rows]
        found_R1 = invert(own_RC, uniform_RX[rows, attempt])
        # with a plain number for each row this is one vectorized pass
        limits = own_RC.gather(1, found_R1)[:, 0].tolist()
        above_R = torch.stack([F.threshold(row, limit, 0).sum() for row, limit in zip(own_RC, limits, strict=True)])
        inside_R = (above_R < top_p_R[rows] * own_RC.sum(-1)) | (top_p_R[rows] >= 1)
        ids_R1[rows[inside_R]] = found_R1[inside_R]
        rows = rows[~inside_R]
    rows = (ids_R1[:, 0] < 0).nonzero()[:, 0]
    if rows.numel():
        own_RC = weights_RC[rows]
        own_RC /= own_RC.sum(-1, keepdim=True)
        ids_R1[rows] = draw(own_RC, filters_3R[:, rows], uniform_RX[rows, -1])
    return ids_R1


def draw(probabilities_RC: Tensor, filters_3R: Tensor | None, uniform_R: Tensor) -> Tensor:
    """LongTensor [R, 1]: one id of each row, at a uniform number of 0..1.

    filters_3R: top_p, min_p and top_k of each row. `probabilities_RC` is overwritten.
    """
    if filters_3R is not None:
        threshold_R = thresholds(probabilities_RC, *filters_3R)
        probabilities_RC.masked_fill_(probabilities_RC < threshold_R[:, None], 0)
    return invert(probabilities_RC, uniform_R)


def invert(weights_RC: Tensor, uniform_R: Tensor) -> Tensor:
    """LongTensor [R, 1]: the id at which the cumulative sum, in order of ids, passes a share of the whole. First the
    run of columns in which it does is looked for, then the place in it: only sums of runs are needed of all."""
    runs_RBC = _runs(weights_RC, 0.0)
    sums_RB = runs_RBC.sum(-1)
    run_R1, rest_R1 = _passed(sums_RB, uniform_R[:, None] * sums_RB.sum(-1, keepdim=True))
    inside_RC = runs_RBC[torch.arange(len(run_R1), device=run_R1.device), run_R1[:, 0]]
    place_R1, _ = _passed(inside_RC, rest_R1)
    return (run_R1 * runs_RBC.shape[-1] + place_R1).clamp_(max=weights_RC.shape[1] - 1)  # only NaN gets beyond


def _passed(weights_RC: Tensor, target_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place at which the cumulative sum passes a number, and what is left of that at the place."""
    cumulative_RC = weights_RC.cumsum(-1)
    total_R1 = cumulative_RC[:, -1:]
    # below the total even where rounding would not have it so: then the place at which it is passed has some mass
    target_R1 = torch.minimum(target_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1))).clamp_(min=0)
    place_R1 = torch.searchsorted(cumulative_RC, target_R1, right=True).clamp_(max=weights_RC.shape[1] - 1)
    return place_R1, target_R1 - (cumulative_RC - weights_RC).gather(1, place_R1)


def largest(values_RC: Tensor) -> tuple[Tensor, Tensor]:
    """`values_RC.max(-1, keepdim=True)`, the first of equal ones. A CPU is faster by runs: maxima are vectorized, the
    search for their places is not."""
    if values_RC.is_cuda:
        top = values_RC.max(-1, keepdim=True)
        return top.values, top.indices
    runs_RBC = _runs(values_RC, float("-inf"))
    top_R1, run_R1 = runs_RBC.amax(-1).max(-1, keepdim=True)
    inside_RC = runs_RBC[torch.arange(len(run_R1)), run_R1[:, 0]]
    return top_R1, run_R1 * runs_RBC.shape[-1] + inside_RC.max(-1, keepdim=True).indices


def _runs(values_RC: Tensor, filler: float) -> Tensor:
    """[R, B, RUN] of [R, C], filled up where C is no multiple."""
    missing = -values_RC.shape[1] % RUN
    return (F.pad(values_RC, (0, missing), value=filler) if missing else values_RC).unflatten(1, (-1, RUN))


def thresholds(probabilities_RC: Tensor, top_p_R: Tensor, min_p_R: Tensor, top_k_R: Tensor) -> Tensor:
    """FloatTensor [R]: the least probability that each row's filters leave; see PhaseSampling for their order.

    The most likely few tokens tell, unless a row is so flat that they do not hold its mass. How a row is looked at
    depends on nothing but the row. Where the host would have to wait for the device to know, all are sorted at once.
    """
    C = probabilities_RC.shape[1]
    top_k_R = torch.where(top_k_R > 0, top_k_R, float(C)).clamp(max=C)
    if probabilities_RC.is_cuda or C <= 8 * FEW:
        return _threshold(probabilities_RC.sort(-1, descending=True).values, top_p_R, min_p_R, top_k_R, C)[0]
    threshold_R, known_R = _threshold(probabilities_RC.topk(FEW).values, top_p_R, min_p_R, top_k_R, C)
    large_R = ((top_k_R >= C) & (min_p_R <= 0)) if C >= MANY else torch.zeros_like(known_R)
    for rows, large in (((~known_R & large_R).nonzero()[:, 0], True), ((~known_R & ~large_R).nonzero()[:, 0], False)):
        if rows.numel() and large:
            threshold_R[rows] = nucleus(probabilities_RC[rows], top_p_R[rows])
        elif rows.numel():
            sorted_RC = probabilities_RC[rows].sort(-1, descending=True).values
            threshold_R[rows] = _threshold(sorted_RC, top_p_R[rows], min_p_R[rows], top_k_R[rows], C)[0]
    return threshold_R


def nucleus(probabilities_RC: Tensor, top_p_R: Tensor) -> Tensor:
    """FloatTensor [R]: the least probability of the smallest sets with mass top_p, without sorting all: floats of 0..1
    are ordered as their bits are, so the mass at each value of the upper 16 bits tells where the set ends; only those
    that share them are sorted."""
    upper_RC = (probabilities_RC.view(torch.int32) >> 16).long()
    mass_RX = torch.zeros(len(top_p_R), ONE_UPPER + 1).scatter_add_(1, upper_RC, probabilities_RC)
    reached_RX = mass_RX.flip(1).cumsum_(-1)
    place_R1 = torch.searchsorted(reached_RX, top_p_R[:, None]).clamp(max=ONE_UPPER)
    last_R1 = ONE_UPPER - place_R1
    above_R1 = reached_RX.gather(1, place_R1) - mass_RX.gather(1, last_R1)
    inside_RC = torch.where(upper_RC == last_R1, probabilities_RC, -1.0)
    sorted_RK = inside_RC.topk(int((inside_RC >= 0).sum(-1).max())).values
    needed_RK = above_R1 + sorted_RK.clamp(min=0).cumsum(-1) < top_p_R[:, None]
    count_R1 = (sorted_RK >= 0).sum(-1, keepdim=True)
    return sorted_RK.gather(1, needed_RK.sum(-1, keepdim=True).minimum(count_R1 - 1).clamp(min=0))[:, 0].clamp(min=0)


def _threshold(sorted_RK: Tensor, top_p_R: Tensor, min_p_R: Tensor, top_k_R: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """From the K most likely: the threshold, and whether what is less likely could change nothing."""
    rank_K = torch.arange(sorted_RK.shape[1], device=sorted_RK.device)
    allowed_RK = (rank_K < top_k_R[:, None]) & (sorted_RK >= min_p_R[:, None] * sorted_RK[:, :1])
    open_R = (top_k_R >= C) & (min_p_R <= 0)
    closed_R = ~allowed_RK[:, -1]
    weight_RK = torch.where(allowed_RK, sorted_RK, 0.0)
    cumulative_RK = weight_RK.cumsum(-1)
    mass_R = torch.where(open_R, 1.0, cumulative_RK[:, -1])
    whole_R = top_p_R >= 1
    kept_RK = allowed_RK & (whole_R[:, None] | (cumulative_RK - weight_RK < (top_p_R * mass_R)[:, None]))
    last_R1 = (kept_RK.sum(-1, keepdim=True) - 1).clamp(min=0)  # top_p 0 keeps the most likely one
    threshold_R = sorted_RK.gather(1, last_R1)[:, 0]
    if sorted_RK.shape[1] == C:
        return threshold_R, torch.ones_like(whole_R)
    known_R = closed_R | (open_R & (whole_R | ~kept_RK[:, -1]))
    return torch.where(open_R & whole_R, 0.0, threshold_R), known_R


def _bias(allowed: list[int], columns: slice) -> Tensor:
    """FloatTensor [C]: 0 where an id is allowed, -inf elsewhere; ids the vocabulary does not know are never allowed."""
    bias_C = torch.full((columns.stop - columns.start,), float("-inf"))
    bias_C[torch.tensor(allowed, dtype=torch.long) - columns.start] = 0
    return bias_C
