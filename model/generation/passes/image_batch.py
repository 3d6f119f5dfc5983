"""The requests of a pass that are within images: which rows they draw from, and guidance of their logits.

Shape suffixes: R draws, B sequences that draw (the full contexts first, then branches), C columns of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.generation.request_state import RequestState


class ImageBatch:
    """Requests within images and what is drawn for them: one code each, or one for each drafted and one more.

    draws: (request, number of the draw). rows: indices of the pass's tokens after which a code comes, one a draw of the
    full contexts, then of the first, then of the second branches.
    """

    def __init__(self, states: list[RequestState], layout: BatchLayout) -> None:
        self.states = states
        self.draws = [(s, number) for s in states for number in range(1 + (len(s.drafts.codes) if s.drafts else 0))]

        def row(sequence: Sequence, state: RequestState, number: int) -> int:
            return layout.last[id(sequence)] - (len(state.drafts.codes) if state.drafts else 0) + number

        # so that within a rank no draw occurs twice
        ranks = [
            [(s.branches[rank][0], rank, draw) for draw, (s, _) in enumerate(self.draws) if len(s.branches) > rank]
            for rank in (0, 1)
        ]
        branches = [branch for rank in ranks for branch in rank]
        self.rows = [row(s.full, s, number) for s, number in self.draws]
        self.rows += [row(sequence, *self.draws[draw]) for sequence, _, draw in branches]
        self._owners = [*range(len(self.draws)), *(draw for _, _, draw in branches)]
        self._weights = [(draw, 0) for draw in range(len(self.draws))]  # by draw and sequence
        self._weights += [(draw, rank + 1) for _, rank, draw in branches]
        self._codes = [state.code + number for state, number in self.draws]
        self._scheduled = any(s.branches and s.params.guidance_schedule != "constant" for s in states)
        self._first = len(ranks[0])

    def to(self, device: torch.device) -> None:
        self._owner_B = torch.tensor(self._owners, device=device)
        self._weight_B1 = self._weights_of(0).to(device)

    def _weights_of(self, ahead: int) -> Tensor:
        codes = zip(self.draws, self._codes, strict=True)
        weights = [state.weights(code + ahead) for (state, _), code in codes]
        return torch.tensor([weights[draw][sequence] for draw, sequence in self._weights])[:, None]

    def repeat_for_branches(self, values_R: Tensor) -> Tensor:
        """[B]: a value of each draw for all its sequences."""
        return values_R[self._owner_B]

    def guide(self, logits_BC: Tensor, ahead: int = 0) -> Tensor:
        """The weighted sum of each draw's sequences, FloatTensor [R, C], so many codes after those of the states; see
        `GuidanceInterval`. Its order, and with it every bit of the result, is fixed."""
        R, B = len(self.draws), len(self.rows)
        if B == R:
            return logits_BC
        logits_BC *= (
            self._weights_of(ahead).to(logits_BC.device, non_blocking=True)
            if ahead and self._scheduled
            else self._weight_B1
        )
        guided_RC = logits_BC[:R]
        for rank in (slice(R, R + self._first), slice(R + self._first, B)):
            guided_RC.index_add_(0, self._owner_B[rank], logits_BC[rank])
        return guided_RC
