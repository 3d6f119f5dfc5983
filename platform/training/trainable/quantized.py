"""Frozen weights in few bits under trained adapters (QLoRA, arXiv 2305.14314), by torchao.

4 bits are the paper's NormalFloat with its double quantization, in blocks of 64; 8 bits are whole numbers with a scale
for each output channel. A weight is brought back to the input's precision for each product and dropped after it, in the
backward pass once more, so that no pass keeps it. It is no parameter: ZeRO does not divide it, every worker has all.

Shape suffixes: I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calumma.platform.specification import SpecificationError

Bits = Literal[4, 8]
BLOCK = 64  # weights that share a scale in 4 bits (the paper, section 3)
SCALES = 256  # scales that share one of their own, where a matrix has that many


class QuantizedWeight:
    """A matrix in 4 or 8 bits. It stands outside of the module's parameters and buffers, which are cast with it."""

    def __init__(self, bits: Bits, shape: tuple[int, int]) -> None:
        """Raises SpecificationError where the matrix cannot be cut into blocks."""
        self.bits, self.shape = bits, shape
        self._stored: Any = None
        if bits == 4 and math.prod(shape) % BLOCK:
            raise SpecificationError(
                f"lora.quantize: a matrix of {shape[0]} x {shape[1]} is no multiple of {BLOCK} numbers; use 8 bits"
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @torch.no_grad()
    def store(self, weight_OI: Tensor) -> None:
        """Quantize, on the weight's own device."""
        from torchao.quantization import Int8Tensor, PerRow, to_nf4

        if self.bits == 8:
            self._stored = Int8Tensor.from_hp(weight_OI, PerRow())
            return
        scales = math.gcd(self.numel // BLOCK, SCALES)
        self._stored = to_nf4(weight_OI.contiguous(), BLOCK, scales)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """FloatTensor [O, I]."""
        if self.bits == 8:
            return self._stored.dequantize(dtype)
        return self._stored.get_original_weight().to(dtype)

    def bytes(self) -> int:
        """That the stored numbers and their scales take."""
        names = ("qdata", "scale") if self.bits == 8 else ("quantized_data", "quantized_scalers", "quantization_factor")
        return sum(getattr(self._stored, name).nbytes for name in names)


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is quantized and stands still."""

    def __init__(self, plain: nn.Linear, bits: Bits) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("weight", None)
        self.bias = plain.bias
        self.quantized = QuantizedWeight(bits, (plain.out_features, plain.in_features))
        self._product = product_outside_compiler()

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input, self.quantized, self.bias)


def product_outside_compiler() -> Callable[[Tensor, QuantizedWeight, Tensor | None], Tensor]:
    """`product` as torch.compile calls it and does not look into it. Not a decorator: that would import the compiler,
    a second or two, wherever this module is."""
    outside: Callable[[Tensor, QuantizedWeight, Tensor | None], Tensor] = torch.compiler.disable(product)
    return outside


def product(input: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """What a linear layer of this weight gives: FloatTensor [..., I] -> [..., O]."""
    output: Tensor = _Product.apply(input, weight)
    return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    """Keeps the quantized weight for the backward pass, not the one it is brought back to."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(input, weight.dequantized(input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.weight.dequantized(gradient.dtype), None


def weights_of(model: nn.Module) -> dict[str, QuantizedWeight]:
    """All quantized weights of a model, by the names that they have in a plain one."""
    found = {name: getattr(module, "quantized", None) for name, module in model.named_modules()}
    return {f"{name}.weight": weight for name, weight in found.items() if isinstance(weight, QuantizedWeight)}


def dequantized(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The quantized weights whose names begin so, as the model computes with them, in the precision of the rest."""
    dtype = next(model.parameters()).dtype
    return {name: weight.dequantized(dtype) for name, weight in weights_of(model).items() if name.startswith(prefix)}
