"""The VQ image tokenizer: encoder, codebook, decoder (VQGAN, arXiv 2012.09841; paper section 2.1).

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
from calumma.model.tokenizers.image_layers import ImageDecoder, ImageEncoder

WEIGHTS = "model.safetensors"


class MissingDecoder(RuntimeError):
    """Codes should become a picture, and this image tokenizer has no decoder."""


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
        self.encoder = ImageEncoder(config)
        self.decoder = ImageDecoder(config) if config.decoder else None
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
        with torch.autocast(flat.device.type, enabled=False):  # in bfloat16 near codes are not told apart
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
        grid = self.config.grid
        return self._decode(self.codebook(codes_BN), (grid, grid))

    def _decode(self, quantized_BNE: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.require_decoder()(self.post_quant_conv(quantized_BNE.transpose(1, 2).unflatten(2, grid)))

    def require_decoder(self) -> ImageDecoder:
        """The decoder. Raises MissingDecoder, which says what to do, where there is none."""
        if self.decoder is None:
            raise MissingDecoder(
                "this model reads images and cannot draw them: its image tokenizer has no decoder. Hugging Face's "
                "Chameleon directories hold only the encoder; import again with `--vqgan` naming the folder that holds "
                "vqgan.ckpt and vqgan.yaml of Meta's release"
            )
        return self.decoder

    def forward(self, images_BCHW: Tensor) -> Reconstruction:
        """Reconstruct with the straight-through gradient (VQ-VAE, arXiv 1711.00937, section 3.2), in float32 but for
        the networks under autocast. Images of any size that the encoder's levels divide."""
        map_BEhw = self.quant_conv(self.encoder(images_BCHW)).float()
        latents = map_BEhw.flatten(2).transpose(1, 2)
        codes = self.nearest(latents.detach())
        quantized = self.codebook(codes)
        return Reconstruction(
            x_BCHW=self._decode(
                latents + (quantized - latents).detach(), (map_BEhw.shape[2], map_BEhw.shape[3])
            ).float(),
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
        """Move the entries where `used_K` (BoolTensor [K]) is false onto latents of a batch; how many moved (Jukebox,
        arXiv 2005.00341, section 3.2: keeps the whole codebook in use).

        A latent is drawn with its squared distance to the nearest used entry, as k-means++ seeds (Arthur and
        Vassilvitskii 2007): plain ground, which is most of many pictures, does not get many codes. Where no entry is
        used all are as likely.
        Workers that share a batch of `batch` images, this one's from number `first` on, move them alike: with equal
        generators, and `total`, which sums a tensor over all workers, in place.
        """
        dead = (~used_K).nonzero()[:, 0]
        if len(dead):
            latents_BNE = self.quant_conv(self.encoder(images_BCHW)).flatten(2).transpose(1, 2)
            latents, codes = latents_BNE.flatten(0, 1), latents_BNE.shape[1]
            begin, everywhere = first * codes, (batch or len(images_BCHW)) * codes
            chance = latents.new_zeros(everywhere)
            chance[begin : begin + len(latents)] = _squared_distances(latents, self.codebook.weight[used_K])
            if total is not None:
                total(chance)
            chance = chance.nan_to_num(0.0, posinf=0.0).double().cpu()
            enough = int((chance > 0).sum()) >= len(dead)
            pick = torch.multinomial(
                chance if enough else torch.ones_like(chance),
                len(dead),
                replacement=len(dead) > everywhere,
                generator=generator,
            )
            pick = pick.to(latents.device) - begin
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


def _squared_distances(latents_LE: Tensor, entries_KE: Tensor) -> Tensor:
    """FloatTensor [L]: of each latent to the nearest entry; 1 where there is none."""
    if not len(entries_KE):
        return latents_LE.new_ones(len(latents_LE))
    return torch.cat([torch.cdist(part, entries_KE).amin(1).square() for part in latents_LE.split(4096)])
