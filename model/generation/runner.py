"""Forward passes: prefill of what is new, then one decoding pass that all running sequences share.

Prefill writes all tokens of a context but the last into the cache; the decoding pass takes the last token of every
sequence, newcomers, text, image and guidance branches alike, so there is one place where tokens are sampled.

Shape suffixes: B sequences (the R requests' full contexts first, then branches), R requests, T tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calumma.model.generation.request import SamplingParams
from calumma.model.generation.sampler import Sampler
from calumma.model.generation.sequence import Generation, Grammar, Sequence
from calumma.model.transformer import KVCache, Transformer
from calumma.model.vocabulary import Vocabulary

# Rows are padded to one prefill pass when that wastes at most this many tokens each, or half of the longest:
# a further pass over a small model costs about as much.
PADDING = 32


class Runner:
    def __init__(self, transformer: Transformer, vocabulary: Vocabulary, slots: int, context: int) -> None:
        weight = next(transformer.parameters())
        self.transformer, self.context, self.device = transformer, context, weight.device
        self.cache = KVCache(transformer.config, slots=slots, length=context, device=weight.device, dtype=weight.dtype)
        self.sampler = Sampler(vocabulary, transformer.config.vocabulary_size, slots, context, weight.device)

    def seat(self, slot: int, params: SamplingParams) -> None:
        self.sampler.seat(slot, params)

    def prefill(self, sequences: list[Sequence], budget: int) -> None:
        """Write up to `budget` pending tokens into the cache, first come first served."""
        parts: list[tuple[Sequence, int]] = []
        for sequence in sequences:
            length = min(sequence.pending, budget)
            budget -= length
            if length > 0:
                parts.append((sequence, length))
        parts.sort(key=lambda part: -part[1])
        while parts:
            longest = parts[0][1]
            fits = [
                longest - length <= max(PADDING, longest // 2) and sequence.cached + longest <= self.context
                for sequence, length in parts
            ]
            self._write([part for part, fit in zip(parts, fits, strict=True) if fit], longest)
            parts = [part for part, fit in zip(parts, fits, strict=True) if not fit]

    def _write(self, parts: list[tuple[Sequence, int]], longest: int) -> None:
        tokens = [
            sequence.tokens[sequence.cached : sequence.cached + length] + [0] * (longest - length)
            for sequence, length in parts
        ]
        self.transformer(
            self._tensor(tokens),
            cache=self.cache,
            slots=self._tensor([sequence.slot for sequence, _ in parts]),
            start=self._tensor([sequence.cached for sequence, _ in parts]),
            length=max(sequence.cached for sequence, _ in parts) + longest,
            needed=torch.empty(len(parts), 0, dtype=torch.long, device=self.device),  # nothing is sampled: no logits
        )
        for sequence, length in parts:
            sequence.cached += length

    def decode(self, generations: list[Generation], steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """Sample `steps` tokens for each of R requests; lists [R][steps] of tokens and of log-probabilities.

        More than one step only when every request has that many image codes to go: then nothing depends on what is
        sampled, and the host reads the device once for all of them.
        """
        R = len(generations)
        # (sequence, row of its request, guidance weight): first, then second branches, so that a rank has a row once
        ranks = [
            [(*g.branches[rank], row) for row, g in enumerate(generations) if len(g.branches) > rank] for rank in (0, 1)
        ]
        sequences = [g.full for g in generations] + [sequence for rank in ranks for sequence, _, _ in rank]
        owners: list[int] = [*range(R), *(row for rank in ranks for _, _, row in rank)]
        token_B, slot_B, start_B, owner_B = self._tensor(
            [[s.tokens[-1] for s in sequences], [s.slot for s in sequences], [s.cached for s in sequences], owners]
        )
        slot_R = slot_B[:R]
        grammar_R, number_R = self._tensor([[int(g.grammar) for g in generations], [g.drawn for g in generations]])
        weight_B = None
        if len(sequences) > R:
            weights = [g.weight for g in generations] + [weight for rank in ranks for _, weight, _ in rank]
            weight_B = torch.tensor(weights, device=self.device)
        phases = [g.params.image if g.grammar >= Grammar.CODES else g.params.text for g in generations]
        random = any(phase.temperature > 0 for phase in phases)
        penalize = any(phase.repetition_penalty != 1 for phase in phases)
        longest = max(s.cached for s in sequences)
        sampled, logprobs = [], []
        for step in range(steps):
            logits_BV = self.transformer(
                token_B[:, None], cache=self.cache, slots=slot_B, start=start_B + step, length=longest + step + 1
            )[:, 0]
            logits_RV = logits_BV[:R]
            if weight_B is not None:
                logits_RV = guide(logits_BV, weight_B, owner_B, R, len(ranks[0]))
            token_R, logprob_R = self.sampler.sample(logits_RV, slot_R, grammar_R, number_R + step, random, penalize)
            sampled.append(token_R)
            logprobs.append(logprob_R)
            token_B = token_R[owner_B]
        tokens_RS, logprobs_RS = torch.stack(sampled, dim=1).tolist(), torch.stack(logprobs, dim=1).tolist()
        if any(math.isnan(logprob) for row in logprobs_RS for logprob in row):
            raise FloatingPointError(
                "the model's logits are not numbers: its weights are broken, or overflow their dtype"
            )
        return tokens_RS, logprobs_RS

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def guide(logits_BV: Tensor, weight_B: Tensor, owner_B: Tensor, requests: int, first: int) -> Tensor:
    """The weighted sum of each request's sequences, FloatTensor [R, V]; see `Weights`.

    Rows are the `requests` full contexts, then `first` first branches, then second ones. Within a rank no request
    occurs twice, so the sum's order, and with it every bit of the result, is fixed.
    """
    weighted_BV = logits_BV * weight_B[:, None]
    guided_RV = weighted_BV[:requests]
    for rank in (slice(requests, requests + first), slice(requests + first, None)):
        guided_RV = guided_RV.index_add(0, owner_B[rank], weighted_BV[rank])
    return guided_RV
