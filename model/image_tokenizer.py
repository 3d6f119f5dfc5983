"""VQ image tokenizer: convolutional encoder, codebook, decoder (VQGAN, arXiv 2012.09841; paper section 2.1).

Shape suffixes: B batch, C channels, H height, W width, N codes of an image (grid x grid, row by row), E embedding,
K codebook entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from PIL import ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calumma.model.config import ImageTokenizerConfig

WEIGHTS = "model.safetensors"


def preprocess(image: PILImage.Image, resolution: int, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """FloatTensor [3, resolution, resolution] in [-1, 1]. `crop` centre-crops (answers and pre-training), `pad` keeps
    everything and fills the border with white (images in prompts; paper section 3.1)."""
    size = (resolution, resolution)
    image = image.convert("RGB")
    if fit == "crop":
        image = ImageOps.fit(image, size, PILImage.Resampling.BICUBIC)
    else:
        image = ImageOps.pad(image, size, PILImage.Resampling.BICUBIC, color="white")
    array = np.asarray(image, dtype=np.uint8)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x_CHW: Tensor) -> PILImage.Image:
    """FloatTensor [3, H, W], clamped to [-1, 1] -> RGB image."""
    pixels = ((x_CHW.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return PILImage.fromarray(pixels.permute(1, 2, 0).cpu().numpy(), mode="RGB")


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4) or 1, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def upsample(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels, 3, padding=1))


def encoder(config: ImageTokenizerConfig) -> nn.Sequential:
    """[B, 3, H, W] -> [B, E, grid, grid]"""
    channels = config.base_channels
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    for level, multiplier in enumerate(config.multipliers):
        for _ in range(config.residual_blocks):
            layers.append(ResidualBlock(channels, config.base_channels * multiplier))
            channels = config.base_channels * multiplier
        if level < len(config.multipliers) - 1:
            layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
    layers += [ResidualBlock(channels, channels), group_norm(channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, config.embedding, 3, padding=1))


def decoder(config: ImageTokenizerConfig) -> nn.Sequential:
    """[B, E, grid, grid] -> [B, 3, H, W]"""
    channels = config.base_channels * config.multipliers[-1]
    layers: list[nn.Module] = [nn.Conv2d(config.embedding, channels, 3, padding=1), ResidualBlock(channels, channels)]
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        for _ in range(config.residual_blocks):
            layers.append(ResidualBlock(channels, config.base_channels * multiplier))
            channels = config.base_channels * multiplier
        if level > 0:
            layers.append(upsample(channels))
    return nn.Sequential(*layers, group_norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))


class Reconstruction(NamedTuple):
    x_BCHW: Tensor
    codes_BN: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class ImageTokenizer(nn.Module):
    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config)
        self.codebook = nn.Embedding(config.codebook_size, config.embedding)
        nn.init.normal_(self.codebook.weight, std=1.0)

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> FloatTensor [B, N, E], before quantization. Raises ValueError on another size."""
        expected = (3, self.config.resolution, self.config.resolution)
        if tuple(images_BCHW.shape[1:]) != expected:
            raise ValueError(f"images must be [B, {', '.join(map(str, expected))}], found {list(images_BCHW.shape)}")
        return self.encoder(images_BCHW).flatten(2).transpose(1, 2)

    def nearest(self, latents_BNE: Tensor) -> Tensor:
        """LongTensor [B, N]: the codebook entry nearest to each latent (squared distance)."""
        flat = latents_BNE.flatten(0, 1)
        weight_KE = self.codebook.weight
        distance = weight_KE.square().sum(1) - 2 * flat @ weight_KE.t()
        return distance.argmin(1).view(latents_BNE.shape[:2])

    @torch.inference_mode()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """FloatTensor [B, 3, H, W] in [-1, 1] -> LongTensor [B, N] codes in 0..codebook_size-1."""
        return self.nearest(self.latents(images_BCHW))

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """LongTensor [B, N] -> FloatTensor [B, 3, H, W], about [-1, 1]. Raises ValueError on another length."""
        if codes_BN.shape[1] != self.config.codes_per_image:
            raise ValueError(f"an image has {self.config.codes_per_image} codes, found {codes_BN.shape[1]}")
        return self._decode(self.codebook(codes_BN))

    def _decode(self, quantized_BNE: Tensor) -> Tensor:
        grid = self.config.grid
        return self.decoder(quantized_BNE.transpose(1, 2).unflatten(2, (grid, grid)))

    def forward(self, images_BCHW: Tensor) -> Reconstruction:
        """Reconstruct with the straight-through gradient (VQ-VAE, arXiv 1711.00937, section 3.2)."""
        latents = self.latents(images_BCHW)
        codes = self.nearest(latents.detach())
        quantized = self.codebook(codes)
        return Reconstruction(
            x_BCHW=self._decode(latents + (quantized - latents).detach()),
            codes_BN=codes,
            codebook_loss=F.mse_loss(quantized, latents.detach()),
            commitment_loss=F.mse_loss(latents, quantized.detach()),
        )

    @torch.no_grad()
    def restart_dead_codes(self, used_K: Tensor, images_BCHW: Tensor, generator: torch.Generator) -> int:
        """Move the entries where `used_K` (BoolTensor [K]) is false onto random latents of a batch; how many moved
        (Jukebox, arXiv 2005.00341, section 3.2: keeps the whole codebook in use)."""
        dead = (~used_K).nonzero()[:, 0]
        latents = self.latents(images_BCHW).flatten(0, 1)
        if len(dead):
            pick = torch.randint(len(latents), (len(dead),), generator=generator)
            self.codebook.weight[dead] = latents[pick.to(latents.device)]
        return len(dead)

    def save(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.config.save(directory)
        save_file(self.state_dict(), str(Path(directory) / WEIGHTS))

    @classmethod
    def read(cls, directory: str | Path, device: torch.device | str = "cpu") -> ImageTokenizer:
        tokenizer = cls(ImageTokenizerConfig.read(directory))
        tokenizer.load_state_dict(load_file(str(Path(directory) / WEIGHTS)))
        return tokenizer.to(device).eval()
