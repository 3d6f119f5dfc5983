"""The image decoder against a second writing of VQGAN's (arXiv 2012.09841) from plain arithmetic, in float64.

Nothing of ours is used but the weights, by the release's names (CompVis/taming-transformers, modules/diffusionmodules).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.model.config import ImageTokenizerConfig
from calumma.model.tokenizers.image import ImageTokenizer

Weights = dict[str, Tensor]


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def group_norm(x: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    grouped = x.reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normal = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).view_as(x)
    return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def convolve(x: Tensor, w: Weights, name: str) -> Tensor:
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def residual_block(x: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    h = convolve(swish(group_norm(x, w, f"{name}.norm1", groups)), w, f"{name}.conv1")
    h = convolve(swish(group_norm(h, w, f"{name}.norm2", groups)), w, f"{name}.conv2")
    shortcut = f"{name}.nin_shortcut"
    return (convolve(x, w, shortcut) if f"{shortcut}.weight" in w else x) + h


def attention(x: Tensor, w: Weights, name: str, groups: int) -> Tensor:
    h = group_norm(x, w, f"{name}.norm", groups)
    q, k, v = (convolve(h, w, f"{name}.{each}").flatten(2) for each in "qkv")  # [B, C, places]
    weights = (q.transpose(1, 2) @ k / x.shape[1] ** 0.5).softmax(-1)
    return x + convolve((v @ weights.transpose(1, 2)).view_as(x), w, f"{name}.proj_out")


def decode(codes: list[list[int]], w: Weights, levels: int, blocks: int, groups: int) -> Tensor:
    """One image's codes, row by row, to pixels [3, H, W]."""
    rows = [torch.stack([w["codebook.weight"][code] for code in row], dim=1) for row in codes]
    h = convolve(torch.stack(rows, dim=1)[None], w, "post_quant_conv")
    h = convolve(h, w, "decoder.conv_in")
    h = residual_block(h, w, "decoder.mid.block_1", groups)
    if "decoder.mid.attn_1.q.weight" in w:
        h = attention(h, w, "decoder.mid.attn_1", groups)
    h = residual_block(h, w, "decoder.mid.block_2", groups)
    for level in reversed(range(levels)):
        for block in range(blocks):
            h = residual_block(h, w, f"decoder.up.{level}.block.{block}", groups)
            if f"decoder.up.{level}.attn.{block}.q.weight" in w:
                h = attention(h, w, f"decoder.up.{level}.attn.{block}", groups)
        if level:
            h = convolve(h.repeat_interleave(2, 2).repeat_interleave(2, 3), w, f"decoder.up.{level}.upsample.conv")
    return convolve(swish(group_norm(h, w, "decoder.norm_out", groups)), w, "decoder.conv_out")[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"multipliers": [1, 1, 2], "resolution": 16, "residual_blocks": 2},
        {"attention_resolutions": [8, 4], "decoder_residual_blocks": 1},
        {"middle_attention": False, "latent_channels": 5, "norm_groups": 4},
    ],
    ids=["plain", "deeper", "attending", "no attention"],
)
@torch.no_grad()
def test_pixels_are_those_of_the_paper(changes: dict[str, Any]) -> None:
    shape: dict[str, Any] = dict(
        resolution=8,
        codebook_size=32,
        embedding=6,
        base_channels=8,
        multipliers=[1, 2],
        residual_blocks=1,
        norm_groups=2,
    )
    config = ImageTokenizerConfig(**shape | changes)
    tokenizer, generator = ImageTokenizer(config), torch.Generator().manual_seed(0)
    for name, weight in tokenizer.named_parameters():  # norms and biases too, far from 1 and 0
        scale = 0.5 if weight.dim() < 2 or "codebook" in name else 1.5 / weight[0].numel() ** 0.5
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale + (name.endswith("norm.weight")))
    codes_BN = torch.randint(32, (2, config.codes_per_image), generator=generator)
    weights = {name: weight.double() for name, weight in tokenizer.state_dict().items()}
    groups, levels, grid = config.norm_groups or 0, len(config.multipliers), config.grid
    for pixels, codes in zip(tokenizer.decode(codes_BN), codes_BN, strict=True):
        expected = decode(codes.view(grid, grid).tolist(), weights, levels, config.decoder_blocks, groups)
        assert expected.std() > 0.1
        torch.testing.assert_close(pixels.double(), expected, rtol=1e-4, atol=1e-4)
