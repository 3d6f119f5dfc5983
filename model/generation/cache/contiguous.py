"""Contiguous copies of the keys and values of sequences that are decoded together, for attention on a CPU.

Gathering blocks copies every key and value of a context for every token; where memory is what limits, that costs as
much as attention itself.

Shape suffixes: B sequences, M blocks of a sequence, K key-value heads, H head size, X key-value heads of all sequences
(B*K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence

# Most bytes of keys and values that are held a second time, in the order they are read.
CONTIGUOUS_BYTES = 1 << 29


class ContiguousKV:
    """A second, contiguous copy of the keys and values of B sequences, M blocks each: `layers`, a pair
    [B, K, M * block_size, H] each. A pass reads it and adds its tokens to it, instead of gathering blocks anew.

    tables: LongTensor [B * M], the sequences' block tables.
    """

    def __init__(self, cache: PagedCache, tables: Tensor, B: int) -> None:
        self.M, self._blocks, self._tables = len(tables) // B, cache.by_block, tables
        K, H = cache.store.shape[4:]
        shape = (B, K, self.M * cache.block_size, H)
        self.layers = [(cache.store.new_empty(shape), cache.store.new_empty(shape)) for _ in cache.by_block]
        self._first = torch.arange(B * K) * shape[2]
        self._filled = 0

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for pair in self.layers for tensor in pair)

    def slots(self, positions_B: Tensor) -> Tensor:
        """LongTensor [B * K]: where a token of each sequence stands in a layer."""
        return self._first + positions_B.repeat_interleave(len(self._first) // len(positions_B))

    def read(self, layer: int, k_BKH: Tensor, v_BKH: Tensor, slots_X: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` positions [B, K, length, H], the new tokens at `slots` among them."""
        keys, values = self.layers[layer]
        if self._filled == layer:  # in the first pass: the paged cache has the new tokens already
            for copy, paged in zip((keys, values), self._blocks[layer], strict=True):
                copy.copy_(paged[self._tables].view(len(copy), -1, *paged.shape[2:]).transpose(1, 2))
            self._filled += 1
        else:
            keys.flatten(0, 2).index_copy_(0, slots_X, k_BKH.reshape(-1, k_BKH.shape[-1]))
            values.flatten(0, 2).index_copy_(0, slots_X, v_BKH.reshape(-1, v_BKH.shape[-1]))
        return keys[:, :, :length], values[:, :, :length]


class ContiguousCache:
    """The contiguous copies, by the sequences they are of, from pass to pass."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._copies: dict[tuple[int, ...], tuple[ContiguousKV, list[tuple[Sequence, int]]]] = {}
        self._used: set[tuple[int, ...]] = set()

    def find(self, sequences: list[Sequence], starts: list[int], M: int) -> ContiguousKV | None:
        """For the next token of each sequence, at `starts`, with room for M blocks each; None where it is too much."""
        key = tuple(map(id, sequences))
        copy, state = self._copies.get(key, (None, []))
        fresh = copy is None or copy.M < M
        # the same sequences, none released meanwhile, each a token longer
        if fresh or any(s is not o or start != at for s, start, (o, at) in zip(sequences, starts, state, strict=True)):
            room = M + max(1, M // 4)
            if self._bytes(len(sequences) * room) > CONTIGUOUS_BYTES:
                return None
            # filled up with its own: what another sequence's block holds may not be numbers
            tables = [block for s in sequences for block in (s.blocks + s.blocks[-1:] * room)[:room]]
            copy = ContiguousKV(self.cache, torch.tensor(tables), len(sequences))
        assert copy is not None
        self._copies[key] = (copy, [(s, start + 1) for s, start in zip(sequences, starts, strict=True)])
        self._used.add(key)
        return copy

    def drop_unused(self) -> None:
        """Copies that the last pass did not read are dropped."""
        self._copies = {key: self._copies[key] for key in self._used}
        self._used = set()

    def clear(self) -> None:
        """Drop all."""
        self._copies, self._used = {}, set()

    def _bytes(self, blocks: int) -> int:
        """Of the copies that this pass reads, and of so many blocks more."""
        block = self.cache.store[:, :, 0]
        used = sum(copy.bytes for key, (copy, _) in self._copies.items() if key in self._used)
        return used + blocks * block.numel() * block.element_size()
