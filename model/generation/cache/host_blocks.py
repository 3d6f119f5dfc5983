"""Blocks that the cache has given up, in the host's memory and perhaps on a disk, found again by what they hold.

A block that is evicted is copied here when it is full; of a context whose next block the cache lacks it is copied back,
which is sooner done than computing it. Its name is the digest of all tokens up to its end and of the request's salt and
adapter (block_manager.py), so requests find here what they would find in the cache, and nothing else. What the host's
memory gives up in turn goes to the disk, and so does all that is held when the engine is closed.

Shape suffixes: L layers, S positions of a block, K key-value heads, H head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from calumma.model.generation.cache.disk_blocks import DiskBlocks
from calumma.model.generation.cache.paged import PagedCache


class HostBlocks:
    """At most `capacity` bytes of blocks of a cache; the longest unused go first. disk: where those go then.

    hits, disk_hits: blocks that were found, those of the disk beside.
    """

    def __init__(self, cache: PagedCache, capacity: int, disk: DiskBlocks | None = None) -> None:
        self.cache, self.disk = cache, disk
        example = cache.store[:, :, 0]
        self.block_bytes = example.numel() * example.element_size()
        count = capacity // self.block_bytes
        pinned = example.is_cuda and count > 0
        self._pool = torch.empty(count, *example.shape, dtype=example.dtype, pin_memory=pinned)
        self._free = list(range(count))
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self.hits = self.disk_hits = 0

    @property
    def held(self) -> int:
        """Bytes now."""
        return len(self._slots) * self.block_bytes

    def keep(self, digest: bytes, block: int) -> None:
        """Hold what a block of the cache holds."""
        if digest in self._slots:
            self._slots.move_to_end(digest)
            return
        if not len(self._pool):
            self._to_disk(digest, self.cache.store[:, :, block])
            return
        if not self._free:
            oldest, slot = self._slots.popitem(last=False)
            self._to_disk(oldest, self._pool[slot])
            self._free.append(slot)
        slot = self._free.pop()
        # in the order of what the device is given: its block is not overwritten before
        self._pool[slot].copy_(self.cache.store[:, :, block], non_blocking=True)
        self._slots[digest] = slot

    def restore(self, digest: bytes, block: int) -> bool:
        """Put what is held under a name into a block of the cache; false where there is nothing."""
        slot = self._slots.get(digest)
        if slot is not None:
            self._slots.move_to_end(digest)
            self.cache.store[:, :, block] = self._pool[slot].to(self.cache.store.device, non_blocking=True)
            self.hits += 1
            return True
        held = None if self.disk is None else self.disk.read(digest)
        if held is None or len(held) != self.block_bytes:
            return False
        self.cache.store[:, :, block] = held.view(self._pool.dtype).view(self._pool.shape[1:])
        self.hits += 1
        self.disk_hits += 1
        return True

    def close(self, held: Iterable[tuple[bytes, int]]) -> None:
        """Put all that is held on the disk, and some of the cache's blocks by their digests."""
        if self.disk is None:
            return
        for digest, slot in self._slots.items():
            self._to_disk(digest, self._pool[slot], wait=True)
        for digest, block in held:
            self._to_disk(digest, self.cache.store[:, :, block], wait=True)
        self.disk.close()

    def _to_disk(self, digest: bytes, held: Tensor, wait: bool = False) -> None:
        if self.disk is None or self.disk.holds(digest):
            return
        if self.cache.store.is_cuda:
            torch.cuda.current_stream(self.cache.store.device).synchronize()  # what is on its way here has come
        copied = held.to("cpu", copy=True).contiguous().view(torch.uint8).flatten()
        self.disk.write(digest, copied, wait)
