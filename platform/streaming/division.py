"""How a global batch is divided among workers: by sequences, and into forward passes of so many rows.

Every worker takes a run of neighbouring sequences, of which none has more than one unit more than another, and as many
forward passes (ZeRO 3 gathers weights in each, and all workers with it). What is divided never depends on the number of
workers, so any number of them takes the same optimizer step.

Workers may share their sequences (training/steps/sequence.py): so many neighbours, by rank, are then one to the data,
and each of them is given all that they have together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Division:
    """Of the sequences of one step."""

    sequences: int
    """Most that a global batch holds."""
    rows: int
    """Sequences of a forward pass, at most."""
    whole: bool = False
    """Never divide passes otherwise than by the global batch: pass n is sequences n*rows to (n+1)*rows - 1 on any
    number of workers. What is drawn for a pass, as dropout is, is then the same for all of them."""
    sharing: int = 1
    """Workers that share their sequences; a number of workers is a multiple of it."""

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.rows < 1 or self.sharing < 1:
            found = f"{self.sequences} and {self.rows}, shared by {self.sharing}"
            raise ValueError(f"a division needs sequences and rows, found {found}")

    @property
    def unit(self) -> int:
        """Sequences that stay together."""
        return self.rows if self.whole else 1

    def passes(self, world: int) -> int:
        """Forward passes that each of `world` workers takes a step: the same in every step, whatever it holds."""
        return -(-self.most(world) // self.rows)

    def most(self, world: int) -> int:
        """Sequences of the worker that has most."""
        return min(-(-self._units(self.sequences) // self._groups(world)) * self.unit, self.sequences)

    def bounds(self, total: int, rank: int, world: int) -> tuple[int, int]:
        """The sequences of a step of `total` that one worker takes, from and up to. The first workers take more."""
        units, groups, group = self._units(total), self._groups(world), rank // self.sharing
        begin, end = (-(-number * units // groups) * self.unit for number in (group, group + 1))
        return min(begin, total), min(end, total)

    def pass_rows(self, begin: int, end: int, world: int) -> list[int]:
        """Rows of each of a worker's passes over these sequences: evenly, or in units; the last may be empty."""
        number = self.passes(world)
        if self.whole:
            return [min(max(end - begin - turn * self.rows, 0), self.rows) for turn in range(number)]
        cuts = [-(-turn * (end - begin) // number) for turn in range(number + 1)]
        return [b - a for a, b in pairwise(cuts)]

    def efficiency(self, world: int) -> float:
        """Speed over that of workers that all have the same to do: the mean over the most."""
        return self.sequences / (self._groups(world) * self.most(world))

    def _groups(self, world: int) -> int:
        """Of workers that share their sequences."""
        if world % self.sharing:
            raise ValueError(f"{world} workers are no multiple of the {self.sharing} that share their sequences")
        return world // self.sharing

    def _units(self, sequences: int) -> int:
        return -(-sequences // self.unit)
