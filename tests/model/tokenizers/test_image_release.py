"""Against transformers' ChameleonVQVAE, with weights that it makes: the same names, latents and codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.config import ImageTokenizerConfig
from calumma.model.convert.image_tokenizer import HUGGING_FACE_PREFIX, hugging_face_names, meta_names
from calumma.model.tokenizers.image import ImageTokenizer

pytest.importorskip("transformers")

SMALL: dict[str, Any] = dict(
    resolution=32,
    num_embeddings=512,
    embed_dim=24,
    latent_channels=40,
    base_channels=32,
    channel_multiplier=[1, 2, 2],
    num_res_blocks=1,
)


def make(seed: int = 0, scale: float = 1.0, **settings: Any) -> tuple[Any, ImageTokenizer]:
    """Theirs with random weights, and ours with the same."""
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    torch.manual_seed(seed)
    shape = {**SMALL, **settings}
    theirs = ChameleonVQVAE(ChameleonVQVAEConfig(**shape)).eval()
    with torch.no_grad():
        for (
            weight
        ) in theirs.parameters():  # transformers begins with zero biases and unit norms, which would hide errors
            weight.add_(torch.randn_like(weight) * 0.02 * scale)
    attends = shape.get("attn_type", "vanilla") == "vanilla"
    config = ImageTokenizerConfig(
        resolution=shape["resolution"],
        codebook_size=shape["num_embeddings"],
        embedding=shape["embed_dim"],
        latent_channels=shape["latent_channels"],
        base_channels=shape["base_channels"],
        multipliers=shape["channel_multiplier"],
        residual_blocks=shape["num_res_blocks"],
        attention_resolutions=(shape.get("attn_resolutions") or []) if attends else [],
        middle_attention=attends,
        norm_groups=32,
        decoder=False,
    )
    ours = ImageTokenizer(config).eval()
    weights = {HUGGING_FACE_PREFIX + name: weight for name, weight in theirs.state_dict().items()}
    names = hugging_face_names(config)
    assert sorted(names.values()) == sorted(weights)  # one to one
    ours.load_state_dict({name: weights[other] for name, other in names.items()})
    return theirs, ours


def latents_of(theirs: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Their latents [B, N, E] and codes [B, N]."""
    with torch.inference_mode():
        found = theirs.encode(images)
        latents = theirs.quant_conv(found.last_hidden_state).flatten(2).transpose(1, 2)
    return latents, found.image_tokens.view(len(images), -1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_res_blocks": 2, "channel_multiplier": [1, 1, 2, 2, 4]},
        {"attn_resolutions": [16, 8]},
        {"attn_type": "none", "attn_resolutions": [16]},
        {"base_channels": 64, "embed_dim": 256, "latent_channels": 256, "num_embeddings": 8192},
        {"channel_multiplier": [2], "resolution": 8},
    ],
    ids=["small", "published depths", "attention", "no attention", "published codebook", "one level"],
)
def test_codes_are_those_of_transformers(settings: dict[str, Any]) -> None:
    theirs, ours = (one.double() for one in make(**settings))  # in float32 two codes may lie equally near
    images = torch.rand(2, 3, ours.config.resolution, ours.config.resolution, dtype=torch.float64) * 2 - 1
    _, expected = latents_of(theirs, images)
    assert torch.equal(ours.encode(images), expected)
    assert len(expected.unique()) > 1


@given(seed=st.integers(0, 2**16), batch=st.integers(1, 3), kind=st.sampled_from(["noise", "flat", "ramp"]))
@settings(deadline=None, max_examples=10)
def test_latents_and_codes_are_the_same_for_any_weights_and_images(seed: int, batch: int, kind: str) -> None:
    theirs, ours = make(seed)
    images = torch.rand(batch, 3, 32, 32) * 2 - 1
    if kind == "flat":
        images = images[:, :, :1, :1].expand(-1, -1, 32, 32).clone()
    if kind == "ramp":
        images = (images[:, :, :1, :1] * torch.linspace(-1, 1, 32)).expand(-1, -1, 32, 32).clone()
    latents, expected = latents_of(theirs, images)
    with torch.inference_mode():
        assert (ours.latents(images) - latents).abs().max() < 1e-4 * latents.abs().max()
    codes = ours.encode(images)
    # Two codes may lie equally near to a latent within float32; anywhere else they are the same.
    distance = torch.cdist(latents.double(), ours.codebook.weight.detach().double()[None])
    of_ours, of_theirs = (distance.gather(2, found[..., None]) for found in (codes, expected))
    assert ((of_ours - of_theirs).abs() < 1e-4 * of_theirs).all()


def test_the_release_names_of_every_weight() -> None:
    config = ImageTokenizerConfig()
    names = meta_names(config)
    with torch.device("meta"):
        assert set(names) == set(ImageTokenizer(config).state_dict())
    assert len(set(names.values())) == len(names)
    sample = {
        "quantize.embedding.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
        "encoder.conv_in.weight",
        "encoder.down.0.block.1.conv2.bias",
        "encoder.down.3.downsample.conv.weight",
        "encoder.down.4.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.proj_out.weight",
        "encoder.norm_out.bias",
        "decoder.conv_in.weight",
        "decoder.mid.block_2.norm1.weight",
        "decoder.up.4.block.2.norm2.weight",
        "decoder.up.4.upsample.conv.weight",
        "decoder.up.1.block.0.nin_shortcut.bias",
        "decoder.conv_out.weight",
    }
    assert sample <= set(names.values())
    assert not any("up.0.upsample" in name or "down.4.downsample" in name for name in names.values())
    assert {HUGGING_FACE_PREFIX + name for name in names.values() if not name.startswith("decoder.")} == set(
        hugging_face_names(config).values()
    )
