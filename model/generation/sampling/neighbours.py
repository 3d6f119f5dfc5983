"""What code follows its neighbours in an image: the distributions that passes have given so far, to draft codes that no
pass has looked at, or only after other codes (sampling/jacobi.py). Drafts decide how many passes an image takes, never
which image it is.

Shape suffixes: C columns of the vocabulary, X rows of a pass.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]
Context = tuple[int, ...]

BYTES = 1 << 24  # of all sums of an image's kind: the contexts that are longest unused go first
SALTS = 8  # whose sums are kept
SURE = 0.05  # what is expected of any code before anything is seen, in codes


class Neighbours:
    """Sums of distributions by neighbours in images of `length` codes: those to the left and above, and both, and both
    with the one above to the right; to the left alone where images are no squares."""

    def __init__(self, length: int) -> None:
        side = math.isqrt(length)
        self.side = side if side * side == length else 0
        self._sums: OrderedDict[Context, Weights] = OrderedDict()
        self._seen: dict[Context, int] = {}  # how many each is of

    def contexts(self, codes: Sequence[int], at: int) -> tuple[Context, ...]:
        """Of the code at a place, by the codes before it; each begins with its kind."""
        left = codes[at - 1] if at else -1
        if not self.side:
            return (0, left), (2, left, codes[at - 2] if at > 1 else -1)
        left = left if at % self.side else -1
        above = codes[at - self.side] if at >= self.side else -1
        beside = codes[at - self.side + 1] if at >= self.side and (at + 1) % self.side else -1
        return (0, left), (1, above), (2, left, above), (3, left, above, beside)

    def learn(self, p_XC: Weights, codes: Sequence[int], begin: int) -> None:
        """What came to be expected at the places from `begin` on, each after the codes before it."""
        sums = self._sums
        for row, p_C in enumerate(p_XC):
            for context in self.contexts(codes, begin + row):
                if context in sums:
                    sums[context] += p_C
                    self._seen[context] += 1
                    sums.move_to_end(context)
                else:
                    sums[context], self._seen[context] = p_C.copy(), 1
        while len(sums) * p_XC.nbytes // len(p_XC) > BYTES:
            del self._seen[sums.popitem(last=False)[0]]

    def expected(self, contexts: Sequence[Context], width: int) -> Weights:
        """Weights [C] of any sum. A single neighbour counts for one code, both as often as they were seen."""
        found = np.full(width, SURE / width, np.float32)
        for context in contexts:
            if (seen := self._sums.get(context)) is not None:
                found += seen if context[0] > 1 else seen * np.float32(1 / self._seen[context])
        return found

    def corrected(self, p_C: Weights, supposed: Sequence[Context], contexts: Sequence[Context]) -> Weights:
        """What a pass expected of a code after supposed neighbours, as these neighbours make it likelier or less."""
        weights: Weights = p_C * self.expected(contexts, len(p_C)) / self.expected(supposed, len(p_C))
        return weights


class NeighboursBySalt:
    """Sums of requests of the same root (block_manager.root_of): how soon an image is there tells nothing of others'
    images."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._found: OrderedDict[bytes, Neighbours] = OrderedDict()

    def of(self, root: bytes) -> Neighbours:
        found = self._found.setdefault(root, Neighbours(self._length))
        self._found.move_to_end(root)
        while len(self._found) > SALTS:
            self._found.popitem(last=False)
        return found
