"""Shapes, the nearest code, the straight-through gradient, dead codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from calumma.model.config import ImageTokenizerConfig
from calumma.model.image_tokenizer import ImageTokenizer, preprocess, to_image


def build(multipliers: list[int], resolution: int = 16) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(
        ImageTokenizerConfig(
            resolution=resolution,
            codebook_size=20,
            embedding=6,
            base_channels=8,
            multipliers=multipliers,
            residual_blocks=1,
        )
    )


@given(multipliers=st.lists(st.integers(1, 2), min_size=1, max_size=4), batch=st.integers(1, 3))
@settings(deadline=None, max_examples=10)
def test_shapes(multipliers: list[int], batch: int) -> None:
    tokenizer = build(multipliers)
    codes = tokenizer.encode(torch.rand(batch, 3, 16, 16) * 2 - 1)
    side = 16 // 2 ** (len(multipliers) - 1)
    assert codes.shape == (batch, side * side)
    assert codes.dtype == torch.long
    assert tokenizer.decode(codes).shape == (batch, 3, 16, 16)


def test_the_published_shape() -> None:
    config = ImageTokenizerConfig()
    assert (config.codes_per_image, config.downsampling, config.codebook_size) == (1024, 16, 8192)


def test_codes_are_the_nearest_entries() -> None:
    tokenizer = build([1, 2])
    latents = torch.randn(2, 5, 6)
    distance = torch.cdist(latents, tokenizer.codebook.weight[None])
    assert torch.equal(tokenizer.nearest(latents), distance.argmin(-1))


def test_the_reconstruction_loss_reaches_the_encoder() -> None:
    tokenizer = build([1, 2])
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    (tokenizer(images).x_BCHW - images).square().mean().backward()
    first = next(tokenizer.encoder.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert tokenizer.codebook.weight.grad is None  # learned by its own loss alone


def test_dead_codes_move_onto_latents_and_live_ones_stay() -> None:
    tokenizer = build([1, 2])
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    used = torch.zeros(20, dtype=torch.bool)
    used[:5] = True
    before = tokenizer.codebook.weight.detach().clone()
    assert tokenizer.restart_dead_codes(used, images, torch.Generator().manual_seed(0)) == 15
    after = tokenizer.codebook.weight
    assert torch.equal(after[:5], before[:5])
    latents = tokenizer.latents(images).flatten(0, 1)
    moved = (after[5:, None] - latents[None]).abs().amax(-1)  # one latent each, to rounding
    assert moved.min(1).values.max() < 1e-5


def test_wrong_sizes_are_refused() -> None:
    tokenizer = build([1, 2])
    with pytest.raises(ValueError, match="images must be"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="an image has 64 codes, found 3"):
        tokenizer.decode(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValidationError, match="must be a multiple of 8"):
        ImageTokenizerConfig(resolution=20, multipliers=[1, 1, 1, 1])


def test_saved_and_read_codes_are_the_same(tmp_path: Path) -> None:
    tokenizer = build([1, 2])
    tokenizer.save(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(ImageTokenizer.read(tmp_path).encode(images), tokenizer.eval().encode(images))


def test_pixels_round_trip() -> None:
    pixels = torch.randint(0, 256, (3, 16, 16)).float() / 127.5 - 1
    assert torch.allclose(preprocess(to_image(pixels), 16), pixels, atol=1e-6)
