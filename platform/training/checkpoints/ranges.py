"""Reading of a checkpoint what one worker needs: ranges of files, each checked by the checksums of its pieces."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calumma.platform import storage
from calumma.platform.storage.client import THREADS
from calumma.platform.training.checkpoints.fragments import Fragment
from calumma.platform.training.checkpoints.layout import Index, IndexedFile
from calumma.platform.training.checkpoints.node_local import NodeLocal

_REQUEST = 8 << 20  # bytes read at once, a thread


class _Copy(NamedTuple):
    """Bytes of a file's data that belong into a tensor."""

    begin: int
    end: int
    target: Tensor
    """Flat, with as many elements."""
    dtype: torch.dtype
    """As stored."""


@dataclass
class _Request:
    """Whole pieces of a file's data, and what of them goes where."""

    begin: int
    end: int
    copies: list[_Copy] = field(default_factory=list)


def fill(
    folder: str,
    index: Index,
    fragments: Iterable[Fragment],
    states: Sequence[str],
    beat: Callable[[], object] = lambda: None,
    copies_here: NodeLocal | None = None,
) -> None:
    """Fill the fragments' states from the files in `folder`, or copies of them; `beat` is called after every request.

    What is read besides is less than a piece at both ends of each range, and the checksums; in memory are a few
    requests of 8 MiB. Raises StorageError, Damaged where a checksum differs, ManifestError when something is missing.
    """
    copies: dict[str, list[_Copy]] = {}
    for fragment in fragments:
        for state in states:
            size, target = index.states[state].itemsize, fragment.states[state]
            for name, position, first, numel in index.places(
                fragment.parameter, state, fragment.offset, fragment.numel
            ):
                begin = position - index.files[name].begin
                copies.setdefault(name, []).append(
                    _Copy(begin, begin + numel * size, target.narrow(0, first, numel), index.states[state])
                )
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
        work = [
            pool.submit(_read, storage.join(folder, name), index.files[name], requests, beat, copies_here)
            for name, found in copies.items()
            for requests in _shared(_requests(found, index.files[name]))
        ]
        try:
            for done in work:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _requests(copies: list[_Copy], file: IndexedFile) -> list[_Request]:
    """What to ask of a file: its ranges widened to whole pieces, joined where they touch, up to 8 MiB."""
    requests: list[_Request] = []
    for copy in sorted(copies, key=lambda copy: copy.begin):
        for part in _cut(copy, file.piece):
            begin = part.begin // file.piece * file.piece
            end = min(-(-part.end // file.piece) * file.piece, file.data_bytes)
            last = requests[-1] if requests else None
            if last is not None and begin <= last.end and max(end, last.end) - last.begin <= _REQUEST:
                last.end = max(end, last.end)
                last.copies.append(part)
            else:
                requests.append(_Request(begin, end, [part]))
    return requests


def _cut(copy: _Copy, piece: int) -> Iterator[_Copy]:
    """The same in parts that end at pieces and are no longer than a request."""
    size, begin = copy.dtype.itemsize, copy.begin
    while begin < copy.end:
        end = min(copy.end, (begin // piece * piece) + _REQUEST - piece)
        first = (begin - copy.begin) // size
        yield _Copy(begin, end, copy.target.narrow(0, first, (end - begin) // size), copy.dtype)
        begin = end


def _shared(requests: list[_Request]) -> Iterator[list[_Request]]:
    """A file's requests by thread: its checksums are read once for each, as far as it needs them."""
    share = max(1, -(-len(requests) // THREADS))
    for first in range(0, len(requests), share):
        yield requests[first : first + share]


def _read(
    uri: str,
    file: IndexedFile,
    requests: list[_Request],
    beat: Callable[[], object],
    copies_here: NodeLocal | None,
) -> None:
    read_range = storage.read_range if copies_here is None else copies_here.read_range
    first, last = requests[0].begin // file.piece, -(-max(r.end for r in requests) // file.piece)
    table = storage.read_range(uri, file.begin + file.data_bytes + 4 * first, 4 * (last - first))
    checksums = np.frombuffer(table, "<u4")  # storage's, of copies too
    for request in requests:
        data = read_range(
            uri,
            file.begin + request.begin,
            request.end - request.begin,
            lambda data, request=request: _problem(  # type: ignore[misc]
                data, file.piece, checksums[request.begin // file.piece - first :], request.begin
            ),
        )
        for copy in request.copies:
            _put(memoryview(data)[copy.begin - request.begin : copy.end - request.begin], copy)
        beat()


def _put(place: memoryview, copy: _Copy) -> None:
    """Bytes that were read into the tensor that wants them; without another copy where they are as it has them."""
    target = copy.target
    if target.device.type == "cpu" and target.dtype == copy.dtype and target.is_contiguous():
        np.copyto(target.detach().view(torch.uint8).numpy(), np.frombuffer(place, np.uint8))
    else:  # torch takes no memory that it may not write to
        target.copy_(torch.frombuffer(bytearray(place), dtype=copy.dtype))


def _problem(data: bytes, piece: int, checksums: np.ndarray, begin: int) -> str | None:
    """What is wrong with some pieces that begin at a byte of the data."""
    view = memoryview(data)
    for number, start in enumerate(range(0, len(data), piece)):
        if zlib.crc32(view[start : start + piece]) != int(checksums[number]):
            return f"bytes {begin + start} to {begin + start + piece} of its data are not what was written"
    return None
