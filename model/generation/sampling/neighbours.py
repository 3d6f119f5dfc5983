"""What code follows its neighbours in an image: counts of the images drawn so far, to draft codes that no pass has
looked at (sampling/jacobi.py). Drafts decide how many passes an image takes, never which image it is.

Shape suffixes: C columns of the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

CONTEXTS = 1 << 16  # that are remembered, the longest unused go first
SURE = 1.0  # what a distribution counts for beside what was seen, in codes
SALTS = 16  # whose counts are kept

Context = tuple[int, ...]


class Neighbours:
    """Codes by their neighbours in images of `length` codes: those to the left, above, and above to the right; or to
    the left alone where images are no squares."""

    def __init__(self, length: int) -> None:
        side = math.isqrt(length)
        self.side = side if side * side == length else 0
        self._counts: OrderedDict[Context, Counter[int]] = OrderedDict()

    def contexts(self, codes: Sequence[int], at: int) -> tuple[Context, Context]:
        """A wider and a closer one of the code at a place, by the codes before it."""
        left = codes[at - 1] if at else -1
        if not self.side:
            return (left,), (codes[at - 2] if at > 1 else -1, left)
        left = left if at % self.side else -1
        above = codes[at - self.side] if at >= self.side else -1
        beside = codes[at - self.side + 1] if at >= self.side and (at + 1) % self.side else -1
        return (left, above), (left, above, beside)

    def learn(self, codes: Sequence[int], begin: int) -> None:
        """The codes from a place on are drawn."""
        for at in range(begin, len(codes)):
            for context in self.contexts(codes, at):
                seen = self._counts.setdefault(context, Counter())
                seen[codes[at]] += 1
                self._counts.move_to_end(context)
        while len(self._counts) > CONTEXTS:
            self._counts.popitem(last=False)

    def refine(self, p_C: Tensor, codes: Sequence[int], at: int) -> Tensor:
        """What is known of a code, and what was seen with its neighbours: weights [C] of any sum."""
        for context in self.contexts(codes, at):
            if (seen := self._counts.get(context)) is not None:
                p_C = p_C * (SURE / float(p_C.sum()))
                columns = torch.tensor(list(seen), device=p_C.device)
                counts = torch.tensor(list(seen.values()), device=p_C.device, dtype=p_C.dtype)
                p_C = p_C.index_add(0, columns, counts)
        return p_C


class NeighboursBySalt:
    """Counts of requests of the same root (block_manager.root_of): how soon an image is there tells nothing of others'
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
