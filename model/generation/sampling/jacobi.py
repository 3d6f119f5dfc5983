"""Speculative Jacobi decoding of image codes (arXiv 2410.01699) with drafts that are coupled: several codes a pass,
none from another distribution, and the same codes whatever is drafted.

A request within an image keeps a draft of its next codes. A pass computes the distributions of all of them at once, and
each is drawn by a race: every code of the vocabulary has an exponential random number, a function of the seed and the
place in the answer alone, and the least number over its probability wins, which is a draw from the distribution. So
- a draw is what the draft has as soon as the codes before it are right: it is accepted up to the first that differs,
  which is right, too, for all before it are;
- what is drafted and whether, and who shares the batch, changes no code but for rounding;
- where codes before a place change, its distribution does and its numbers stay, and mostly the same code wins again
  (the coupling of Daliri, Musco and Suresh, arXiv 2408.07978; of consecutive drafts, arXiv 2510.24211).

What a pass has not looked at, or has after another code than the one that came, is drafted from what is known of it
and from how codes follow their neighbours in the images so far (neighbours.py), with the same numbers.

Shape suffixes: X codes drafted and one more, Y of them that a pass has looked at, C columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from calumma.model.generation.sampling.neighbours import Neighbours, Weights
from calumma.model.generation.sampling.randomness import exponentials

AT_ONCE = 32  # places whose numbers are made together
TIGHT = 0.8  # what is expected by neighbours alone is less sure than what it is taken for: so much of top_p counts


class JacobiDraft:
    """A request's draft: `codes`. `verify` replaces it and changes nothing in place: a copy taken before is what it
    was."""

    def __init__(self, seed: int, window: int, neighbours: Neighbours | None = None, image: Sequence[int] = ()) -> None:
        """image: its codes so far, where it is begun."""
        self.seed, self.window, self.neighbours = seed, window, neighbours
        self.codes: list[int] = []  # columns, not ids
        self._image = list(image)
        self._numbers, self._first = np.empty((0, 0), np.float32), 0  # of places from this one on

    def verify(self, p_XC: Tensor, place: int, left: int, most: int | None = None, top_p: float = 1.0) -> list[int]:
        """The codes that are accepted, and one more; the next are drafted, at most so many.

        p_XC: FloatTensor [X, C], for each drafted code, or the first of them, and the one after. place: of the first in
        the answer. left: codes that the image lacks. top_p: of p only the likeliest codes may win that reach so much.
        """
        p: Weights = p_XC.cpu().numpy()
        X, drafted = len(p), self.codes
        drawn = self._race(p, place, top_p)
        accepted = 0
        while accepted < X - 1 and drawn[accepted] == drafted[accepted]:
            accepted += 1
        codes, rest = drawn[: accepted + 1], drawn[accepted + 1 :]
        before, self._image = self._image, self._image + codes
        ahead = max(0, min(self.window, self.window if most is None else most, left - len(codes) - 1))
        if self.neighbours is None:
            further = max(0, ahead - len(rest))  # beyond the last, what comes next is expected to be like it
            self.codes = rest[:ahead] + self._race(np.repeat(p[-1:], further, 0), place + X, top_p)
        else:
            supposed = before + drafted
            self.neighbours.learn(p, supposed, len(before))
            self.codes = self._draft(p[accepted + 1 :], rest, supposed, place + len(codes), ahead, top_p)
        return codes

    def _draft(
        self, p_YC: Weights, drawn: list[int], supposed: list[int], place: int, ahead: int, top_p: float
    ) -> list[int]:
        """Codes of the next places, one after the other. p, drawn: distributions that a pass has given for the first of
        them and the codes they gave, after the codes `supposed`."""
        assert self.neighbours is not None
        codes, begin = list(self._image), len(self._image)
        for number in range(ahead):
            at = begin + number
            contexts = self.neighbours.contexts(codes, at)
            if number < len(drawn):
                if contexts == (before := self.neighbours.contexts(supposed, at)):
                    codes.append(drawn[number])
                    continue
                weights_C = self.neighbours.corrected(p_YC[number], before, contexts)
            else:
                weights_C = self.neighbours.expected(contexts, self._numbers.shape[1])
            codes.append(self._guess(weights_C, place + number, top_p))
        return codes[begin:]

    def _guess(self, weights_C: Weights, place: int, top_p: float) -> int:
        """What `_race` gives of one row, with less ado."""
        scores_C, enough = weights_C / self._at(place, 1, len(weights_C))[0], TIGHT * top_p * weights_C.sum()
        while True:
            code = int(scores_C.argmax())
            if weights_C[weights_C > weights_C[code]].sum() < enough:
                return code
            scores_C[code] = -1

    def _race(self, p_XC: Weights, place: int, top_p: float) -> list[int]:
        """A code of each row, from the numbers of the places from `place` on. A winner whom those likelier than itself
        outweigh is outside of top_p: then the next is looked at, and nothing is ever sorted."""
        X, C = p_XC.shape
        if not X:
            return []
        scores_XC = p_XC / self._at(place, X, C)
        codes_X = scores_XC.argmax(1)
        rows = np.arange(X) if top_p < 1 else np.arange(0)
        while len(rows):
            own_XC, found_X = p_XC[rows], codes_X[rows]
            likelier_XC = own_XC > own_XC[np.arange(len(rows)), found_X][:, None]
            outside = (own_XC * likelier_XC).sum(1) >= top_p * own_XC.sum(1)
            rows = rows[outside]
            scores_XC[rows, found_X[outside]] = -1
            codes_X[rows] = scores_XC[rows].argmax(1)
        codes: list[int] = codes_X.tolist()
        return codes

    def _at(self, place: int, count: int, width: int) -> Weights:
        """The numbers of some places, of which those before are of no more use."""
        first, end = self._first, self._first + len(self._numbers)
        if not first <= place <= place + count <= end:
            kept = self._numbers[place - first :] if first <= place < end else np.empty((0, width), np.float32)
            missing = max(count, AT_ONCE) - len(kept)
            more = exponentials(self.seed, place + len(kept), missing, width, stream=1)
            self._numbers, self._first = np.concatenate([kept, more]), place
        begin = place - self._first
        return self._numbers[begin : begin + count]
