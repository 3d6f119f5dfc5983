"""Attention by page with FlexAttention (arXiv 2412.05496): the block mask of a sequence lists its pages in the cache,
so that no other is visited, and positions are found by the page. Compiled on GPUs; on CPUs as its own reference, where
the indirection can be tried.

Shape suffixes: B sequences, T tokens of the longest, padded; M pages of the longest, P pages of the cache, N heads, K
key-value heads, H head size, S positions of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from calumma.model.generation.cache.paged import PagedCache

QUERIES = 128  # rows of a block of the mask


class FlexReader:
    most_tokens = 1 << 30

    def prepare(
        self, cache: PagedCache, tables: Sequence[Sequence[int]], counts: Sequence[int], lengths: Sequence[int]
    ) -> Callable[[int, Tensor], Tensor]:
        device, page, T = cache.store.device, cache.block_size, max(counts)
        pages = [list(table[: -(-length // page)]) for table, length in zip(tables, lengths, strict=True)]
        M, rows = max(map(len, pages)), -(-T // QUERIES)
        padded = torch.tensor([own + own[-1:] * (M - len(own)) for own in pages])
        order_BP = torch.full(
            (len(pages), cache.blocks), M
        )  # of a page in its sequence; beyond all where it has it not
        for row, own in enumerate(pages):
            order_BP[row, own] = torch.arange(len(own))
        used_B = torch.tensor([len(own) for own in pages])
        begin_B = torch.tensor([length - count for length, count in zip(lengths, counts, strict=True)])
        order_BP, begin_B = (each.to(device, non_blocking=True) for each in (order_BP, begin_B))
        mask = BlockMask.from_kv_blocks(
            used_B[:, None, None].expand(-1, 1, rows).to(device, torch.int32),
            padded[:, None, None].expand(-1, 1, rows, -1).contiguous().to(device, torch.int32),
            BLOCK_SIZE=(QUERIES, page),
            mask_mod=_sees(order_BP, begin_B, page),
            seq_lengths=(T, cache.blocks * page),
            compute_q_blocks=False,  # of the backward pass
        )
        token_of = [row * T + token for row, count in enumerate(counts) for token in range(count)]
        places_T = torch.tensor(token_of).to(device, non_blocking=True)
        return lambda layer, q_TNH: _attend(cache, layer, q_TNH, places_T, len(pages), T, mask)

    def prepare_fixed(
        self, cache: PagedCache, tables_BM: Tensor, positions_B: Tensor
    ) -> Callable[[int, Tensor], Tensor]:
        (B, M), page = tables_BM.shape, cache.block_size
        used_B = positions_B // page + 1
        numbers_M = torch.arange(M, device=tables_BM.device)
        # what follows a sequence's blocks is written to a column of its own
        columns_BM = torch.where(numbers_M < used_B[:, None], tables_BM, cache.blocks)
        order_BP = torch.full((B, cache.blocks + 1), M, device=tables_BM.device)
        order_BP = order_BP.scatter(1, columns_BM, numbers_M.expand(B, -1))
        mask = BlockMask.from_kv_blocks(
            used_B[:, None, None].to(torch.int32),
            tables_BM[:, None, None].to(torch.int32),
            BLOCK_SIZE=(QUERIES, page),
            mask_mod=_sees(order_BP, positions_B, page),
            seq_lengths=(1, cache.blocks * page),
            compute_q_blocks=False,
        )
        places_B = torch.arange(B, device=tables_BM.device)
        return lambda layer, q_BNH: _attend(cache, layer, q_BNH, places_B, B, 1, mask)


def _sees(order_BP: Tensor, begin_B: Tensor, page: int) -> Callable[..., Tensor]:
    """Whether a query sees a place of the cache: its sequence has that page, and the position is not after its own."""

    def sees(b: Tensor, h: Tensor, query: Tensor, place: Tensor) -> Tensor:
        return order_BP[b, place // page] * page + place % page <= begin_B[b] + query

    return sees


def _attend(cache: PagedCache, layer: int, q_TNH: Tensor, places_T: Tensor, B: int, T: int, mask: BlockMask) -> Tensor:
    N, H = q_TNH.shape[1:]
    q_BNTH = q_TNH.new_zeros(B * T, N, H).index_copy_(0, places_T, q_TNH).view(B, T, N, H).transpose(1, 2)
    k_BKSH, v_BKSH = (each.transpose(0, 1)[None].expand(B, -1, -1, -1) for each in cache.by_position[layer])
    flex = _compiled() if q_TNH.is_cuda else flex_attention
    out_BNTH = flex(q_BNTH, k_BKSH, v_BKSH, block_mask=mask, enable_gqa=N != k_BKSH.shape[1])
    return out_BNTH.transpose(1, 2).reshape(B * T, N * H).index_select(0, places_T)


@once
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
