"""What a layer computes besides attention, in as few kernels as its device allows: our own on CPUs (ops/native), those
that torch.compile makes of these functions on GPUs; and plain PyTorch anywhere.

Shape suffixes: T tokens, N heads, K key-value heads, Q both, H head size, P pairs of a head (H/2), S slots of the
cache, L positions, D width, F feed-forward width, X outputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.model.ops import int8
from calumma.model.ops.int8 import Matrix
from calumma.model.ops.native import MOST_SIZE, VECTOR, NativeKernels

log = logging.getLogger(__name__)

MEASURED = 1 << 18  # numbers of a weight, fewer of which are not measured with
ROWS = (1, 16, 256)  # of which products are tried
MOST_ROWS = 1 << 30
AS_FAST = 1.1  # ours may take so much longer: what is measured once is not exact
Kernels = Literal["auto", "native", "torch"]
Norm = tuple[Tensor, Tensor | None] | None  # weight and bias [Q, H]: LayerNorm; without a bias RMSNorm; none


def add_norm(x_TD: Tensor, more_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with `more`, and RMSNorm of that."""
    if more_TD is not None:
        x_TD = x_TD + more_TD
    return x_TD, F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def gate(both_TX: Tensor) -> Tensor:
    """silu of the first half times the second, [T, 2F] -> [T, F]."""
    gate_TF, up_TF = both_TX.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def norm_rotate(
    projected_TX: Tensor,
    norm: Norm,
    eps: float,
    rope_LP2: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys_SKH: Tensor,
    values_SKH: Tensor,
    heads: int,
) -> Tensor:
    """The queries [T, N, H] of a projection with queries, keys and values side by side, normalized and turned; keys,
    too, and values go to their slots of the cache."""
    K, H = keys_SKH.shape[1:]
    both_TQH, v_TKH = projected_TX.view(len(projected_TX), -1, H).split([heads + K, K], dim=1)
    if norm is not None:
        weight_QH, bias_QH = norm
        if bias_QH is None:
            both_TQH = F.rms_norm(both_TQH, (H,), eps=eps) * weight_QH
        else:
            both_TQH = torch.addcmul(bias_QH, F.layer_norm(both_TQH, (H,), eps=1e-5), weight_QH)
    rope_T1P2, pairs = rope_LP2[positions_T][:, None], both_TQH.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        cos, sin, even, odd = rope_T1P2[..., 0], rope_T1P2[..., 1], pairs[..., 0], pairs[..., 1]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope_T1P2))
    both_TQH = turned.flatten(-2).to(projected_TX.dtype)
    keys_SKH.index_copy_(0, slots_T, both_TQH[:, heads:])
    values_SKH.index_copy_(0, slots_T, v_TKH)
    return both_TQH[:, :heads]


def _seconds(product: Callable[[Tensor, Tensor], Tensor], x_RI: Tensor, weights: Sequence[Tensor]) -> float:
    """Of the fastest of three rounds over the weights, that the caches do not hold them all."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for weight_OI in weights:
            product(x_RI, weight_OI)
        best = min(best, time.perf_counter() - began)
    return best


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel or two of a function, for any number of tokens."""
    return torch.compile(function, dynamic=True, fullgraph=True)


class Operations:
    """Of a decoder whose tensors are like `sample`; its sizes are multiples of `multiple`, its heads of `head_size`.

    kernels: `native` and `torch` are ours and PyTorch's alone; `auto` takes ours, and products by whose are faster here
    (see `measured`). With `native` the bits of a request's answer do not depend on its company where prompts are taken
    in whole.
    """

    def __init__(self, sample: Tensor, multiple: int, head_size: int, eps: float, kernels: Kernels = "auto") -> None:
        fits = kernels != "torch" and not multiple % VECTOR and head_size <= MOST_SIZE
        self.native = NativeKernels.of(sample) if fits else None
        if kernels == "native" and self.native is None:
            raise ValueError(
                "kernels: native needs a CPU, a C++ compiler, float32 or bfloat16, and sizes that are multiples of "
                f"{VECTOR}; leave it at auto"
            )
        self.eps, self._compiles = eps, sample.is_cuda
        self.native_rows = range(1, 1 if self.native is None else MOST_ROWS)  # products of so many rows are ours
        self.measures = kernels == "auto" and self.native is not None

    def measure(self, weights: Sequence[Tensor]) -> None:
        """Try products with some weights of one shape, ours and PyTorch's, with more and more rows: ours are taken as
        long as they are as fast, from one row on or from two. Small ones are ours, whose calls cost less."""
        if not (self.measures and self.native is not None and weights[0].numel() >= MEASURED):
            return
        for rows in ROWS:
            x_RI = weights[0].new_zeros(rows, weights[0].shape[1])
            ours, theirs = (_seconds(each, x_RI, weights) for each in (self.native.product, F.linear))
            log.debug("products of %d rows: %.0f µs, PyTorch's %.0f", rows, 1e6 * ours, 1e6 * theirs)
            if ours > AS_FAST * theirs:
                if rows > 1:
                    self.native_rows = range(self.native_rows.start, rows // 4)
                    break
                self.native_rows = range(2, MOST_ROWS)

    def add_norm(self, x_TD: Tensor, more_TD: Tensor | None, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        """x with `more`, perhaps in x's place, and RMSNorm of that."""
        if self.native is not None:
            return x_TD, self.native.add_norm(x_TD, more_TD, weight_D, self.eps)
        found: tuple[Tensor, Tensor] = self._of(add_norm)(x_TD, more_TD, weight_D, self.eps)
        return found

    def norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, self.eps)

    def gate(self, both_TX: Tensor) -> Tensor:
        if self.native is not None:
            return self.native.gate(both_TX)
        found: Tensor = self._of(gate)(both_TX)
        return found

    def norm_rotate(self, projected_TX: Tensor, norm: Norm, *given: Any) -> Tensor:
        """See the function of this name."""
        if self.native is not None:
            eps = self.eps if norm is None or norm[1] is None else 1e-5
            return self.native.norm_rotate(projected_TX, norm, eps, *given)
        found: Tensor = self._of(norm_rotate)(projected_TX, norm, self.eps, *given)
        return found

    def product(self, x_TX: Tensor, weight: Matrix) -> Tensor:
        """x @ weight.T."""
        if (
            self.native is not None
            and x_TX.shape[0] in self.native_rows
            and isinstance(weight, Tensor)
            and self.native.multiplies(weight)
        ):
            return self.native.product(x_TX, weight)
        return int8.linear(x_TX, weight)

    def _of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function) if self._compiles else function
