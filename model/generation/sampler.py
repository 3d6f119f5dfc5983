"""Grammar masks, repetition penalty, temperature and top-p for all rows of a step at once, on the device.

Per-request settings lie in tables of one row a cache slot; a step gathers its rows. Random numbers come from a table
too: a request's own generator fills its row when it starts, and its n-th sampled token takes the n-th number. So a
request's tokens depend on its seed alone, whoever shares the batch, and a step draws nothing.

Shape suffixes: R requests (rows), V vocabulary, S slots, G grammars, N numbers, P phases (text, image).
"""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from calumma.model.generation.request import SamplingParams
from calumma.model.generation.sequence import Grammar
from calumma.model.vocabulary import Vocabulary


def forbidden_ids(vocabulary: Vocabulary, size: int) -> Tensor:
    """BoolTensor [G, size], true where a grammar forbids an id; ids the vocabulary does not know are never allowed."""
    stops = [vocabulary.eos, vocabulary.end_turn]
    allowed = {
        Grammar.TEXT: [*vocabulary.text_ids, *stops],
        Grammar.TEXT_OR_IMAGE: [*vocabulary.text_ids, *stops, vocabulary.begin_image],
        Grammar.CODES: vocabulary.image_ids,
        Grammar.END_IMAGE: [vocabulary.end_image],
    }
    forbidden_GV = torch.ones(len(Grammar), size, dtype=torch.bool)
    for grammar, ids in allowed.items():
        forbidden_GV[grammar, torch.tensor(ids, dtype=torch.long)] = False
    return forbidden_GV


class Sampler:
    """`size` logits a row, of which the vocabulary names the first; `numbers` is the most tokens of one request."""

    def __init__(self, vocabulary: Vocabulary, size: int, slots: int, numbers: int, device: torch.device) -> None:
        self.forbidden_GV = forbidden_ids(vocabulary, size).to(device)
        self.text_V = torch.zeros(size, dtype=torch.bool)
        self.text_V[torch.tensor(vocabulary.text_ids, dtype=torch.long)] = True
        self.text_V = self.text_V.to(device)
        self.temperature_SP = torch.zeros(slots, 2, device=device)
        self.top_p_SP = torch.ones(slots, 2, device=device)
        self.penalty_SP = torch.ones(slots, 2, device=device)
        self.seen_SV = torch.zeros(slots, size, dtype=torch.bool, device=device)
        self.uniform_SN = torch.zeros(slots, numbers, device=device)

    def seat(self, slot: int, params: SamplingParams) -> None:
        """A request starts in a slot: its settings and random numbers take the slot's row."""
        phases = (params.text, params.image)
        self.temperature_SP[slot] = torch.tensor([phase.temperature for phase in phases])
        self.top_p_SP[slot] = torch.tensor([phase.top_p for phase in phases])
        self.penalty_SP[slot] = torch.tensor([phase.repetition_penalty for phase in phases])
        self.seen_SV[slot] = False
        generator = torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)
        self.uniform_SN[slot] = torch.rand(self.uniform_SN.shape[1], generator=generator)

    def sample(
        self, logits_RV: Tensor, slots_R: Tensor, grammar_R: Tensor, number_R: Tensor, random: bool, penalize: bool
    ) -> tuple[Tensor, Tensor]:
        """FloatTensor [R, V] logits -> LongTensor [R] tokens, FloatTensor [R] log-probabilities (see Event).

        slots_R: whose settings; grammar_R: which mask; number_R: which random number (all LongTensor [R]). `random` and
        `penalize` say whether any row has a temperature, or a penalty: the caller knows, and the device is not asked.
        """
        phase_R = (grammar_R >= Grammar.CODES).long()
        logits_RV = logits_RV.masked_fill(self.forbidden_GV[grammar_R], float("-inf"))
        normalizer_R = logits_RV.logsumexp(-1)
        chosen_RV = logits_RV
        if penalize:
            penalty_R1 = self.penalty_SP[slots_R, phase_R, None]
            weakened_RV = torch.where(logits_RV > 0, logits_RV / penalty_R1, logits_RV * penalty_R1)
            chosen_RV = torch.where(self.seen_SV[slots_R], weakened_RV, logits_RV)
        top_R1, token_R1 = chosen_RV.max(-1, keepdim=True)
        if random:
            temperature_R1 = self.temperature_SP[slots_R, phase_R, None]
            # relative to the maximum, so that no temperature, however small, overflows
            scaled_RV = (chosen_RV - top_R1) / torch.where(temperature_R1 > 0, temperature_R1, 1.0)
            drawn_R1 = self._draw(
                scaled_RV.softmax(-1), self.top_p_SP[slots_R, phase_R], self.uniform_SN[slots_R, number_R]
            )
            token_R1 = torch.where(temperature_R1 > 0, drawn_R1, token_R1)
        if penalize:
            token_R = token_R1[:, 0]
            self.seen_SV[slots_R, token_R] = self.seen_SV[slots_R, token_R] | self.text_V[token_R]
        return token_R1[:, 0], logits_RV.gather(1, token_R1)[:, 0] - normalizer_R

    @staticmethod
    def _draw(probabilities_RV: Tensor, top_p_R: Tensor, uniform_R: Tensor) -> Tensor:
        """LongTensor [R, 1]: the cumulative distribution of the top-p set, inverted at a uniform number of 0..1."""
        sorted_RV, order_RV = probabilities_RV.sort(stable=True, dim=-1, descending=True)
        cumulative_RV = sorted_RV.cumsum(-1)
        kept_RV = cumulative_RV - sorted_RV < top_p_R[:, None]
        last_R1 = (kept_RV.sum(-1, keepdim=True) - 1).clamp(min=0)  # top_p 0 keeps the most likely one
        threshold_R1 = uniform_R[:, None] * cumulative_RV.gather(1, last_R1)
        # numbers end at 1 - 2**-24, so the threshold is below the set's mass; only NaN logits point beyond its end
        return order_RV.gather(1, torch.searchsorted(cumulative_RV, threshold_R1, right=True).minimum(last_R1))
