"""Attention by page with packages for GPUs, which need not be there (the extra `gpu`): FlashInfer and flash-attention.
Both take any number of tokens of any sequences side by side, without padding or mask, and heads that share a key head.

FlashInfer: https://docs.flashinfer.ai/api/attention.html, `BatchPrefillWithPagedKVCacheWrapper`; flash-attention:
https://github.com/Dao-AILab/flash-attention, `flash_attn_varlen_func` with a `block_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from calumma.model.generation.cache.paged import PagedCache

WORKSPACE_BYTES = 128 << 20  # as FlashInfer's documentation advises
FLASH_PAGE = 256  # flash-attention 2 reads pages of a multiple of so many positions


def installed(name: str) -> bool:
    return find_spec(name) is not None


class FlashInferReader:
    """heads: of queries. The plan of a pass is made once for all layers."""

    most_tokens = 1 << 30

    def __init__(self, heads: int, device: torch.device) -> None:
        self.heads = heads
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrapper: Any = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def prepare(
        self, cache: PagedCache, tables: Sequence[Sequence[int]], counts: Sequence[int], lengths: Sequence[int]
    ) -> Callable[[int, Tensor], Tensor]:
        page, (K, H) = cache.block_size, cache.store.shape[4:]
        pages = [table[: -(-length // page)] for table, length in zip(tables, lengths, strict=True)]
        given = (
            [0, *accumulate(counts)],
            [0, *accumulate(map(len, pages))],
            [block for own in pages for block in own],
            [(length - 1) % page + 1 for length in lengths],
        )
        self.wrapper.plan(
            *(torch.tensor(each, dtype=torch.int32).to(cache.store.device, non_blocking=True) for each in given),
            self.heads, K, H, page, causal=True, q_data_type=cache.store.dtype, kv_data_type=cache.store.dtype,
        )  # fmt: skip
        return lambda layer, q_TNH: self.wrapper.run(q_TNH.contiguous(), cache.by_block[layer]).flatten(1)


class FlashAttentionReader:
    most_tokens = 1 << 30

    def __init__(self) -> None:
        self.attend: Any = import_module("flash_attn").flash_attn_varlen_func

    def prepare(
        self, cache: PagedCache, tables: Sequence[Sequence[int]], counts: Sequence[int], lengths: Sequence[int]
    ) -> Callable[[int, Tensor], Tensor]:
        device = cache.store.device
        pages = [list(table[: -(-length // cache.block_size)]) for table, length in zip(tables, lengths, strict=True)]
        most = max(map(len, pages))
        longest = max(lengths)
        given = ([0, *accumulate(counts)], [0, *accumulate(lengths)], [own + [0] * (most - len(own)) for own in pages])
        queries_T, keys_T, table_BM = (
            torch.tensor(each, dtype=torch.int32).to(device, non_blocking=True) for each in given
        )
        return self._reads(cache, queries_T, keys_T, max(counts), longest, table_BM)

    def prepare_fixed(
        self, cache: PagedCache, tables_BM: Tensor, positions_B: Tensor
    ) -> Callable[[int, Tensor], Tensor]:
        B, M = tables_BM.shape
        queries = torch.arange(B + 1, dtype=torch.int32, device=tables_BM.device)
        keys = torch.nn.functional.pad((positions_B + 1).cumsum(0), (1, 0)).to(torch.int32)
        return self._reads(cache, queries, keys, 1, M * cache.block_size, tables_BM.to(torch.int32))

    def _reads(
        self, cache: PagedCache, queries: Tensor, keys: Tensor, most: int, longest: int, table_BM: Tensor
    ) -> Callable[[int, Tensor], Tensor]:
        """queries, keys: where each sequence's begin, and the last's end."""

        def attends(layer: int, q_TNH: Tensor) -> Tensor:
            out_TNH: Tensor = self.attend(
                q_TNH.contiguous(), *cache.by_block[layer], queries, keys, most, longest, causal=True,
                block_table=table_BM,
            )  # fmt: skip
            return out_TNH.flatten(1)

        return attends
