"""Rows of tokens that several processes share: each computes a part of every row's tokens, and in attention a part of
the heads over all of them (DeepSpeed-Ulysses, arXiv 2309.14509).

Shape suffixes: B batch, T tokens of a row, t those of a process's part, N heads, K key-value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from calumma.model.ops import stability
from calumma.model.ops.attention import Mask, attend

# Queries, keys, values, the mask of whole rows and whether to measure -> the result and what is measured.
Attend = Callable[[Tensor, Tensor, Tensor, Mask, bool], tuple[Tensor, Tensor | None]]


class SharedRows(Protocol):
    """This process's part of them."""

    @property
    def number(self) -> int: ...  # of its part, from 0

    @property
    def size(self) -> int: ...  # how many parts there are, all of one length

    def attend(
        self, q_BtNH: Tensor, k_BtKH: Tensor, v_BtKH: Tensor, mask: Mask, measure: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`attend_whole` of all parts together: FloatTensor [B, t, N, H], of this part, and what is measured of this
        process's heads. All processes that share the rows call it; `mask` is of whole rows."""
        ...


def attend_whole(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: Mask, measure: bool
) -> tuple[Tensor, Tensor | None]:
    """FloatTensor [B, T, N, H], attention over whole rows; and `stability.attention` of it where asked for."""
    q_BNTH, k_BKTH, v_BKTH = (x_BTNH.transpose(1, 2) for x_BTNH in (q_BTNH, k_BTKH, v_BTKH))
    measured = stability.attention(q_BNTH, k_BKTH) if measure else None
    return attend(q_BNTH, k_BKTH, v_BKTH, mask).transpose(1, 2), measured


def part_of(values: Tensor, shared: SharedRows | None) -> Tensor:
    """The tokens of this process's part, along the second dimension; all of them where rows are not shared. Raises
    ValueError where they do not divide."""
    if shared is None:
        return values
    T = values.shape[1]
    if T % shared.size:
        raise ValueError(f"rows of {T} tokens cannot be shared by {shared.size} processes")
    return values.narrow(1, shared.number * (T // shared.size), T // shared.size)
