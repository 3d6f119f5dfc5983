"""VQ image tokenizer: convolutional encoder, codebook, decoder (VQGAN, arXiv 2012.09841; paper section 2.1).

The modules are named as in the public release's checkpoint, so that its weights fit by a table of names
(`convert/image_tokenizer.py`). Only the codebook has a name of its own.

Shape suffixes: B batch, C channels, H height, W width, N codes of an image (grid x grid, row by row), E embedding,
K codebook entries.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calumma.model.config import ImageTokenizerConfig
from calumma.model.images import preprocess, to_image

__all__ = ["WEIGHTS", "ImageTokenizer", "MissingDecoder", "Reconstruction", "preprocess", "to_image"]
WEIGHTS = "model.safetensors"


class MissingDecoder(RuntimeError):
    """Codes should become a picture, and this image tokenizer has no decoder."""


class GroupNorm(nn.GroupNorm):
    """GroupNorm that keeps its accuracy on a CPU.

    PyTorch's CPU kernel for channels-last takes the variance as E[x^2] - E[x]^2, of which nothing is left where the
    mean is large beside the deviation, as in a white picture (mean 500 deviations: outputs wrong by 0.7). Such
    inputs, which the kernel's own statistics tell, are moved to mean 0 and done again.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        batch, channels, height, width = x.shape
        y, mean_BG, rstd_BG = torch.native_group_norm(
            x, self.weight, self.bias, batch, channels, height * width, self.num_groups, self.eps
        )
        if not (mean_BG * rstd_BG).abs().gt(4).any():
            return y
        mean_BC11 = mean_BG.repeat_interleave(channels // self.num_groups, dim=1)[:, :, None, None]
        return super().forward(x - mean_BC11)


def norm(channels: int, config: ImageTokenizerConfig) -> GroupNorm:
    return GroupNorm(config.groups(channels), channels, eps=1e-6)


def activate(h: Tensor) -> Tensor:
    """SiLU; in place where no gradient needs the argument."""
    return F.silu(h, inplace=not h.requires_grad)


def channels_last(x: Tensor) -> Tensor:
    """The same values, channels innermost in memory: what convolutions are fast with (on CPUs and tensor cores)."""
    return x.contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs, config), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs, config), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)
        self.changes_channels = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(activate(self.norm1(x)))
        h = self.conv2(activate(self.norm2(h)))
        return (self.nin_shortcut(x) if self.changes_channels else x) + h


class AttentionBlock(nn.Module):
    """One head over all positions of the feature map."""

    def __init__(self, channels: int, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.norm = norm(channels, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the size. The padding is below and right only, as in the release."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a 3x3 convolution; both as one transposed convolution.

    Of the nine pixels under the kernel four are distinct, so the taps that meet the same one are summed beforehand:
    16 multiplications a channel and input pixel instead of 36. Measured on a CPU, 128 channels of 64x64 pixels: 1.7
    times as fast as the two steps, 1.9 times with the backward pass.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        flipped_IO33 = self.conv.weight.flip(2, 3).transpose(0, 1)
        shifted = [F.pad(flipped_IO33, (left, 1 - left, top, 1 - top)) for left in (0, 1) for top in (0, 1)]
        taps_IO44 = shifted[0] + shifted[1] + shifted[2] + shifted[3]
        return F.conv_transpose2d(x, taps_IO44, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the configuration asks for it; then a change
    of resolution."""

    def __init__(
        self,
        config: ImageTokenizerConfig,
        number: int,
        inputs: int,
        blocks: int,
        resample: type[Downsample] | type[Upsample] | None,
    ) -> None:
        super().__init__()
        outputs = config.base_channels * config.multipliers[number]
        attends = config.resolution >> number in config.attention_resolutions
        self.block = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs, config) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs, config) for _ in range(blocks if attends else 0))
        self.downsample = Downsample(outputs) if resample is Downsample else None
        self.upsample = Upsample(outputs) if resample is Upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    def __init__(self, channels: int, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, config)
        self.attn_1 = AttentionBlock(channels, config) if config.middle_attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, latent channels, grid, grid]"""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in (1, *config.multipliers)]
        last = len(config.multipliers) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(config, i, channels[i], config.residual_blocks, Downsample if i < last else None)
            for i in range(last + 1)
        )
        self.mid = Middle(channels[-1], config)
        self.norm_out, self.conv_out = norm(channels[-1], config), nn.Conv2d(channels[-1], config.latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(channels_last(x))
        for level in self.down:
            x = level(x)
        return self.conv_out(activate(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, latent channels, grid, grid] -> [B, 3, H, W]"""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in (*config.multipliers, config.multipliers[-1])]
        self.conv_in = nn.Conv2d(config.latents, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], config)
        self.up = nn.ModuleList(  # up[0] is the full resolution, and runs last
            Level(config, i, channels[i + 1], config.decoder_blocks, Upsample if i > 0 else None)
            for i in range(len(config.multipliers))
        )
        self.norm_out, self.conv_out = norm(channels[0], config), nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(channels_last(x)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(activate(self.norm_out(x)))


class Reconstruction(NamedTuple):
    x_BCHW: Tensor
    codes_BN: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    latents_BNE: Tensor  # before quantization, detached


class ImageTokenizer(nn.Module):
    """Without a decoder (`config.decoder` false: imported from a release that has none) it encodes only."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if config.decoder else None
        self.quant_conv = nn.Conv2d(config.latents, config.embedding, 1)
        self.post_quant_conv = nn.Conv2d(config.embedding, config.latents, 1)
        self.codebook = nn.Embedding(config.codebook_size, config.embedding)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weights, at which VQGAN balances its losses. Raises MissingDecoder."""
        return self.require_decoder().conv_out.weight

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> FloatTensor [B, N, E], before quantization. Raises ValueError on another size."""
        expected = (3, self.config.resolution, self.config.resolution)
        if tuple(images_BCHW.shape[1:]) != expected:
            raise ValueError(f"images must be [B, {', '.join(map(str, expected))}], found {list(images_BCHW.shape)}")
        return self.quant_conv(self.encoder(images_BCHW)).flatten(2).transpose(1, 2)

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
        """LongTensor [B, N] -> FloatTensor [B, 3, H, W], about [-1, 1].

        Raises ValueError on another length, MissingDecoder where there is none.
        """
        if codes_BN.shape[1] != self.config.codes_per_image:
            raise ValueError(f"an image has {self.config.codes_per_image} codes, found {codes_BN.shape[1]}")
        return self._decode(self.codebook(codes_BN))

    def _decode(self, quantized_BNE: Tensor) -> Tensor:
        decoder, grid = self.require_decoder(), self.config.grid
        return decoder(self.post_quant_conv(quantized_BNE.transpose(1, 2).unflatten(2, (grid, grid))))

    def require_decoder(self) -> Decoder:
        """The decoder. Raises MissingDecoder, which says what to do, where there is none."""
        if self.decoder is None:
            raise MissingDecoder(
                "this model reads images and cannot draw them: its image tokenizer has no decoder. Hugging Face's "
                "Chameleon directories hold only the encoder; import again with `--vqgan` naming the folder that holds "
                "vqgan.ckpt and vqgan.yaml of Meta's release"
            )
        return self.decoder

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
            latents_BNE=latents.detach(),
        )

    @torch.no_grad()
    def restart_dead_codes(
        self,
        used_K: Tensor,
        images_BCHW: Tensor,
        generator: torch.Generator,
        first: int = 0,
        batch: int | None = None,
        total: Callable[[Tensor], object] | None = None,
    ) -> int:
        """Move the entries where `used_K` (BoolTensor [K]) is false onto random latents of a batch; how many moved
        (Jukebox, arXiv 2005.00341, section 3.2: keeps the whole codebook in use).

        Workers that share a batch of `batch` images, this one's from number `first` on, move them alike: with equal
        generators, and `total`, which sums a tensor over all workers, in place.
        """
        dead = (~used_K).nonzero()[:, 0]
        if len(dead):
            latents = self.latents(images_BCHW).flatten(0, 1)
            codes = self.config.codes_per_image
            pick = torch.randint((batch or len(images_BCHW)) * codes, (len(dead),), generator=generator)
            pick = pick.to(latents.device) - first * codes
            mine = (pick >= 0) & (pick < len(latents))
            moved = latents.new_zeros(len(dead), latents.shape[1])
            moved[mine] = latents[pick[mine]]
            if total is not None:
                total(moved)
            self.codebook.weight[dead] = moved
        return len(dead)

    def save(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.config.save(directory)
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, str(Path(directory) / WEIGHTS))

    @classmethod
    def read(cls, directory: str | Path, device: torch.device | str = "cpu") -> ImageTokenizer:
        """The tokenizer of a directory, ready to encode, in float32 whatever it is stored in.

        Raises ValueError when the weights are of another shape.
        """
        with torch.device("meta"):
            tokenizer = cls(ImageTokenizerConfig.read(directory))
        weights = load_file(str(Path(directory) / WEIGHTS), device=str(device))
        try:
            tokenizer.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{directory}: the weights do not fit the configuration beside them: {error}") from error
        return tokenizer.float().eval()
