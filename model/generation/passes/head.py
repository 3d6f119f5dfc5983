"""The product that gives logits: for a small model most of what a pass reads and computes.

On a CPU a large one is multiplied as it is stored, by our kernel or PyTorch's, or from a copy as oneDNN reads it from
end to end; which, is measured when an engine starts, for one state, a few and many.

Shape suffixes: R states, D width, C columns of the vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from calumma.model.ops.fused import Operations
from calumma.model.transformer import Output

log = logging.getLogger(__name__)

# Bytes of a head that is worth a copy: the caches hold less, in whatever order it is read; more takes too much memory.
LEAST_BYTES, MOST_BYTES = 1 << 22, 1 << 28
ROWS = (1, 8, 32)  # states with which products are tried; more than 1, and more than 12, are taken to be like the next
TRIES = 3
Product = Literal["native", "packed", "plain"]


class Head:
    """operations: whose products of other matrices are taken; those of a head that is not worth a copy, too."""

    def __init__(self, output: Output, operations: Operations) -> None:
        self.output, self.operations = output, operations
        self._packed: dict[tuple[int, int], Tensor | None] = {}  # by first and last column
        self.choice: tuple[Product, ...] = ("plain", "packed", "packed")
        if operations.native is not None:
            self.choice = ("native", "native", "native")
            if operations.measures and self._worth(output.weight):
                self._measure()

    def logits(self, x_RD: Tensor, columns: slice) -> Tensor:
        """FloatTensor [R, C], the caller's own to change."""
        weight_CD, native = self.output.weight.detach()[columns], self.operations.native
        plain = type(self.output) is Output and weight_CD.dtype == x_RD.dtype
        worth = plain and self._worth(weight_CD)
        choice = self.choice[0 if len(x_RD) == 1 else 1 if len(x_RD) <= 12 else 2]
        if worth and choice == "packed" and (packed := self._pack(columns)) is not None:
            return self._by_packed(x_RD, packed).float()
        ours = choice == "native" if worth else len(x_RD) in self.operations.native_rows
        if plain and native is not None and ours and native.multiplies(weight_CD):
            return native.product(x_RD, weight_CD).float()
        logits_RC: Tensor = self.output(x_RD, columns=columns)
        return logits_RC

    def _measure(self) -> None:
        """Take the fastest for each of ROWS; a copy that no product is taken from is given up."""
        weight_CD, native = self.output.weight.detach(), self.operations.native
        columns, products = slice(0, len(weight_CD)), dict[Product, Callable[[Tensor], Tensor]]()
        assert native is not None
        if native.multiplies(weight_CD):
            products["native"] = lambda x_RD: native.product(x_RD, weight_CD)
        if (packed := self._pack(columns)) is not None:
            products["packed"] = lambda x_RD: self._by_packed(x_RD, packed)
        products["plain"] = lambda x_RD: self.output(x_RD, columns=columns)
        found: list[Product] = []
        for rows in ROWS:
            x_RD = weight_CD.new_zeros(rows, weight_CD.shape[1])
            seconds = {name: _seconds(product, x_RD) for name, product in products.items()}
            found.append(min(seconds, key=lambda name: seconds[name]))
            told = ", ".join(f"{name} {1e6 * each:.0f} µs" for name, each in seconds.items())
            log.debug("logits of %d states: %s", rows, told)
        self.choice = tuple(found)
        if "packed" not in found:
            self._packed.clear()

    @staticmethod
    def _worth(weight_CD: Tensor) -> bool:
        return (
            weight_CD.device.type == "cpu" and LEAST_BYTES <= weight_CD.numel() * weight_CD.element_size() <= MOST_BYTES
        )

    def _pack(self, columns: slice) -> Tensor | None:
        """A copy of some columns, which is kept; None where oneDNN has no such products."""
        key = (columns.start, columns.stop)
        if key not in self._packed:
            weight_CD = self.output.weight.detach()[columns]
            takes = _onednn_takes(weight_CD.dtype)
            self._packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight_CD) if takes else None
        return self._packed[key]

    @staticmethod
    def _by_packed(x_RD: Tensor, packed: Tensor) -> Tensor:
        logits_RC: Tensor = torch.ops.mkldnn._linear_pointwise(x_RD, packed, None, "none", [], "")
        return logits_RC


def _seconds(product: Callable[[Tensor], Tensor], x_RD: Tensor) -> float:
    """Of the fastest of some, after a first."""
    product(x_RD)
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        product(x_RD)
        best = min(best, time.perf_counter() - began)
    return best


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies such matrices."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
