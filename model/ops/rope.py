"""The rotary embedding's table (RoFormer, arXiv 2104.09864), and the ways to stretch it to longer contexts.

The arithmetic of transformers' modeling_rope_utils.py, in float32, so that imported models give the same logits.

Shape suffixes: P pairs of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calumma.model.config import RopeScaling


def rope_table(
    head_size: int,
    length: int,
    theta: float,
    device: torch.device | str | None = None,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """FloatTensor [length, head_size/2, 2]: cosine and sine of position x frequency."""
    frequency_P = theta ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    factor = 1.0
    if scaling is not None:
        frequency_P, factor = _stretched(frequency_P, scaling, theta)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency_P)
    return torch.stack([angle.cos(), angle.sin()], dim=-1) * factor


def _stretched(frequency_P: Tensor, scaling: RopeScaling, theta: float) -> tuple[Tensor, float]:
    """The frequencies, and what queries and keys are multiplied with."""
    slow_P = frequency_P / scaling.factor
    if scaling.kind == "linear":
        return slow_P, 1.0
    assert scaling.original_context is not None  # the configuration has checked it
    if scaling.kind == "llama3":
        turns_P = scaling.original_context * frequency_P / (2 * math.pi)
        band = scaling.high_frequency - scaling.low_frequency
        kept_P = ((turns_P - scaling.low_frequency) / band).clamp(0, 1)
        return torch.lerp(slow_P, frequency_P, kept_P), 1.0
    size = 2 * len(frequency_P)

    def pair(turns: float) -> float:
        """Which pair's wave turns so often within the original context."""
        assert scaling.original_context is not None
        return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp_P = torch.arange(len(frequency_P), device=frequency_P.device, dtype=torch.float32) - low
    stretched_P = (ramp_P / max(high - low, 1e-3)).clamp(0, 1)
    warmth = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return torch.lerp(frequency_P, slow_P, stretched_P), scaling.attention_factor or warmth
