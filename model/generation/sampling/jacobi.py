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

Shape suffixes: X codes drafted and one more, C columns of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calumma.model.generation.sampling.neighbours import Neighbours
from calumma.model.generation.sampling.randomness import exponential


class JacobiDraft:
    """A request's draft: `codes`. `verify` replaces it and changes nothing in place: a copy taken before is what it
    was."""

    def __init__(self, seed: int, window: int, neighbours: Neighbours | None = None, image: Sequence[int] = ()) -> None:
        """image: its codes so far, where it is begun."""
        self.seed, self.window, self.neighbours = seed, window, neighbours
        self.codes: list[int] = []  # columns, not ids
        self._image = list(image)
        self._numbers: dict[int, Tensor] = {}  # of places that are looked at again: [C] each

    def verify(self, p_XC: Tensor, place: int, left: int, most: int | None = None) -> list[int]:
        """The codes that are accepted, and one more; the next are drafted, at most so many.

        p_XC: FloatTensor [X, C], for each drafted code, or the first of them, and the one after. place: of the first in
        the answer. left: codes that the image lacks.
        """
        X, drafted = len(p_XC), self.codes
        drawn = self._race(p_XC, place)
        accepted = 0
        while accepted < X - 1 and drawn[accepted] == drafted[accepted]:
            accepted += 1
        codes, rest = drawn[: accepted + 1], drawn[accepted + 1 :]
        before, self._image = self._image, self._image + codes
        ahead = max(0, min(self.window, self.window if most is None else most, left - len(codes) - 1))
        if self.neighbours is None:
            further = max(0, ahead - len(rest))  # beyond the last, what comes next is expected to be like it
            self.codes = rest[:ahead] + self._race(p_XC[-1:].expand(further, -1), place + X)
        else:
            self.neighbours.learn(self._image, len(before))
            self.codes = self._draft(p_XC[accepted + 1 :], p_XC[-1], rest, before + drafted, place + len(codes), ahead)
        self._numbers = {at: numbers for at, numbers in self._numbers.items() if at >= place + len(codes)}
        return codes

    def _draft(
        self, p_YC: Tensor, last_C: Tensor, drawn: list[int], supposed: list[int], place: int, ahead: int
    ) -> list[int]:
        """Codes of the next places, one after the other. p_Y, drawn: distributions that a pass has given for the first
        of them and the codes they gave, after the codes `supposed`; last: of the last place that it looked at."""
        assert self.neighbours is not None
        codes, begin = list(self._image), len(self._image)
        for number in range(ahead):
            at = begin + number
            if number < len(drawn):
                p_C = p_YC[number]
                if self.neighbours.contexts(codes, at) == self.neighbours.contexts(supposed, at):
                    codes.append(drawn[number])
                    continue
            else:
                p_C = last_C
            weights_C = self.neighbours.refine(p_C, codes, at)
            codes += self._race(weights_C[None], place + number)
        return codes[begin:]

    def _race(self, p_XC: Tensor, place: int) -> list[int]:
        """A code of each row, from the numbers of the places from `place` on."""
        if not len(p_XC):
            return []
        for at in range(place, place + len(p_XC)):
            if at not in self._numbers:
                self._numbers[at] = exponential(self.seed, at, p_XC.shape[1], stream=1).to(p_XC.device)
        numbers_XC = torch.stack([self._numbers[at] for at in range(place, place + len(p_XC))])
        codes: list[int] = (p_XC / numbers_XC).argmax(-1).tolist()
        return codes
