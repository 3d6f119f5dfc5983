"""Attention of one forward pass over the paged cache, without gradients.

Shape suffixes: T tokens of a pass or of each of B sequences, L keys, M blocks of a sequence, N heads, K key-value
heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calumma.model.generation.cache.contiguous import ContiguousKV
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.passes import backends


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
        groups: list[AttentionGroup],
        own_memory: bool = False,
    ) -> None:
        self.cache, self.positions_T, self.slots_T, self.groups = cache, positions_T, slots_T, groups
        self.own_memory = own_memory

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Write the new keys and values to the cache; attend to them and to all before them: [T, N*H]."""
        keys, values = self.cache.by_position[layer]
        keys.index_copy_(0, self.slots_T, k_TKH)
        values.index_copy_(0, self.slots_T, v_TKH)
        if len(self.groups) == 1:
            return self._attend(layer, self.groups[0], q_TNH, k_TKH, v_TKH)
        outputs, begin = [], 0
        for group in self.groups:
            end = begin + group.B * group.T
            own = slice(begin, end)
            outputs.append(self._attend(layer, group, q_TNH[own], k_TKH[own], v_TKH[own]))
            begin = end
        return torch.cat(outputs)

    def _attend(self, layer: int, group: AttentionGroup, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if isinstance(group.source, ContiguousKV):
            assert group.slots is not None
            k_BKLH, v_BKLH = group.source.read(layer, k_TKH, v_TKH, group.slots, group.bias_B1TL.shape[-1])
            if q_TNH.dtype == torch.float32:
                return backends.attend_by_products(q_TNH, k_BKLH, v_BKLH, group.bias_B1TL)
        else:
            k_BKLH, v_BKLH = (each.transpose(1, 2) for each in self._gather(layer, group.B, group.source))
        return backends.attend_fused(q_TNH, k_BKLH, v_BKLH, group.bias_B1TL)

    def _gather(self, layer: int, B: int, source: Tensor | slice) -> tuple[Tensor, Tensor]:
        """All keys and values of a group, [B, L, K, H], the pass's own among them."""
        if isinstance(source, slice):
            keys, values = self.cache.by_position[layer]
            return keys[None, source], values[None, source]
        keys, values = self.cache.by_block[layer]
        if self.own_memory:
            k, v = keys[source], values[source]
        else:
            k, v = self.cache.gather_buffer(source.shape[0])
            torch.index_select(keys, 0, source, out=k)
            torch.index_select(values, 0, source, out=v)
        return k.view(B, -1, *k.shape[2:]), v.view(B, -1, *v.shape[2:])
