"""Which micro-batches make up training step n: a pure function of seed, mixture and manifests.

A step consumes M micro-batches however many workers there are; their sequences, in order, are what workers divide
(division.py). Nothing but the step number is needed to go on, and looking any step up costs the same time and memory:
O(1) in n and in the number of micro-batches. Steps are looked up many at a time, as numpy columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calumma.platform.shards.row_groups import MicroBatch, context_of
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.streaming.division import Division

# Weights are kept exact while their common period is no longer than this; beyond it they are rounded to 1/65536.
MAX_PERIOD = 1 << 16


# Of the permutation. Four do for large domains (Luby and Rackoff, 1988), small ones need more: the chi-squared of where
# one of 5 values goes, over 20,000 keys, is 241 at 4 degrees of freedom with four rounds, 16 with eight, 2 with ten.
ROUNDS = 10


# Odd, bits well spread. Arrays of no dimension are what numpy takes soonest.
_MULTIPLIERS = (np.array(0x9E3779B97F4A7C15, np.uint64), np.array(0xD6E8FEB86659FD93, np.uint64))
_HALF = np.array(32, np.uint64)
_LOOKAHEAD = 1024  # micro-batches that are looked up together where steps are asked for in a row
Integers = NDArray[np.int64]


class PlanError(ValueError):
    """A mixture that cannot be planned; the message names the token shards and what is wrong with them."""


class MicroBatchColumns(NamedTuple):
    """Micro-batches as columns of one shape; `Plan.to_micro_batches` resolves them."""

    source: Integers  # index into Plan.sources
    file: Integers  # index into all files of the plan
    row_group: Integers
    sequences: Integers


class Piece(NamedTuple):
    """Neighbouring sequences of a micro-batch: its rows from `begin` to `end - 1`."""

    micro_batch: MicroBatch
    begin: int
    end: int


class Share(NamedTuple):
    """What one worker takes of a step."""

    step: int
    first: int
    """The number of its first sequence in the global batch."""
    passes: list[int]
    """Sequences of each forward pass, as many passes for every worker; empty ones have none."""
    pieces: list[Piece]
    """Where they are, in order."""


class Plan:
    """The order of all training data.

    Every source's micro-batches are visited in a seeded order, each exactly once an epoch of that source, a new order
    every epoch. Of K sources, one of normalized weight w has w*i of the first i micro-batches, off by 1 - 1/(2K-2) at
    most, and w*i of any i in a row, off by 2 - 1/(K-1) at most. For two sources that is one micro-batch in any window.
    For more, no order can promise that: of all periods with weights 8:5:4, each has a window further off.
    The order depends on the content of the shards, not on where they are: data may move between runs.
    """

    def __init__(
        self,
        seed: int,
        mixture: Mapping[str, float],
        manifests: Mapping[str, Manifest],
        micro_batches: int,
        rows: int | None = None,
        whole: bool = False,
        sharing: int = 1,
    ) -> None:
        """`mixture` and `manifests` are keyed by the URI of a directory of token shards; `rows` of a forward pass
        (none: as the largest micro-batch), `whole` and `sharing` are of the Division. Raises PlanError."""
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
        self.sources = sorted(mixture)
        listing = {uri: context_of(manifests[uri]) for uri in self.sources}
        contexts = {uri: context for uri, context in listing.items() if context is not None}
        if len(set(contexts.values())) > 1:
            told = ", ".join(f"{uri}: {context}" for uri, context in contexts.items())
            raise PlanError(f"token shards of different contexts cannot be mixed ({told})")
        self.context: int | None = next(iter(contexts.values()), None)
        """Tokens a sequence predicts (rows hold one more), or None when no manifest says."""

        files_by_source = [_sorted_files(uri, manifests[uri]) for uri in self.sources]
        self._files = _Files(files_by_source)
        self._keys = np.stack([_round_keys(seed, files) for files in files_by_source])  # [sources, rounds]
        period_counts = _whole_weights([mixture[uri] for uri in self.sources])
        self.period_counts: Integers = np.array(period_counts, np.int64)
        """[sources], micro-batches of each in a period of the mixture."""
        self.choice: Integers = _interleaved(period_counts)
        """[period], the source of each micro-batch."""
        self._ordinal = np.empty(len(self.choice), np.int64)  # [period], how many of that source came before
        for number in range(len(self.sources)):
            (places,) = np.nonzero(self.choice == number)
            self._ordinal[places] = np.arange(len(places))
        self._last: tuple[int, list[MicroBatch]] = (0, [])  # what was looked up last, from which step on
        largest = self.most_sequences
        self.division = Division(micro_batches * largest, rows or largest, whole, sharing)

    @property
    def totals(self) -> dict[str, int]:
        """Micro-batches in an epoch of each source."""
        return dict(zip(self.sources, self._files.totals.tolist(), strict=True))

    @property
    def most_sequences(self) -> int:
        """Sequences of the largest micro-batch."""
        return int(self._files.sizes.max())

    def steps(self, first: int, last: int) -> MicroBatchColumns:
        """Steps first .. last - 1 as columns [steps, M]."""
        if first < 0:
            raise PlanError(f"steps and micro-batches are counted from 0, asked for number {first}")
        numbers = np.arange(first * self.micro_batches, last * self.micro_batches, dtype=np.int64)
        return MicroBatchColumns(*(column.reshape(-1, self.micro_batches) for column in self._columns(numbers)))

    def step(self, n: int) -> list[MicroBatch]:
        """The M micro-batches of step n, n >= 0. Steps in a row are looked up many at a time: alone, one costs twice
        as much, for numpy's calls."""
        m, (first, batches) = self.micro_batches, self._last
        end = first + len(batches) // m
        if not first <= n < end:
            first, ahead = n, max(1, _LOOKAHEAD // m) if n == end else 1
            batches = self.to_micro_batches(self.steps(first, first + ahead))
            self._last = first, batches
        return batches[(n - first) * m : (n - first + 1) * m]

    def shares(self, first: int, last: int, rank: int, world: int) -> list[Share]:
        """What one of `world` workers takes of steps first .. last - 1, a share a step."""
        if not 0 <= rank < world:
            raise PlanError(f"there is no worker {rank} among {world}")
        columns = self.steps(first, last)
        ends = np.cumsum(columns.sequences, axis=1)  # [steps, M]
        bounds = np.array([self.division.bounds(int(total), rank, world) for total in ends[:, -1]], np.int64)
        begin, end = bounds.reshape(-1, 2).T[:, :, None]
        begins = ends - columns.sequences
        held = (begins < end) & (ends > begin)
        pieces = [
            Piece(*piece)
            for piece in zip(
                self.to_micro_batches(MicroBatchColumns(*(column[held] for column in columns))),
                (np.maximum(begin, begins) - begins)[held].tolist(),
                (np.minimum(end, ends) - begins)[held].tolist(),
                strict=True,
            )
        ]
        shares, taken = [], 0
        for number, count in enumerate(held.sum(axis=1).tolist()):
            a, b = bounds[number].tolist()
            rows = self.division.pass_rows(a, b, world)
            shares.append(Share(first + number, a, rows, pieces[taken : taken + count]))
            taken += count
        return shares

    def to_micro_batches(self, columns: MicroBatchColumns) -> list[MicroBatch]:
        """The micro-batches of some columns, in order."""
        f = self._files
        file = columns.file.ravel()
        sources = [self.sources[number] for number in columns.source.flat]
        shards = [
            f"{uri.rstrip('/')}/{path.decode()}" for uri, path in zip(sources, f.paths[file].tolist(), strict=True)
        ]
        groups, sequences = columns.row_group.ravel().tolist(), columns.sequences.ravel().tolist()
        details = (f.bytes[file].tolist(), f.footer_bytes[file].tolist(), f.footer_sha256[file].tolist())
        return list(map(MicroBatch, sources, shards, groups, sequences, *details))

    def epochs(self, n: int) -> dict[str, float]:
        """How often each source has been passed through before step n."""
        period, place = divmod(n * self.micro_batches, len(self.choice))
        begun = period * self.period_counts + np.bincount(self.choice[:place], minlength=len(self.sources))
        return dict(zip(self.sources, (begun / self._files.totals).tolist(), strict=True))

    def _columns(self, numbers: Integers) -> MicroBatchColumns:
        """Micro-batches by their number among all ever: step n holds n*M to n*M + M - 1."""
        f = self._files
        period, place = np.divmod(numbers, len(self.choice))
        source = self.choice[place]
        totals = f.totals[source]
        epoch, ordinal = np.divmod(period * self.period_counts[source] + self._ordinal[place], totals)
        keys = _hashed(self._keys[source], epoch.astype(np.uint64)[:, None])
        within = permuted(ordinal, totals, keys) + f.offsets[source]
        file = np.searchsorted(f.ends, within, side="right")
        sequences = np.where(within == f.ends[file] - 1, f.last_sizes[file], f.sizes[file])
        return MicroBatchColumns(source, file, within - f.begins[file], sequences)


class _Files:
    """The shards of all sources, one after the other, and their row groups, numbered through: arrays, so that handing a
    plan to a reading task costs no parsing."""

    def __init__(self, sources: list[list[FileEntry]]) -> None:
        files = [file for own in sources for file in own]
        self.paths = np.array([file.path.encode() for file in files])  # [files], as are the following
        self.sizes = np.array([file.sequences(0) for file in files], np.int64)
        self.last_sizes = np.array([file.sequences(file.row_groups - 1) for file in files], np.int64)
        self.bytes = np.array([file.bytes for file in files], np.int64)
        self.footer_bytes = np.array([file.footer.bytes if file.footer else 0 for file in files], np.int64)
        digests = [bytes.fromhex(file.footer.sha256) if file.footer else bytes(32) for file in files]
        self.footer_sha256 = np.array(digests, "V32")  # as bytes: numpy's own would lose zeros at their ends
        row_groups = np.array([file.row_groups for file in files], np.int64)
        self.ends = np.cumsum(row_groups)
        self.begins = self.ends - row_groups
        self.totals = np.array([sum(file.row_groups for file in own) for own in sources], np.int64)  # [sources]
        self.offsets = np.cumsum(self.totals) - self.totals


def _sorted_files(uri: str, manifest: Manifest) -> list[FileEntry]:
    """The shards, wherever they are and however they are listed. Raises PlanError when there are none."""
    files = sorted((file for file in manifest.files if file.row_groups), key=lambda file: (file.sha256, file.path))
    if not files:
        raise PlanError(f"{uri}: these token shards hold no row groups")
    return files


def _round_keys(seed: int, files: list[FileEntry]) -> NDArray[np.uint64]:
    """[ROUNDS], of the content of the shards."""
    content = hashlib.shake_128(f"{seed}".encode())
    for file in files:
        content.update(f"\n{file.sha256} {file.row_groups}".encode())
    return np.frombuffer(content.digest(8 * ROUNDS), np.uint64)


def permuted(values: Integers, sizes: Integers, keys: NDArray[np.uint64]) -> Integers:
    """Where keyed permutations of 0..size-1 send values: O(1) a value. Values and sizes [n], keys [n, ROUNDS].

    A Feistel network over Z_a x Z_b (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002) whose a*b is
    hardly more than the size; what lands beyond it is sent on until it lands inside. Sizes up to 2^60.
    """
    a = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    b = -(-sizes // a.astype(np.int64)).astype(np.uint64)
    sizes = sizes.astype(np.uint64)
    result = values.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        wide, narrow, rounds = a[outside], b[outside], keys[outside]
        left, right = np.divmod(result[outside], narrow)  # in Z_a, Z_b
        for number in range(0, ROUNDS, 2):
            left = _feistel_round(left, right, rounds[:, number], wide)
            right = _feistel_round(right, left, rounds[:, number + 1], narrow)
        result[outside] = left * narrow + right
        outside = outside[result[outside] >= sizes[outside]]
    return result.astype(np.int64)


def _feistel_round(
    half: NDArray[np.uint64], other: NDArray[np.uint64], keys: NDArray[np.uint64], size: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """This half plus a hash of the other, modulo size (which is below 2^31)."""
    half = half + ((_hashed(other, keys) >> _HALF) * size >> _HALF)
    return np.minimum(half, half - size)  # below zero wraps around, to something huge


def _hashed(values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of which the upper half is used: multiply, fold, multiply."""
    mixed = (values ^ keys) * _MULTIPLIERS[0]
    mixed ^= mixed >> _HALF
    mixed *= _MULTIPLIERS[1]
    return mixed


def _whole_weights(weights: list[float]) -> list[int]:
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


def _interleaved(parts: list[int]) -> Integers:
    """Source numbers [sum(parts)]: one period, every prefix within one of the shares.

    Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980): of the sources that lag
    behind by 1 / (2K - 2) or more, the one that would first be late. Its bound, 1 - 1 / (2K - 2), is the best possible.
    """
    period, count = sum(parts), len(parts)
    chosen = np.zeros(period, np.int64)
    if count == 1:
        return chosen
    # Whole numbers, so that it is exact: lags in units of 1 / (period * slack), times to lateness in common ones.
    slack = 2 * count - 2
    common = math.lcm(*parts)
    lag = [0] * count
    for i in range(period):
        lag = [behind + part * slack for behind, part in zip(lag, parts, strict=True)]
        late = [k for k in range(count) if lag[k] >= period]
        best = min(late, key=lambda k: ((slack - 1) * period - lag[k]) * (common // parts[k]))
        chosen[i] = best
        lag[best] -= period * slack
    return chosen
