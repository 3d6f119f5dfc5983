"""Blocks of the cache as files, for later engines of the same weights: one file a block, named by its digest.

A file is written beside and then renamed, so that there are whole ones alone; what is found damaged all the same, by
its length, its name and a checksum, is deleted and counts as not there. A full or broken disk costs what would have
been found on it. Several processes may use a folder at once.
"""

from __future__ import annotations

import logging
import os
import queue
import struct
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

MAGIC = b"calumma1"
HEAD = struct.Struct("<8s16sQI")  # magic, digest, bytes that follow, their CRC-32
WAITING = 64  # blocks that wait to be written; more are not
STALE_SECONDS = 3600.0  # after which a file that was not finished will not be
LOOKED = 16  # the folder is looked through again after a part of it, one in so many, has been written


@dataclass(frozen=True)
class DiskCache:
    """A folder for blocks of the cache, and the bytes that they may take in it, for each model."""

    folder: Path
    capacity: int


class DiskBlocks:
    """The files of one identity (of weights, and of how a block is laid out). damaged: files that were."""

    def __init__(self, disk: DiskCache, identity: str) -> None:
        self.folder, self.capacity = Path(disk.folder) / identity, disk.capacity
        self.damaged = self.written = 0
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is here tells of prompts
        self._index: OrderedDict[bytes, int] = OrderedDict()  # bytes of each file, the longest unused first
        self._lock = threading.Lock()
        self._since = 0
        self._scan()
        self._queue: queue.Queue[tuple[bytes, Tensor] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name="cache-disk", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """Bytes on the disk now, as far as is known."""
        with self._lock:
            return sum(self._index.values())

    def holds(self, digest: bytes) -> bool:
        """Whether it was there when the folder was last looked at."""
        return digest in self._index

    def write(self, digest: bytes, content: Tensor, wait: bool = False) -> None:
        """Have bytes written (UInt8Tensor [bytes], not to be changed any more). Where more wait than may they are not,
        unless the caller does."""
        with suppress(queue.Full):
            self._queue.put((digest, content), block=wait)

    def read(self, digest: bytes) -> Tensor | None:
        """UInt8Tensor [bytes]; None where there is no sound file."""
        if digest not in self._index:
            return None
        path = self._path(digest)
        try:
            held = path.read_bytes()
            os.utime(path)
        except OSError:
            self._forget(digest)
            return None
        if len(held) >= HEAD.size:
            magic, name, length, checksum = HEAD.unpack_from(held)
            content = memoryview(held)[HEAD.size :]
            if (magic, name, length) == (MAGIC, digest, len(content)) and zlib.crc32(content) == checksum:
                with self._lock:
                    if digest in self._index:
                        self._index.move_to_end(digest)
                return torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        log.warning("%s is damaged and deleted: what it held is computed again", path)
        self.damaged += 1
        self._forget(digest)
        with suppress(OSError):
            path.unlink()
        return None

    def close(self) -> None:
        """Write what waits, and stop."""
        self._queue.put(None)
        self._thread.join()

    def _path(self, digest: bytes) -> Path:
        return self.folder / f"{digest.hex()}.kv"

    def _forget(self, digest: bytes) -> None:
        with self._lock:
            self._index.pop(digest, None)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            digest, content = item
            if digest in self._index:
                continue
            try:
                self._write(digest, content)
            except OSError as error:
                log.warning("a block of the cache was not written to %s: %s", self.folder, error)

    def _write(self, digest: bytes, content: Tensor) -> None:
        data = content.numpy().data
        size = HEAD.size + len(data)
        if size > self.capacity:
            return
        self._make_room(size)
        handle, name = tempfile.mkstemp(suffix=".part", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(HEAD.pack(MAGIC, digest, len(data), zlib.crc32(data)))
                file.write(data)
            Path(name).replace(self._path(digest))
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
        with self._lock:
            self._index[digest] = size
        self.written += 1

    def _make_room(self, size: int) -> None:
        """Delete what has been unused for longest. Others may have written here, too."""
        self._since += size
        if self._since > self.capacity // LOOKED:
            self._scan()
        with self._lock:
            held = sum(self._index.values())
            while self._index and held + size > self.capacity:
                digest, freed = self._index.popitem(last=False)
                held -= freed
                with suppress(OSError):
                    self._path(digest).unlink()

    def _scan(self) -> None:
        found = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError, ValueError):
                    status = entry.stat()
                    stem, _, suffix = entry.name.rpartition(".")
                    if suffix == "kv" and len(stem) == 32:
                        found.append((status.st_mtime_ns, bytes.fromhex(stem), status.st_size))
                    elif suffix == "part" and time.time() - status.st_mtime > STALE_SECONDS:
                        Path(entry.path).unlink()
        with self._lock:
            self._index = OrderedDict((digest, size) for _, digest, size in sorted(found))
        self._since = 0


def identity_of(tensors: Iterable[tuple[str, Tensor]], layout: str) -> str:
    """Of weights, by all their bytes, and of how blocks are laid out: what was computed by others is of no use."""

    def digest(named: tuple[str, Tensor]) -> bytes:
        name, tensor = named
        content = tensor.detach().to("cpu").contiguous()
        head = f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        return blake2b(content.view(torch.uint8).numpy().data if content.numel() else b"", key=b"").digest() + head

    whole = blake2b(layout.encode(), digest_size=16, person=b"identity")
    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        for each in pool.map(digest, tensors):
            whole.update(blake2b(each).digest())
    return whole.hexdigest()
