"""Shapes, the nearest code, the straight-through gradient, dead codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from calumma.model.config import ImageTokenizerConfig
from calumma.model.tokenizers.image import ImageTokenizer, MissingDecoder
from calumma.model.tokenizers.image_layers import AttentionBlock


def build(multipliers: list[int], resolution: int = 16, codebook_size: int = 20) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(
        ImageTokenizerConfig(
            resolution=resolution,
            codebook_size=codebook_size,
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


def test_dead_codes_do_not_crowd_on_plain_ground() -> None:
    tokenizer = build([1, 2], codebook_size=80)
    images = torch.ones(4, 3, 16, 16)
    images[0] = torch.rand(3, 16, 16) * 2 - 1
    latents_LE = tokenizer.latents(images).flatten(0, 1).detach()
    used = torch.arange(80) < 64
    with torch.no_grad():  # what plain ground becomes, edges and corners too
        tokenizer.codebook.weight[:64] = latents_LE[64:128]
    tokenizer.restart_dead_codes(used, images, torch.Generator().manual_seed(0))
    nearest = torch.cdist(tokenizer.codebook.weight[64:], latents_LE).argmin(1)
    assert (nearest < 64).all()  # three in four latents are of plain ground


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


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    build([1, 2]).save(tmp_path)
    build([1, 2]).config.model_copy(update={"embedding": 7}).save(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)do not fit the configuration.*codebook\.weight"):
        ImageTokenizer.read(tmp_path)


# -- the published shape --


def test_the_published_shape_has_the_published_size() -> None:
    """Counted by hand from VQGAN's layers: a block of c channels has 18 c^2 + 6 c weights, and so on."""

    def block(inputs: int, outputs: int) -> int:
        shortcut = 0 if inputs == outputs else inputs * outputs + outputs
        return 2 * inputs + 9 * inputs * outputs + outputs + 2 * outputs + 9 * outputs**2 + outputs + shortcut

    def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
        return kernel**2 * inputs * outputs + outputs

    middle = 2 * block(512, 512) + 2 * 512 + 4 * conv(512, 512, 1)
    widths = [128, 128, 256, 256, 512]
    down = sum(block(i, o) + block(o, o) for i, o in zip([128, *widths], widths, strict=False))
    encoder = conv(3, 128) + down + sum(conv(c, c) for c in widths[:-1]) + middle + 2 * 512 + conv(512, 256)
    up = sum(block(i, o) + 2 * block(o, o) for i, o in zip([*widths[1:], 512], widths, strict=True))
    decoder = conv(256, 512) + middle + up + sum(conv(c, c) for c in widths[1:]) + 2 * 128 + conv(128, 3)
    with torch.device("meta"):
        published, reading = ImageTokenizer(ImageTokenizerConfig()), ImageTokenizer(ImageTokenizerConfig(decoder=False))
    size = sum(p.numel() for p in published.parameters())
    assert size == encoder + decoder + 2 * conv(256, 256, 1) + 8192 * 256
    assert size - sum(p.numel() for p in reading.parameters()) == decoder
    assert {m.num_groups for m in published.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


@given(
    channels=st.sampled_from([4, 6, 12]),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    decoder_blocks=st.none() | st.integers(1, 2),
    latent_channels=st.none() | st.integers(1, 5),
    attention=st.lists(st.sampled_from([2, 4, 8, 16]), max_size=2),
    middle_attention=st.booleans(),
)
@settings(deadline=None, max_examples=20)
def test_every_shape_codes_and_draws(
    channels: int,
    multipliers: list[int],
    blocks: int,
    decoder_blocks: int | None,
    latent_channels: int | None,
    attention: list[int],
    middle_attention: bool,
) -> None:
    config = ImageTokenizerConfig(
        resolution=8,
        codebook_size=5,
        embedding=3,
        base_channels=channels,
        multipliers=multipliers,
        residual_blocks=blocks,
        decoder_residual_blocks=decoder_blocks,
        latent_channels=latent_channels,
        attention_resolutions=attention,
        middle_attention=middle_attention,
    )
    tokenizer = ImageTokenizer(config)
    found = tokenizer(torch.rand(2, 3, 8, 8) * 2 - 1)
    assert found.x_BCHW.shape == (2, 3, 8, 8)
    assert found.codes_BN.shape == (2, config.codes_per_image)
    (found.x_BCHW.sum() + found.codebook_loss + found.commitment_loss).backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None] == []  # no weight is there for nothing
    attending = sum(isinstance(m, AttentionBlock) for m in tokenizer.modules())
    levels = sum((8 >> i) in attention for i in range(len(multipliers)))
    assert attending == 2 * middle_attention + levels * (blocks + config.decoder_blocks)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"norm_groups 32 must divide the channels of every level, \[48, 96\]"):
        ImageTokenizerConfig(resolution=8, base_channels=48, multipliers=[1, 2], norm_groups=32)


@given(channels=st.integers(1, 600))
def test_a_group_has_four_channels_or_more_where_they_allow(channels: int) -> None:
    groups = ImageTokenizerConfig().groups(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert groups == 1 or channels // groups >= 4
    assert channels % 128 or groups == 32  # the published widths


def test_without_gradients_the_same_comes_out() -> None:
    """Activations work in place there."""
    tokenizer = build([1, 2])
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    kept = images.clone()
    with torch.no_grad():
        quick = tokenizer(images)
    full = tokenizer(images)
    assert torch.equal(images, kept)
    assert torch.equal(quick.codes_BN, full.codes_BN)
    assert torch.allclose(quick.x_BCHW, full.x_BCHW, atol=1e-6)


# -- without a decoder --


def test_a_tokenizer_without_decoder_reads_and_says_why_it_cannot_draw(tmp_path: Path) -> None:
    whole = build([1, 2])
    reading = ImageTokenizer(whole.config.model_copy(update={"decoder": False}))
    reading.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("decoder.")})
    reading.save(tmp_path)
    reading = ImageTokenizer.read(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = reading.encode(images)
    assert torch.equal(codes, whole.encode(images))
    with pytest.raises(MissingDecoder, match=r"has no decoder.*--vqgan"):
        reading.decode(codes)
    with pytest.raises(MissingDecoder, match="cannot draw"):
        reading(images)
