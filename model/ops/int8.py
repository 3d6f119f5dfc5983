"""Matrices in 8 bits, for inference: whole numbers and a scale for every output channel, symmetric around 0; what they
are multiplied with stays as it is.

Shape suffixes: O outputs, I inputs, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127
# PyTorch's product of bfloat16 and int8 on CPUs, which makes no copy: it reads so many inputs at a time, and beyond
# its bounds where they do not divide; of more rows a copy's product is faster (4096 x 4096 on a core of an AMD EPYC:
# one row 1.3 ms, where bfloat16 matrices take 3.4; 128 rows 74 ms, where they take 21).
PACKED_INPUTS = 32
PACKED_ROWS = 16


class Int8Matrix(NamedTuple):
    """Int8Tensor [O, I], FloatTensor [O]: a weight is their product."""

    values_OI: Tensor
    scale_O: Tensor


Matrix = Tensor | Int8Matrix


def quantize(weight_OI: Tensor) -> Int8Matrix:
    """The nearest. A channel of zeros stays one."""
    scale_O = weight_OI.abs().amax(1).float() / LARGEST
    divisor_O1 = torch.where(scale_O > 0, scale_O, 1.0)[:, None]
    return Int8Matrix((weight_OI / divisor_O1).round_().to(torch.int8), scale_O)


def linear(x_RI: Tensor, weight: Matrix) -> Tensor:
    """FloatTensor [..., I] -> [..., O], in the dtype of x; with an Int8Matrix fastest in bfloat16."""
    if isinstance(weight, Tensor):
        return F.linear(x_RI, weight)
    values_OI, scale_O = weight
    if x_RI.device.type == "cpu" and x_RI.dtype == torch.bfloat16 and values_OI.shape[1] % PACKED_INPUTS == 0:
        flat_RI = x_RI.reshape(-1, x_RI.shape[-1])
        if len(flat_RI) <= PACKED_ROWS:
            out_RO = torch._weight_int8pack_mm(flat_RI, values_OI, scale_O.to(x_RI.dtype))
            return out_RO.view(*x_RI.shape[:-1], len(values_OI))
    # a copy of one matrix at a time: it is memory that is saved
    return (F.linear(x_RI, values_OI.to(x_RI.dtype)) * scale_O).to(x_RI.dtype)


def beside(weights: Iterable[Int8Matrix]) -> Int8Matrix:
    """One matrix with the outputs of all."""
    values, scales = zip(*weights, strict=True)
    return Int8Matrix(torch.cat(values), torch.cat(scales))


class Int8Linear(nn.Module):
    """A linear layer whose weight is an Int8Matrix, and its bias, if any, none; it cannot be trained."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    def forward(self, x_RI: Tensor) -> Tensor:
        out_RO = linear(x_RI, Int8Matrix(self.weight, self.scale))
        return out_RO if self.bias is None else out_RO + self.bias
