"""How many image codes are drafted ahead: a number that is given, fewer the more images are drawn at once; or as many
as pay, by what passes cost here, which is measured as an engine starts, and by how far drafts have stood so far. Which
codes come does not hang on it (sampling/jacobi.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import accumulate
from operator import mul
from typing import Protocol

log = logging.getLogger(__name__)

MOST = (
    31  # codes that are drafted where it is left to the engine: with one more what kernels of few tokens are good for
)
WINDOWS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, MOST)
ROWS = (1, 2, 4, 8, 16, 32, 64)  # tokens of the passes that are measured
TRIES, PATIENCE = 3, 2.0  # passes of a size, as long as all have not taken so many seconds
SEEN, STOOD = 4.0, 3.0  # drafts at each place, and how many stood, before any is seen
MEMORY = 0.99  # of what was seen, after each draft
AGAIN = 64  # passes without drafts after which one is tried

# Most codes that all sequences of a pass draft together where the window is given. For a CPU a pass of more tokens
# takes longer, so there several images share fewer.
DRAFTED, DRAFTED_ON_CPU = 128, 8


class DraftWindow(Protocol):
    def most(self, images: int, sequences: int) -> int:
        """Codes that each of some images may draft next; they and their guidance branches are so many sequences."""
        ...

    def note(self, drafted: int, stood: int) -> None:
        """Of a draft of some codes, the first `stood` were accepted."""
        ...


class GivenWindow:
    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu

    def most(self, images: int, sequences: int) -> int:
        return (DRAFTED_ON_CPU if self.on_cpu and images > 1 else DRAFTED) // sequences

    def note(self, drafted: int, stood: int) -> None:
        pass


class MeasuredWindow:
    """seconds: of passes of so many tokens, by their number, and of verifying as many drafts."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds = dict(sorted(seconds.items()))
        self._seen, self._stood = [SEEN] * MOST, [STOOD] * MOST
        self._without = 0

    def most(self, images: int, sequences: int) -> int:
        shares = [stood / seen for seen, stood in zip(self._seen, self._stood, strict=True)]
        codes = list(accumulate(accumulate(shares, mul), initial=1.0))  # expected of a pass, by its window
        best = max(WINDOWS, key=lambda window: codes[window] / self.cost(sequences * (1 + window)))
        self._without = 0 if best else self._without + 1
        if self._without < AGAIN:
            return best
        self._without = 0
        return WINDOWS[4]

    def note(self, drafted: int, stood: int) -> None:
        for place in range(min(drafted, stood + 1, MOST)):
            self._seen[place] = MEMORY * self._seen[place] + 1
            self._stood[place] = MEMORY * self._stood[place] + (place < stood)

    def cost(self, tokens: int) -> float:
        """Seconds of a pass of so many, between and beyond those that were measured in proportion."""
        known = list(self.seconds.items())
        if len(known) < 2:
            return float(tokens)
        right = next((number for number, (rows, _) in enumerate(known) if rows >= tokens), len(known) - 1)
        (low, before), (high, after) = known[max(right - 1, 0)], known[max(right, 1)]
        return max(before + (after - before) * (tokens - low) / (high - low), 1e-9)


def measured(seconds: Callable[[int], float], fits: int) -> MeasuredWindow:
    """By the fastest of some passes of each size, of which so many tokens fit; by one of each, of a large model."""
    found: dict[int, float] = {}
    spent = 0.0
    for rows in (rows for rows in ROWS if rows <= fits):
        tried = [seconds(rows) for _ in range(TRIES if spent < PATIENCE else 1)]
        found[rows], spent = min(tried), spent + sum(tried)
    log.info("passes of tokens: %s", ", ".join(f"{rows} {1e3 * each:.2f} ms" for rows, each in found.items()))
    return MeasuredWindow(found)
