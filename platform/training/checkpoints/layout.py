"""The files of a checkpoint: one of each worker, and an index of what stands where.

    part-00000.safetensors   what the first worker owns: a flat tensor `PARAMETER[OFFSET].STATE` for each range of a
                             parameter and each of its states, then `checksums`
    index.parquet            parameter, state, file, offset (first element), numel, position (first byte in the file)

A worker of any other group looks its own ranges up in the index and reads those bytes alone (`ranges.py`). So that what
it reads can be trusted without the rest of the file, `checksums` are the CRC-32s of the pieces of a file's data, of
`piece` bytes each; what is read begins and ends at a piece. Both kinds of file open with their public libraries.

Why a layout of our own: torch.distributed.checkpoint reads a stored chunk whole, however little of it is wanted, and
has no checksums; DeepSpeed's universal checkpoint takes a conversion of everything, and then files of whole parameters.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calumma.model.weights import DTYPES, NAMES
from calumma.platform import storage
from calumma.platform.storage.manifest import FileEntry, Manifest, ManifestError

INDEX = "index.parquet"
_CHECKSUMS = "checksums"
# Bytes of a piece: of small files less is read to check a range.
_PIECE, _SMALL_PIECE, _SMALL_FILE = 16 << 10, 1 << 10, 16 << 20


States = dict[str, torch.dtype]  # state -> how it is stored, in the order of the files


class PartLayout(NamedTuple):
    """Where a worker's ranges stand in its file: all of the first state, then all of the next."""

    begin: int
    """The first byte of data."""
    data_bytes: int
    """Of its tensors, without the checksums."""
    piece: int
    parameters: np.ndarray
    """int32 [N]: numbers of the ranges' parameters."""
    offsets: np.ndarray
    """int64 [N]: first elements."""
    numels: np.ndarray
    """int64 [N]."""

    def positions(self, states: States) -> np.ndarray:
        """int64 [states, N]: first bytes in the file."""
        before = np.cumsum(self.numels) - self.numels
        sizes = [dtype.itemsize for dtype in states.values()]
        begins = self.begin + int(self.numels.sum()) * (np.cumsum([0, *sizes[:-1]]))
        return np.stack([begin + size * before for begin, size in zip(begins, sizes, strict=True)])


def part_name(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"


def part_layout(
    ranges: Sequence[tuple[str, int, int]], states: States, names: Sequence[str]
) -> tuple[bytes, PartLayout]:
    """The header of a worker's file and its layout: of `ranges`, (parameter, offset, elements)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for state, dtype in states.items():
        for parameter, offset, numel in ranges:
            end = position + numel * dtype.itemsize
            entry = {"dtype": NAMES[dtype], "shape": [numel], "data_offsets": [position, end]}
            header[f"{parameter}[{offset}].{state}"] = entry
            position = end
    piece = _SMALL_PIECE if position < _SMALL_FILE else _PIECE
    pieces = -(-position // piece)
    header[_CHECKSUMS] = {"dtype": "U32", "shape": [pieces], "data_offsets": [position, position + 4 * pieces]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    encoded = struct.pack("<Q", len(encoded)) + encoded
    number = {name: code for code, name in enumerate(names)}
    return encoded, PartLayout(
        len(encoded),
        position,
        piece,
        parameters=np.array([number[parameter] for parameter, _, _ in ranges], np.int32),
        offsets=np.array([offset for _, offset, _ in ranges], np.int64),
        numels=np.array([numel for _, _, numel in ranges], np.int64),
    )


def write_part(file: BinaryIO, name: str, header: bytes, piece: int, tensors: Iterable[Tensor]) -> FileEntry:
    """Write a worker's file, its tensors on the CPU in the order of its layout; its entry in the manifest."""
    digest, checksums, size = hashlib.sha256(), Checksums(piece), 0

    def write(data: Any) -> None:
        nonlocal size
        digest.update(data)
        file.write(data)
        size += len(data)

    write(header)
    for tensor in tensors:
        data = tensor.contiguous().view(torch.uint8).numpy().data
        checksums.update(data)
        write(data)
    write(checksums.finish())
    return FileEntry(path=name, bytes=size, sha256=digest.hexdigest())


class Checksums:
    """CRC-32 of every `piece` bytes of what it is given."""

    def __init__(self, piece: int) -> None:
        self._piece, self._filled, self._current = piece, 0, 0
        self._found: list[int] = []

    def update(self, data: memoryview) -> None:
        begin = 0
        while begin < len(data):
            chunk = data[begin : begin + self._piece - self._filled]
            self._current = zlib.crc32(chunk, self._current)
            self._filled += len(chunk)
            begin += len(chunk)
            if self._filled == self._piece:
                self._close()

    def finish(self) -> bytes:
        """The table, 4 bytes a piece."""
        if self._filled:
            self._close()
        return np.array(self._found, "<u4").tobytes()

    def _close(self) -> None:
        self._found.append(self._current)
        self._filled, self._current = 0, 0


def index_bytes(parts: Sequence[PartLayout], states: States, names: Sequence[str]) -> bytes:
    """The index of all workers' files, by rank."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def labels(codes: np.ndarray, values: Sequence[str]) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(list(values)))

    count, sizes = len(states), [len(part.offsets) for part in parts]
    files = [part_name(rank) for rank in range(len(parts))]
    table = pa.table(
        {
            "parameter": labels(np.concatenate([np.tile(part.parameters, count) for part in parts]), names),
            "state": labels(np.concatenate([np.repeat(np.arange(count), size) for size in sizes]), list(states)),
            "file": labels(np.repeat(np.arange(len(parts)), [size * count for size in sizes]), files),
            "offset": np.concatenate([np.tile(part.offsets, count) for part in parts]),
            "numel": np.concatenate([np.tile(part.numels, count) for part in parts]),
            "position": np.concatenate([part.positions(states).reshape(-1) for part in parts]),
        }
    )
    facts = {
        "files": {
            name: {"begin": part.begin, "data_bytes": part.data_bytes, "piece": part.piece}
            for name, part in zip(files, parts, strict=True)
        },
        "states": {name: NAMES[dtype] for name, dtype in states.items()},
    }
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"calumma": json.dumps(facts)}), buffer, compression="zstd")
    return buffer.getvalue()


@dataclass(frozen=True)
class IndexedFile:
    """What a reader must know of a worker's file."""

    begin: int
    data_bytes: int
    piece: int


class Index:
    """Where everything of a checkpoint stands."""

    def __init__(self, data: bytes) -> None:
        """Raises ManifestError when it is none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(io.BytesIO(data))
            facts = json.loads(table.schema.metadata[b"calumma"])
            self.states: States = {name: DTYPES[dtype] for name, dtype in facts["states"].items()}
            self.files = {name: IndexedFile(**values) for name, values in facts["files"].items()}
            self._labels = {}
            codes = {}
            for name in ("parameter", "state", "file"):
                column = table[name].combine_chunks()
                self._labels[name] = column.dictionary.to_pylist()
                codes[name] = column.indices.to_numpy(zero_copy_only=False)
            numbers = {name: table[name].to_numpy() for name in ("offset", "numel", "position")}
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"it is no index of a checkpoint: {error!r}") from error
        order = np.lexsort((numbers["offset"], codes["state"], codes["parameter"]))
        self._offset, self._numel, self._position = (numbers[n][order] for n in ("offset", "numel", "position"))
        self._file = codes["file"][order]
        width = len(self._labels["state"])
        keys = codes["parameter"][order].astype(np.int64) * width + codes["state"][order]
        found, firsts = np.unique(keys, return_index=True)
        lasts = np.append(firsts[1:], len(keys))
        self._rows = {
            (self._labels["parameter"][key // width], self._labels["state"][key % width]): (first, last)
            for key, first, last in zip(found.tolist(), firsts.tolist(), lasts.tolist(), strict=True)
        }

    @classmethod
    def read(cls, uri: str, manifest: Manifest, folder: str) -> Index:
        """The index of a checkpoint. Raises StorageError, ManifestError; Damaged when it is not the manifest's."""
        path = storage.join(folder, INDEX) if folder else INDEX
        entry = next((entry for entry in manifest.files if entry.path == path), None)
        if entry is None:
            raise ManifestError(f"{uri} is a checkpoint of an earlier version, without {INDEX}")
        data = storage.read_bytes(storage.join(uri, path))
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise storage.Damaged(f"the content of {path} is not what the manifest says")
        try:
            return cls(data)
        except ManifestError as error:
            raise storage.Damaged(f"{path}: {error}") from error

    def places(self, parameter: str, state: str, offset: int, numel: int) -> list[tuple[str, int, int, int]]:
        """What holds a range of a parameter's state, in order: (file, first byte, first element within the range,
        elements). Raises ManifestError when not all of it is there."""
        first, last = self._rows.get((parameter, state), (0, 0))
        begins = self._offset[first:last]
        start = first + max(int(np.searchsorted(begins, offset, side="right")) - 1, 0)
        size, found, reached = self.states[state].itemsize if state in self.states else 0, [], offset
        for row in range(start, last):
            begin, end = int(self._offset[row]), int(self._offset[row] + self._numel[row])
            if begin >= offset + numel:
                break
            low, high = max(begin, reached), min(end, offset + numel)
            if low < high and begin <= reached:
                name = self._labels["file"][self._file[row]]
                found.append((name, int(self._position[row]) + (low - begin) * size, low - offset, high - low))
                reached = high
        if reached < offset + numel:
            raise ManifestError(
                f"the checkpoint does not hold elements {reached} to {offset + numel} of {parameter} ({state})"
            )
        return found
