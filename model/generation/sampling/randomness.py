"""Random numbers by counter: those of the n-th draw are a function of the seed and n alone.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), NumPy's
(https://numpy.org/doc/stable/reference/random/bit_generators/philox.html): all 64 bits of a seed are its key, where
torch's generators keep 32; and a draw is found without those before it, so that an answer goes on from any id of it.

Shape suffixes: N draws, X numbers of a draw, S seats.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Philox
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 8  # words of 32 bits that a counter gives
BITS = 24  # of a float32 in 0..1
FILLED = 64  # draws of a seat whose numbers are made at once, and the most that a step may look ahead


def uniform(seed: int, first: int, count: int, width: int, stream: int = 0) -> Tensor:
    """FloatTensor [N, X] on the CPU, multiples of 2^-24 in 0..1, 1 not among them: the numbers of draws `first` to
    `first + count - 1`, `width` each. Seeds are equal modulo 2^64. Streams of a seed have nothing in common."""
    words_NX = _words(seed, first, count, width, stream)
    return torch.from_numpy((words_NX >> (32 - BITS)).astype(np.float32) * np.float32(2.0**-BITS))


class SeatNumbers:
    """The uniform numbers of the draws that each seat is at, on a device: of 2 * FILLED draws, whatever the answers'
    length. `table_SNX` holds those of draw n in row n % (2 * FILLED)."""

    def __init__(self, seats: int, width: int, device: torch.device) -> None:
        self.table_SNX = torch.zeros(seats, 2 * FILLED, width, device=device)
        self._width = width
        self._seeds = [0] * seats
        self._end = [0] * seats  # the draws of a seat before this one have been made, of which the last are kept

    def seat(self, seat: int, seed: int, first: int) -> None:
        """A request whose next draw is `first` takes a seat."""
        self._seeds[seat], self._end[seat] = seed, first - first % FILLED

    def reserve(self, seat: int, end: int) -> None:
        """Have the numbers of the last FILLED draws before `end`, as far as the seat's request has come to them."""
        while self._end[seat] < end:
            first = self._end[seat]
            row = first % (2 * FILLED)
            self.table_SNX[seat, row : row + FILLED] = uniform(self._seeds[seat], first, FILLED, self._width)
            self._end[seat] += FILLED

    def of(self, seats_R: Tensor, number_R: Tensor) -> Tensor:
        """FloatTensor [R, X]: the numbers of a draw of each seat."""
        return self.table_SNX[seats_R, number_R % (2 * FILLED)]


def exponential(seed: int, number: int, width: int, stream: int) -> Tensor:
    """FloatTensor [X] on the CPU, above 0 (and, one in 2^25, infinite): the numbers of a draw, exponentially
    distributed with mean 1. Small ones are as fine as large ones."""
    return torch.from_numpy(exponentials(seed, number, 1, width, stream)[0])


def exponentials(seed: int, first: int, count: int, width: int, stream: int) -> NDArray[np.float32]:
    """[N, X]: those of `count` draws from `first` on."""
    words_NX = _words(seed, first, count, width, stream)
    negative_NX = ((words_NX + 0.5) * -(2.0**-32)).astype(np.float32)
    found: NDArray[np.float32] = torch.from_numpy(negative_NX).log1p_().neg_().numpy()
    return found


def _words(seed: int, first: int, count: int, width: int, stream: int) -> NDArray[np.uint64]:
    """[N, X] words of 32 bits."""
    blocks = -(-width // BLOCK)
    counter = (stream << 64) + first * blocks
    generator = Philox(key=seed % 2**64, counter=(counter - 1) % 2**256)  # it counts before it gives
    words_N = generator.random_raw(count * blocks * BLOCK // 2)
    halves_N2 = np.stack([words_N & 0xFFFFFFFF, words_N >> 32], axis=-1)
    return halves_N2.reshape(count, -1)[:, :width]
