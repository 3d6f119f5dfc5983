"""Which micro-batches make up training step n: a pure function of seed, mixture and manifests.

A step consumes M micro-batches however many workers there are; worker r of W takes number r, r+W, ... of them. Nothing
but the step number is needed to go on, and looking any step up costs the same: O(1) in n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from calumma.platform import storage
from calumma.platform.data.manifest import Manifest

# Weights are kept exact while their common period is no longer than this; beyond it they are rounded to 1/65536.
MAX_PERIOD = 1 << 16
# Four rounds of a Feistel network do for large domains (Luby and Rackoff, 1988). With 10 values they favour some: a
# chi-squared of 47 at 9 degrees of freedom over 20,000 keys, 13 with six rounds, 8 with eight.
_ROUNDS = 8


class PlanError(ValueError):
    """A mixture that cannot be planned; the message names the token shards and what is wrong with them."""


@dataclass(frozen=True)
class MicroBatch:
    """One row group of one token shard: `sequences` packed rows, the unit that is read, assigned and counted."""

    source: str
    shard: str
    row_group: int
    sequences: int
    shard_bytes: int


class Plan:
    """The order of all training data.

    Every source's micro-batches are visited in a seeded order, each exactly once an epoch of that source, a new order
    every epoch. Among the first i micro-batches a source of normalized weight w has w*i of them, off by less than one.
    The order depends on the content of the shards, not on where they are: data may move between runs.
    """

    def __init__(
        self, seed: int, mixture: Mapping[str, float], manifests: Mapping[str, Manifest], micro_batches: int
    ) -> None:
        """`mixture` and `manifests` are keyed by the URI of a directory of token shards. Raises PlanError."""
        if micro_batches < 1:
            raise PlanError(f"a step needs at least one micro-batch, asked for {micro_batches}")
        if not mixture:
            raise PlanError("the mixture is empty")
        for uri, weight in mixture.items():
            if not (math.isfinite(weight) and weight > 0):
                raise PlanError(f"{uri}: a mixture weight must be above 0, found {weight}")
            if uri not in manifests:
                raise PlanError(f"{uri}: no manifest was given for these token shards")
        self.micro_batches = micro_batches
        self.sources = [_Source(uri, seed, manifests[uri]) for uri in sorted(mixture)]
        contexts = {source.uri: source.context for source in self.sources if source.context is not None}
        if len(set(contexts.values())) > 1:
            found = ", ".join(f"{uri}: {context}" for uri, context in contexts.items())
            raise PlanError(f"token shards of different contexts cannot be mixed ({found})")
        self.context: int | None = next(iter(contexts.values()), None)
        """Tokens a sequence predicts (rows hold one more), or None when no manifest says."""

        self._parts = _parts([mixture[source.uri] for source in self.sources])
        self._choice = _interleaved(self._parts)  # [period], the source of each micro-batch
        self._ordinal = np.empty(len(self._choice), np.int64)  # [period], how many of that source came before
        for number in range(len(self.sources)):
            (places,) = np.nonzero(self._choice == number)
            self._ordinal[places] = np.arange(len(places))

    def micro_batch(self, index: int) -> MicroBatch:
        """Number `index` of all micro-batches ever: step n holds n*M to n*M + M - 1."""
        if index < 0:
            raise PlanError(f"steps and micro-batches are counted from 0, asked for number {index}")
        period, place = divmod(index, len(self._choice))
        number = int(self._choice[place])
        return self.sources[number].visit(period * self._parts[number] + int(self._ordinal[place]))

    def step(self, n: int) -> list[MicroBatch]:
        """The M micro-batches of step n, n >= 0."""
        return [self.micro_batch(n * self.micro_batches + slot) for slot in range(self.micro_batches)]

    def worker(self, n: int, rank: int, world: int) -> list[MicroBatch | None]:
        """What one of `world` workers takes of step n: as many entries for each, None for an empty micro-batch."""
        if not 0 <= rank < world:
            raise PlanError(f"there is no worker {rank} among {world}")
        slots = range(rank, self.slots(world) * world, world)
        return [self.micro_batch(n * self.micro_batches + s) if s < self.micro_batches else None for s in slots]

    def slots(self, world: int) -> int:
        """Micro-batches, full or empty, that each of `world` workers takes a step."""
        return -(-self.micro_batches // world)

    def epochs(self, n: int) -> dict[str, float]:
        """How often each source has been passed through before step n."""
        period, place = divmod(n * self.micro_batches, len(self._choice))
        started = np.bincount(self._choice[:place], minlength=len(self.sources))
        return {
            source.uri: (period * self._parts[number] + int(started[number])) / source.total
            for number, source in enumerate(self.sources)
        }


class _Source:
    """One directory of token shards: its row groups, numbered through, in a seeded order an epoch.

    What is known of the shards is kept in arrays, so that handing a plan to a reading task costs no parsing.
    """

    def __init__(self, uri: str, seed: int, manifest: Manifest) -> None:
        files = sorted((file for file in manifest.files if file.row_groups), key=lambda file: file.path)
        if not files:
            raise PlanError(f"{uri}: these token shards hold no row groups")
        self.uri = uri
        self.paths = np.array([file.path.encode() for file in files])  # [files], as are the following
        self.row_groups = np.array([file.row_groups for file in files], np.int64)
        self.sizes = np.array([file.sequences(0) for file in files], np.int64)
        self.last_sizes = np.array([file.sequences(file.row_groups - 1) for file in files], np.int64)
        self.bytes = np.array([file.bytes for file in files], np.int64)
        self.ends = np.cumsum(self.row_groups)
        self.total = int(self.ends[-1])
        context = manifest.specification.get("context")
        self.context = context if isinstance(context, int) else None
        content = hashlib.blake2b(f"{seed}".encode())
        for file in files:
            content.update(f"\n{file.sha256} {file.row_groups}".encode())
        self.key = content.digest()[:32]

    def visit(self, number: int) -> MicroBatch:
        """The micro-batch visited as number `number`, counted over all epochs."""
        epoch, place = divmod(number, self.total)
        place = permuted(place, self.total, self.key + epoch.to_bytes(8, "little"))
        file = int(np.searchsorted(self.ends, place, side="right"))
        row_group = place - int(self.ends[file] - self.row_groups[file])
        sizes = self.last_sizes if row_group == self.row_groups[file] - 1 else self.sizes
        shard = storage.join(self.uri, self.paths[file].decode())
        return MicroBatch(self.uri, shard, row_group, int(sizes[file]), int(self.bytes[file]))


def permuted(value: int, size: int, key: bytes) -> int:
    """Where a keyed permutation of 0..size-1 sends `value`: a Feistel network, walked until it lands inside (O(1))."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = value >> half, value & low
        for number in range(_ROUNDS):
            data = number.to_bytes(1, "little") + right.to_bytes(8, "little")
            mixed = hashlib.blake2b(data, digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & low)
        value = left << half | right
        if value < size:
            return value


def _parts(weights: list[float]) -> list[int]:
    """Whole numbers in proportion to the weights: exactly, or rounded to MAX_PERIOD parts by largest remainder."""
    exact = [
        Fraction(str(weight)) for weight in weights
    ]  # of the decimal that was written, not of its binary neighbour
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    parts = [count // divisor for count in whole]
    if sum(parts) <= MAX_PERIOD:
        return parts
    shares = [weight / sum(exact) * MAX_PERIOD for weight in exact]
    parts = [max(1, int(share)) for share in shares]
    for number in sorted(range(len(parts)), key=lambda k: parts[k] - shares[k])[: max(0, MAX_PERIOD - sum(parts))]:
        parts[number] += 1
    return parts


def _interleaved(parts: list[int]) -> np.ndarray:
    """Source numbers [sum(parts)]: one period, every prefix within one of the shares.

    Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980): of the sources that lag
    behind by 1 / (2K - 2) or more, the one that would first be late. Its bound, 1 - 1 / (2K - 2), is the best possible.
    """
    period, count = sum(parts), len(parts)
    if count == 1:
        return np.zeros(1, np.int32)
    slack = 2 * count - 2
    chosen = np.empty(period, np.int32)
    taken = [0] * count
    for i in range(1, period + 1):
        # Everything in units of 1 / (period * slack), so that the arithmetic is exact.
        lag = [i * part - had * period for part, had in zip(parts, taken, strict=True)]
        late = [k for k in range(count) if lag[k] * slack >= period]
        best = min(late, key=lambda k: Fraction((slack - 1) * period - lag[k] * slack, parts[k]))
        chosen[i - 1] = best
        taken[best] += 1
    return chosen
