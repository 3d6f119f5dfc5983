"""Weights on disk: safetensors, in one file or in shards with an index, read and written tensor by tensor.

Weights are a mapping from a name to a `LazyTensor`, which knows shape and dtype and reads its tensor when asked: a 34B
model is converted with one tensor in memory. The format is https://github.com/huggingface/safetensors, and the index is
Hugging Face's `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
CHUNK_BYTES = 16 * 2**20  # most that a tensor takes besides while it is read in another dtype

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for; `read_slice` reads some rows or columns, where its file can."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_slice: Callable[[tuple[slice, ...]], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def load(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, where: tuple[slice, ...] = ()
    ) -> Tensor:
        """The tensor, or some of its rows, or rows and columns, in `dtype`, its own by default. What is converted or
        cut is read by rows, of which CHUNK_BYTES are in memory; the rest stands in its file and is read when it is
        used."""
        dtype = dtype or self.dtype
        if not where and dtype == self.dtype and torch.device(device).type == "cpu":
            return self.read()
        shape = sliced(self.shape, where)
        target = torch.empty(shape, dtype=dtype, device=device)
        if not shape:
            return target.copy_(self.read())
        for rows, chunk in self.chunks(where, dtype.itemsize):
            target[rows] = chunk  # converted on the CPU, before it is sent
        return target

    def chunks(self, where: tuple[slice, ...], room: int) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after the other, as stored, and where they stand among those of `where`; so many that they and
        `room` bytes besides for each of their elements are CHUNK_BYTES."""
        rows, columns = range(self.shape[0])[(where or (slice(None),))[0]], where[1:]
        size = max(1, prod(self.shape[1:]) * (self.dtype.itemsize + room))
        step = max(1, CHUNK_BYTES // size)
        for begin in range(0, len(rows), step):
            own = rows[begin : begin + step]
            place = (slice(own.start, own.stop), *columns)
            yield (
                slice(begin, begin + len(own)),
                self.read()[place] if self.read_slice is None else self.read_slice(place),
            )


Weights = Mapping[str, LazyTensor]


def sliced(shape: tuple[int, ...], where: tuple[slice, ...]) -> tuple[int, ...]:
    """The shape of some rows, or rows and columns, of a tensor."""
    ranges = [range(size)[own] for size, own in zip(shape, where, strict=False)]
    return (*map(len, ranges), *shape[len(ranges) :])


def open_weights(directory: str | Path) -> dict[str, LazyTensor]:
    """The weights of a directory that holds `model.safetensors`, or shards and their index.

    Raises FileNotFoundError that names what is missing, ValueError for files that are broken.
    """
    directory = Path(directory)
    if (directory / INDEX).is_file():
        try:
            placed: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory / INDEX} is not an index of safetensors shards: {error!r}") from error
        files = sorted(set(placed.values()))
        if missing := [name for name in files if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{directory}: {', '.join(missing)} missing, which {INDEX} names")
    else:
        placed, files = {}, [FILE]
        if not (directory / FILE).is_file():
            raise FileNotFoundError(f"{directory} has neither {FILE} nor {INDEX}")
    found: dict[str, LazyTensor] = {}
    for name in files:
        found |= _open_file(directory / name)
    if lost := sorted(placed.keys() - found.keys()):
        raise ValueError(f"{directory}: {INDEX} names tensors that no shard holds: {', '.join(lost[:20])}")
    return found


def _open_file(path: Path) -> dict[str, LazyTensor]:
    """A file is opened anew for whatever is read of it: the pages of one that stays open count as memory in use."""

    def opened() -> Any:
        return safe_open(str(path), framework="pt", device="cpu")

    try:
        file, entries = opened(), {}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            stored = file.get_slice(name)
            shape, dtype = tuple(stored.get_shape()), DTYPES[stored.get_dtype()]
            entries[name] = LazyTensor(
                shape,
                dtype,
                lambda name=name: opened().get_tensor(name),  # type: ignore[misc]
                lambda where, name=name: opened().get_slice(name)[where],  # type: ignore[misc]
            )
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return entries


def write_weights(
    directory: str | Path,
    weights: Weights,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[float, float, str], object] | None = None,
) -> None:
    """Write `model.safetensors`, or shards of about `shard_bytes` and their index when there is more than that.

    One tensor at a time is in memory. progress(bytes done, bytes in all, name of the tensor).
    """
    directory = Path(directory)
    total = sum(entry.bytes for entry in weights.values())
    shards = _shards(weights, shard_bytes)
    files = [FILE] if len(shards) == 1 else [_shard(k, len(shards)) for k in range(1, len(shards) + 1)]
    done = 0

    def report(name: str) -> None:
        nonlocal done
        done += weights[name].bytes
        if progress is not None:
            progress(done, total, name)

    for file, names in zip(files, shards, strict=True):
        with (directory / file).open("wb") as opened:
            _write_file(opened, {name: weights[name] for name in names}, report)
    if len(shards) > 1:
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for stale in {FILE} if len(shards) > 1 else {INDEX}:
        (directory / stale).unlink(missing_ok=True)


def _shard(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _shards(weights: Weights, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in weights.items():
        if shards[-1] and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.bytes
    return shards


def _write_file(file: BinaryIO, weights: Weights, report: Callable[[str], object]) -> None:
    """One safetensors file: length of the header, the header, the tensors' bytes; widest dtypes first, so that every
    tensor lies at a multiple of its element size."""
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        entry = weights[name]
        offsets = [position, position + entry.bytes]
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for name in names:
        file.write(_bytes(name, weights[name]))
        report(name)


def _bytes(name: str, entry: LazyTensor) -> memoryview:
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise ValueError(
            f"{name} was announced as {list(entry.shape)} {entry.dtype} and came as {list(tensor.shape)} {tensor.dtype}"
        )
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
