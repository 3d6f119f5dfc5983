"""Layers of the image tokenizer against PyTorch's plain functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.tokenizers.image_layers import GroupNorm, Upsample


@given(channels=st.integers(1, 6), height=st.integers(1, 7), width=st.integers(1, 7), batch=st.integers(1, 2))
@settings(deadline=None, max_examples=30)
def test_upsampling_is_nearest_neighbour_then_a_convolution(channels: int, height: int, width: int, batch: int) -> None:
    torch.manual_seed(channels * height)
    layer = Upsample(channels).double()
    x = torch.randn(batch, channels, height, width, dtype=torch.double, requires_grad=True)
    plain = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.allclose(layer(x), plain, atol=1e-12)
    pull = torch.randn_like(plain)
    wanted = (x, layer.conv.weight, layer.conv.bias)
    for fast, slow in zip(
        torch.autograd.grad(layer(x), wanted, pull), torch.autograd.grad(plain, wanted, pull), strict=True
    ):
        assert torch.allclose(fast, slow, atol=1e-10)


@given(offset=st.floats(-1e4, 1e4), spread=st.sampled_from([1e-2, 1.0, 30.0]), last=st.booleans())
@settings(deadline=None, max_examples=40)
def test_normalization_is_accurate_however_large_the_mean(offset: float, spread: float, last: bool) -> None:
    torch.manual_seed(0)
    layer = GroupNorm(2, 8, eps=1e-6)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 8, 9, 7) * spread + offset
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    exact = F.group_norm(x.double(), 2, layer.weight.double(), layer.bias.double(), 1e-6)
    assert (layer(x) - exact).abs().max() < 1e-5 + 1e-6 * abs(offset) / spread
