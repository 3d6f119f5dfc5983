"""Attention of one forward pass over the paged cache, without gradients.

Shape suffixes: T tokens of a pass or of each of B sequences, L keys, M blocks of a sequence, N heads, K key-value
heads, G heads of a key-value head (N/K), H head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.model.generation.cache.contiguous import ContiguousKV
from calumma.model.generation.cache.paged import PagedCache


@dataclass(frozen=True)
class AttentionGroup:
    """B sequences with T tokens each that attend together, the next B*T tokens of a pass.

    tables: LongTensor [B*M], the blocks of each sequence, padded with any; or the slice of the cache's positions they
    are where a single sequence's blocks lie side by side, and nothing needs to be gathered; or what is Kept of them,
    with the tokens' `places` in it.
    bias_B1TL: added to the attention logits, 0 or -inf, L = M * block_size.
    """

    B: int
    T: int
    tables: Tensor | slice | ContiguousKV
    bias_B1TL: Tensor
    places: Tensor | None = None


class PagedAttention:
    """One forward pass over a PagedCache, without gradients: T tokens of any sequences, side by side without padding.

    positions_T: LongTensor [T], each token's position in its sequence; where_T: LongTensor [T], its place in the cache,
    block * block_size + offset; `rows` cover all tokens in order. own_room: gather blocks into memory of this pass, not
    of the cache; a recorded pass has its own.
    """

    def __init__(
        self,
        cache: PagedCache,
        positions_T: Tensor,
        where_T: Tensor,
        rows: list[AttentionGroup],
        own_room: bool = False,
    ) -> None:
        self.cache, self.positions_T, self.where_T, self.rows = cache, positions_T, where_T, rows
        self.own_room = own_room

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Keep the new keys and values; attend to them and to all that their sequences have kept before: [T, N*H]."""
        keys, values = self.cache.by_position[layer]
        keys.index_copy_(0, self.where_T, k_TKH)
        values.index_copy_(0, self.where_T, v_TKH)
        if len(self.rows) == 1:
            return self._attend(layer, self.rows[0], q_TNH, k_TKH, v_TKH)
        outputs, begin = [], 0
        for rows in self.rows:
            end = begin + rows.B * rows.T
            own = slice(begin, end)
            outputs.append(self._attend(layer, rows, q_TNH[own], k_TKH[own], v_TKH[own]))
            begin = end
        return torch.cat(outputs)

    def _attend(self, layer: int, rows: AttentionGroup, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if isinstance(rows.tables, ContiguousKV):
            assert rows.places is not None
            k_BKLH, v_BKLH = rows.tables.read(layer, k_TKH, v_TKH, rows.places, rows.bias_B1TL.shape[-1])
        else:
            k_BKLH, v_BKLH = (each.transpose(1, 2) for each in self._read(layer, rows))
        return _attend_group(q_TNH, k_BKLH, v_BKLH, rows)

    def _read(self, layer: int, rows: AttentionGroup) -> tuple[Tensor, Tensor]:
        """All keys and values of some rows, [B, L, K, H], the pass's own among them."""
        assert not isinstance(rows.tables, ContiguousKV)
        if isinstance(rows.tables, slice):
            keys, values = self.cache.by_position[layer]
            return keys[None, rows.tables], values[None, rows.tables]
        keys, values = self.cache.by_block[layer]
        if self.own_room:
            k, v = keys[rows.tables], values[rows.tables]
        else:
            k, v = self.cache.gathered(rows.tables.shape[0])
            torch.index_select(keys, 0, rows.tables, out=k)
            torch.index_select(values, 0, rows.tables, out=v)
        return k.view(rows.B, -1, *k.shape[2:]), v.view(rows.B, -1, *v.shape[2:])


def _attend_group(q_TNH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, rows: AttentionGroup) -> Tensor:
    """[B*T, N*H]."""
    N, H = q_TNH.shape[1:]
    K, bias = k_BKLH.shape[1], rows.bias_B1TL
    if isinstance(rows.tables, ContiguousKV) and q_TNH.dtype == torch.float32:  # faster than the fused kernel
        q_XGH, k_XLH, v_XLH = q_TNH.reshape(rows.B * K, N // K, H), k_BKLH.flatten(0, 1), v_BKLH.flatten(0, 1)
        bias_X1L = bias.expand(-1, K, -1, -1).flatten(0, 1)
        weights_XGL = torch.baddbmm(bias_X1L, q_XGH, k_XLH.transpose(1, 2), alpha=H**-0.5).softmax(-1)
        return torch.bmm(weights_XGL, v_XLH).view(rows.B, N * H)
    if rows.T == 1:  # the queries that share a key head stand where further tokens would: no key is repeated for them
        q_BKGH = q_TNH.unflatten(1, (K, N // K))
        bias = bias.expand(-1, -1, N // K, -1)
        return F.scaled_dot_product_attention(q_BKGH, k_BKLH, v_BKLH, attn_mask=bias).reshape(rows.B, N * H)
    q_BNTH = q_TNH.unflatten(0, (rows.B, rows.T)).transpose(1, 2)
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BKLH, v_BKLH, attn_mask=bias, enable_gqa=K != N)
    return out_BNTH.transpose(1, 2).reshape(rows.B * rows.T, N * H)
