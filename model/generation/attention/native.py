"""Attention of a few tokens a sequence on a CPU, which reads pages where they are; pages that several sequences share
are read once (ops/native/kernels.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from calumma.model.generation.cache.paged import PagedCache
from calumma.model.ops.native import NativeKernels

MOST_TOKENS = 32  # of more in a sequence, products of matrices are faster


class NativeReader:
    def __init__(self, kernels: NativeKernels, most_tokens: int = MOST_TOKENS) -> None:
        self.kernels, self.most_tokens = kernels, most_tokens

    def prepare(
        self, cache: PagedCache, tables: Sequence[Sequence[int]], counts: Sequence[int], lengths: Sequence[int]
    ) -> Callable[[int, Tensor], Tensor]:
        plan = self.kernels.plan(tables, counts, lengths, cache.block_size)
        return lambda layer, q_TNH: self.kernels.attend(plan, q_TNH, *cache.by_block[layer])
