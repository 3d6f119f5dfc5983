"""Attention of one forward pass over the paged cache, without gradients: new keys and values are in their pages
already, and every part of a pass reads them its own way.

Shape suffixes: T tokens of a pass or of each of B sequences, L keys, M blocks of a sequence, N heads, K key-value
heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from calumma.model.generation.attention import dense
from calumma.model.generation.cache.contiguous import ContiguousKV
from calumma.model.generation.cache.paged import PagedCache


class PageReader(Protocol):
    """A kernel that reads pages where they are. `most_tokens`: of a sequence in one pass, that it is good for."""

    most_tokens: int

    def prepare(
        self, cache: PagedCache, tables: Sequence[Sequence[int]], counts: Sequence[int], lengths: Sequence[int]
    ) -> Callable[[int, Tensor], Tensor]:
        """Of sequences with these block tables, whose last `counts` tokens of `lengths` are in the pass: what attends
        in a layer, its number and queries [T, N, H] -> [T, N*H]."""
        ...


@runtime_checkable
class RecordableReader(PageReader, Protocol):
    """One whose kernels can be recorded as a CUDA graph: nothing of them depends on values on the host."""

    def prepare_fixed(
        self, cache: PagedCache, tables_BM: Tensor, positions_B: Tensor
    ) -> Callable[[int, Tensor], Tensor]:
        """Of B sequences with a token each, at these positions; what follows a sequence's blocks in its table is of
        none, or of no use."""
        ...


@dataclass(frozen=True)
class PageGroup:
    """The next `tokens` of a pass, attended to by a PageReader."""

    tokens: int
    reads: Callable[[int, Tensor], Tensor]

    def attend(self, cache: PagedCache, layer: int, q_TNH: Tensor, slots_T: Tensor, own_memory: bool) -> Tensor:
        return self.reads(layer, q_TNH)


@dataclass(frozen=True)
class CausalGroup:
    """The last `tokens` of a single sequence of `length`, on a CPU, without a mask of their size. source: its blocks,
    LongTensor [M]; or where they lie side by side the cache's positions."""

    tokens: int
    length: int
    source: Tensor | slice

    def attend(self, cache: PagedCache, layer: int, q_TNH: Tensor, slots_T: Tensor, own_memory: bool) -> Tensor:
        k_1LKH, v_1LKH = _gather(cache, layer, 1, self.source, own_memory)
        return dense.attend_causal(q_TNH, k_1LKH[0, : self.length], v_1LKH[0, : self.length])


@dataclass(frozen=True)
class AttentionGroup:
    """B sequences with T tokens each that attend together, the next B*T tokens of a pass.

    source: where their keys and values are. LongTensor [B*M]: the block table of each sequence, padded with any; slice
    of the cache's positions: a single sequence whose blocks lie side by side, so that nothing needs to be gathered;
    ContiguousKV: their contiguous copy, with the tokens' `slots` in it.
    bias_B1TL: added to the attention logits, 0 or -inf, L = M * block_size.
    """

    B: int
    T: int
    source: Tensor | slice | ContiguousKV
    bias_B1TL: Tensor
    slots: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.B * self.T

    def attend(self, cache: PagedCache, layer: int, q_TNH: Tensor, slots_T: Tensor, own_memory: bool) -> Tensor:
        if isinstance(self.source, ContiguousKV):
            assert self.slots is not None
            k_BKH, v_BKH = (each.index_select(0, slots_T) for each in cache.by_position[layer])
            k_BKLH, v_BKLH = self.source.read(layer, k_BKH, v_BKH, self.slots, self.bias_B1TL.shape[-1])
            if q_TNH.dtype == torch.float32:
                return dense.attend_by_products(q_TNH, k_BKLH, v_BKLH, self.bias_B1TL)
        else:
            found = _gather(cache, layer, self.B, self.source, own_memory)
            k_BKLH, v_BKLH = (each.transpose(1, 2) for each in found)
        return dense.attend_fused(q_TNH, k_BKLH, v_BKLH, self.bias_B1TL)


class PagedAttention:
    """One forward pass over a PagedCache: T tokens of any sequences, side by side without padding.

    positions_T: LongTensor [T], each token's position in its sequence; slots_T: LongTensor [T], its place in the cache,
    block * block_size + offset (vLLM's slot mapping); `groups` cover all tokens in order. own_memory: gather blocks
    into memory of this pass, not of the cache; a recorded pass has its own.
    """

    def __init__(
        self,
        cache: PagedCache,
        positions_T: Tensor,
        slots_T: Tensor,
        groups: Sequence[AttentionGroup | CausalGroup | PageGroup],
        own_memory: bool = False,
    ) -> None:
        self.cache, self.positions_T, self.slots_T, self.groups = cache, positions_T, slots_T, groups
        self.own_memory = own_memory

    def attend(self, layer: int, q_TNH: Tensor) -> Tensor:
        """Attend to a sequence's keys and values up to each token's own, which the cache has: [T, N*H]."""
        if len(self.groups) == 1:
            return self.groups[0].attend(self.cache, layer, q_TNH, self.slots_T, self.own_memory)
        outputs, begin = [], 0
        for group in self.groups:
            own = slice(begin, begin + group.tokens)
            outputs.append(group.attend(self.cache, layer, q_TNH[own], self.slots_T[own], self.own_memory))
            begin += group.tokens
        return torch.cat(outputs)


def _gather(cache: PagedCache, layer: int, B: int, source: Tensor | slice, own_memory: bool) -> tuple[Tensor, Tensor]:
    """All keys and values of a group, [B, L, K, H], the pass's own among them."""
    if isinstance(source, slice):
        keys, values = cache.by_position[layer]
        return keys[None, source], values[None, source]
    keys, values = cache.by_block[layer]
    if own_memory:
        k, v = keys[source], values[source]
    else:
        k, v = cache.gather_buffer(source.shape[0])
        torch.index_select(keys, 0, source, out=k)
        torch.index_select(values, 0, source, out=v)
    return k.view(B, -1, *k.shape[2:]), v.view(B, -1, *v.shape[2:])
