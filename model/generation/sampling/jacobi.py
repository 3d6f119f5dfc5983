"""Speculative Jacobi decoding of image codes (arXiv 2410.01699): several codes a pass, none from another distribution.

A request within an image keeps a draft of its next codes, each drawn from a known distribution q. A pass computes the
distributions p of all of them at once. A code x is accepted with probability min(1, p(x) / q(x)); at the first that is
not, one is drawn from the excess of p over q instead, so that the result is distributed as p. What follows is drafted
anew, from the p that this pass computed for its place after codes that were rejected: the draft improves as the codes
before it settle.

Shape suffixes: W drafted codes, C columns of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calumma.model.generation.sampling.categorical import draw
from calumma.model.generation.sampling.randomness import uniform


class JacobiDraft:
    """A request's draft: `codes`, drawn from q_WC row by row.

    All numbers come from a stream of the seed for the image that begins at a `place` of the answer, a fixed count a
    pass, so its codes depend on its seed alone. `verify` replaces what it holds and changes nothing in place: a copy
    taken before is what it was.
    """

    def __init__(self, seed: int, place: int, window: int) -> None:
        self.seed, self.place, self.window = seed, place, window
        self.codes: list[int] = []  # columns, not ids
        self._passes = 0
        self._q_WC = torch.empty(0, 0)

    def verify(self, p_XC: Tensor, left: int) -> list[int]:
        """p_XC: FloatTensor [W + 1, C], for each drafted code and the one after them, or the first of these; left:
        codes the image lacks. The codes that are accepted, and one more; the next are drafted."""
        numbers = uniform(self.seed, self._passes, 1, 3 * (self.window + 1), stream=1 + self.place)
        accept, replace, propose = numbers.view(3, -1).to(p_XC.device)
        self._passes += 1
        W = len(p_XC) - 1
        accepted = 0
        if W:
            place_W, code_W = torch.arange(W, device=p_XC.device), torch.tensor(self.codes[:W], device=p_XC.device)
            accepted_W = accept[:W] * self._q_WC[place_W, code_W] < p_XC[place_W, code_W]
            accepted = int(accepted_W.long().cumprod(0).sum())
        target_C = p_XC[accepted]
        if accepted < W:
            target_C = (target_C - self._q_WC[accepted]).clamp(min=0)
            if not bool(target_C.sum() > 0):  # p and q are one but for rounding
                target_C = p_XC[accepted]
        codes = [*self.codes[:accepted], int(draw(target_C[None].clone(), None, replace[accepted : accepted + 1]))]
        ahead = max(0, min(self.window, left - len(codes) - 1))
        # place n + 1 + k was computed in row n + k; beyond the last, what comes next is expected to be like it
        rows = torch.arange(ahead, device=p_XC.device).add(len(codes)).clamp(max=W)
        self._q_WC = p_XC[rows]
        self.codes = draw(self._q_WC.clone(), None, propose[:ahead])[:, 0].tolist() if ahead else []
        return codes
