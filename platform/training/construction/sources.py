"""Where starting weights come from: a model directory, read by ranges, or a seed. Each fills ranges of parameters."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.tokenizers.image import WEIGHTS as IMAGE_TOKENIZER_WEIGHTS
from calumma.model.transformer import Transformer
from calumma.model.weights import DTYPES, FILE, INDEX
from calumma.platform import storage
from calumma.platform.storage.client import THREADS
from calumma.platform.storage.manifest import Manifest, ManifestError
from calumma.platform.training.checkpoints import ranges
from calumma.platform.training.checkpoints.fragments import MASTER, Fragment
from calumma.platform.training.checkpoints.layout import Index

CODEBOOK = "codebook.weight"  # of an image tokenizer
EMBEDDING = "embedding.weight"  # of a Transformer
_REQUEST = 8 << 20  # bytes read at once, a thread


class Wanted(NamedTuple):
    """A range of a parameter, counted as if it were flat, and the flat tensor that it goes into."""

    parameter: str
    offset: int
    target: Tensor


class WeightSource(Protocol):
    """The weights of an ordinary Transformer, or of one with what is added to it for training."""

    def fill(self, wanted: Sequence[Wanted], beat: Callable[[], object] = lambda: None) -> None:
        """`beat` is called as it goes on. Raises StorageError where weights cannot be read, or are another model's."""
        ...


@dataclass(frozen=True)
class CodeRows:
    """What rows of an embedding begin as: vectors of the codes of an image tokenizer, in the model's width."""

    tokenizer: str
    """URI of its folder."""
    ids: Sequence[int]
    """The row of each code."""

    def settle(self, embedding_VD: Tensor, seed: int) -> None:
        """Put the vectors into their rows, in place: centred, turned by a random orthonormal map, and with the mean
        square that the matrix had, so that codes are as near to each other as in the codebook, and rows as long as any.

        Raises StorageError where there is no codebook of so many codes."""
        source = DirectoryWeights(self.tokenizer, IMAGE_TOKENIZER_WEIGHTS)
        codes, width = len(self.ids), embedding_VD.shape[1]
        flat = torch.empty(source.elements(CODEBOOK))
        if len(flat) % codes:
            raise storage.StorageError(f"{self.tokenizer} does not hold a codebook of {codes} codes")
        source.fill([Wanted(CODEBOOK, 0, flat)])
        vectors_KE = flat.view(codes, -1)
        vectors_KE = vectors_KE - vectors_KE.mean(0)
        longer = max(width, vectors_KE.shape[1])
        random = torch.Generator().manual_seed(seed)
        turn_EE, _ = torch.linalg.qr(torch.randn(longer, longer, generator=random))
        rows_KD = vectors_KE @ turn_EE[: vectors_KE.shape[1], :width]
        scale = embedding_VD.square().mean().sqrt().cpu() / rows_KD.square().mean().sqrt().clamp_min(1e-12)
        embedding_VD[torch.as_tensor(self.ids, device=embedding_VD.device)] = (rows_KD * scale).to(embedding_VD)


@dataclass(frozen=True)
class SeededWeights:
    """Fresh weights (`Transformer.initial_weights`), drawn one parameter at a time on a device. `code_rows`: what some
    rows of the embedding are in place of that."""

    config: ModelConfig
    seed: int
    device: torch.device
    code_rows: CodeRows | None = None

    def fill(self, wanted: Sequence[Wanted], beat: Callable[[], object] = lambda: None) -> None:
        by_name = _by_parameter(wanted)
        with torch.device("meta"):
            model = Transformer(self.config)
        for name, value in model.initial_weights(self.seed, self.device):
            if self.code_rows is not None and name == EMBEDDING and name in by_name:
                self.code_rows.settle(value, self.seed)
            for _, offset, target in by_name.get(name, ()):
                target.copy_(value.view(-1)[offset : offset + target.numel()])
            beat()


class _Stored(NamedTuple):
    uri: str
    dtype: torch.dtype
    elements: int
    begin: int
    """The first byte in the file."""


class DirectoryWeights:
    """The safetensors of a model directory in any storage, or one file of a folder."""

    def __init__(self, uri: str, file: str | None = None) -> None:
        """Raises StorageError."""
        self._uri = uri
        files = _weight_files(uri) if file is None else [storage.join(uri, file)]
        self._stored = {name: stored for place in files for name, stored in _header(place)}

    def elements(self, name: str) -> int:
        """How many a weight has. Raises StorageError where there is none of that name."""
        if name not in self._stored:
            raise storage.StorageError(f"{self._uri} does not hold {name}")
        return self._stored[name].elements

    def fill(self, wanted: Sequence[Wanted], beat: Callable[[], object] = lambda: None) -> None:
        work: list[tuple[_Stored, int, Tensor]] = []
        for name, offset, target in wanted:
            stored = self._stored.get(name)
            if stored is None or offset + target.numel() > stored.elements:
                raise storage.StorageError(
                    f"{self._uri} does not hold the weights of this model: {name} is missing or small"
                )
            step = _REQUEST // stored.dtype.itemsize
            work += [(stored, offset + first, target[first : first + step]) for first in range(0, target.numel(), step)]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="weights") as pool:
            for _ in pool.map(lambda item: _read(*item), work):
                beat()


class CheckpointWeights:
    """The weights in a checkpoint of a stage that trained all of them, checked as they are read."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        """Raises StorageError."""
        self._folder = storage.join(uri, manifest.report["folder"])
        try:
            self._index = Index.read(uri, manifest, manifest.report["folder"])
        except ManifestError as error:
            raise storage.StorageError(str(error)) from error

    def fill(self, wanted: Sequence[Wanted], beat: Callable[[], object] = lambda: None) -> None:
        fragments = [Fragment(w.parameter, w.offset, w.target.numel(), {MASTER: w.target}) for w in wanted]
        try:
            ranges.fill(self._folder, self._index, fragments, [MASTER], beat)
        except storage.Damaged as error:
            raise storage.Damaged(f"{self._folder} is damaged, and nothing is started from it: {error}") from error
        except ManifestError as error:
            raise storage.StorageError(f"{self._folder} does not hold the weights of this model: {error}") from error


@dataclass(frozen=True)
class AddedWeights:
    """Those of a source, and what training adds to them: adapters as they were drawn, their magnitudes, which begin as
    the lengths of the rows of a matrix, and the image rows of the output, which begin as the rows that they stand for.
    """

    plain: WeightSource
    drawn: Mapping[str, Tensor]
    rows_of: Mapping[str, tuple[str, list[int], int]]
    """Parameter -> the matrix it is rows of, which, and their width."""
    lengths_of: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Parameter -> the matrix whose rows it is the lengths of, and their width."""

    def fill(self, wanted: Sequence[Wanted], beat: Callable[[], object] = lambda: None) -> None:
        plain = []
        for want in wanted:
            name, offset, target = want
            if name in self.drawn:
                target.copy_(self.drawn[name].reshape(-1)[offset : offset + target.numel()])
            elif name in self.rows_of:
                plain += list(_rows(want, *self.rows_of[name]))
            elif name in self.lengths_of:
                matrix, width = self.lengths_of[name]
                rows = torch.empty(target.numel() * width, device=target.device)
                self.plain.fill([Wanted(matrix, offset * width, rows)])
                target.copy_(rows.view(-1, width).norm(dim=1))
            else:
                plain.append(want)
        self.plain.fill(plain, beat)


def _rows(want: Wanted, matrix: str, rows: list[int], width: int) -> Iterator[Wanted]:
    """The same range as ranges of the matrix that it is rows of, one for each run of rows that follow each other."""
    first, end = want.offset, want.offset + want.target.numel()
    while first < end:
        row = first // width
        while (row + 1) * width < end and rows[row + 1] == rows[row] + 1:
            row += 1
        last = min((row + 1) * width, end)
        target = want.target[first - want.offset : last - want.offset]
        yield Wanted(matrix, rows[first // width] * width + first % width, target)
        first = last


def _by_parameter(wanted: Sequence[Wanted]) -> dict[str, list[Wanted]]:
    found: dict[str, list[Wanted]] = {}
    for want in wanted:
        found.setdefault(want.parameter, []).append(want)
    return found


def _weight_files(uri: str) -> list[str]:
    if not storage.exists(storage.join(uri, INDEX)):
        return [storage.join(uri, FILE)]
    try:
        placed = json.loads(storage.read_bytes(storage.join(uri, INDEX)))["weight_map"]
        return [storage.join(uri, name) for name in sorted(set(placed.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise storage.StorageError(f"{uri}: its {INDEX} is not an index of safetensors shards: {error!r}") from error


def _header(uri: str) -> Iterator[tuple[str, _Stored]]:
    """What a safetensors file holds, from its first bytes."""
    try:
        (length,) = struct.unpack("<Q", storage.read_range(uri, 0, 8))
        if length > storage.size(uri):
            raise ValueError(f"a header of {length} bytes")
        for name, entry in json.loads(storage.read_range(uri, 8, length)).items():
            if name != "__metadata__":
                begin = 8 + length + int(entry["data_offsets"][0])
                yield name, _Stored(uri, DTYPES[entry["dtype"]], prod(entry["shape"]), begin)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise storage.StorageError(f"{uri} is not a readable safetensors file: {error!r}") from error


def _read(stored: _Stored, first: int, target: Tensor) -> None:
    size = stored.dtype.itemsize
    data = storage.read_range(stored.uri, stored.begin + first * size, target.numel() * size)
    target.copy_(torch.frombuffer(bytearray(data), dtype=stored.dtype))
