"""What the image tokenizer learns from (VQGAN, arXiv 2012.09841, section 3.1): reconstruction, commitment, a patch-GAN,
a perceptual distance, and a codebook that goes down its gradient or follows moving averages.

Shape suffixes: B batch, C channels, H height, W width, N codes of an image, E embedding, K codebook entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from calumma.model.config import ImageLossConfig
from calumma.model.tokenizers.image import Reconstruction
from calumma.model.tokenizers.image_layers import channels_last


class PatchDiscriminator(nn.Module):
    """[B, 3, H, W] -> [B, 1, h, w]: a score a patch, high for real (pix2pix, arXiv 1611.07004, section 3.2.2).

    GroupNorm where pix2pix has BatchNorm: what one image scores depends neither on its batch nor on the workers.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            conv = nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < layers else 1, padding=1, bias=False)
            groups = next(g for g in range(min(32, widths[i]), 0, -1) if widths[i] % g == 0)
            body += [conv, nn.GroupNorm(groups, widths[i]), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # pix2pix, section 6.2

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.body(channels_last(x_BCHW))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its scores of real and of reconstructed images (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, mean: Callable[[Tensor], object] | None = None
) -> Tensor:
    """The factor that gives both losses gradients of one size at the decoder's last weights (VQGAN, equation 7), at
    most 1e4; a 0-dim tensor without gradient. `mean` averages a tensor over all workers, in place."""
    (of_pixels,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_scores,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    if mean is not None:
        mean(of_pixels)
        mean(of_scores)
    return (of_pixels.norm() / (of_scores.norm() + 1e-4)).clamp(0, 1e4).detach()


class PerceptualLoss(nn.Module):
    """LPIPS (arXiv 1801.03924): VGG16's features of two images, normalized, compared at five depths.

    Its weights are one safetensors file with torchvision's names of VGG16 (`features.0.weight`, ...) and LPIPS's of the
    five calibrations (`lin0.model.1.weight`, ...); `widths` are those of the five stages.
    """

    CONVOLUTIONS = (2, 2, 3, 3, 3)
    shift_C11: Tensor
    scale_C11: Tensor

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.compared: list[int] = []  # places in `features` of each stage's last ReLU
        inputs = 3
        for width, convolutions in zip(widths, self.CONVOLUTIONS, strict=True):
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            self.compared.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.ModuleList(layers[:-1])
        self.calibration = nn.ParameterList(torch.full((width,), 1 / width) for width in widths)
        # ImageNet's mean and deviation a channel, for values in [-1, 1] (LPIPS's ScalingLayer).
        self.register_buffer("shift_C11", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale_C11", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], origin: str) -> PerceptualLoss:
        """From the file's tensors; `origin` names it in errors. Raises ValueError that lists what is missing or odd."""
        names = _perceptual_names()
        if missing := [theirs for theirs in names.values() if theirs not in weights]:
            raise ValueError(
                f"{origin} lacks perceptual weights (torchvision's VGG16 features and LPIPS's lin layers are needed): "
                + ", ".join(missing)
            )
        state = {
            ours: weights[theirs].float().flatten() if ours.startswith("calibration") else weights[theirs].float()
            for ours, theirs in names.items()
        }
        loss = cls(tuple(len(value) for name, value in state.items() if name.startswith("calibration")))
        try:
            loss.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{origin} does not hold a VGG16 with LPIPS's calibration: {error}") from error
        return loss

    @classmethod
    def read(cls, file: str | Path) -> PerceptualLoss:
        """From a safetensors file. Raises FileNotFoundError, ValueError."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"there are no perceptual weights at {file}")
        return cls.of(load_file(str(file)), str(file))

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Mean distance of images in [-1, 1], a 0-dim tensor; the gradient reaches the first argument only."""
        with torch.no_grad():
            targets = self._features(y_BCHW)
        distances = [
            ((x - y).square() * weight_C[:, None, None]).sum(1).mean()
            for x, y, weight_C in zip(self._features(x_BCHW), targets, self.calibration, strict=True)
        ]
        return torch.stack(distances).sum()

    def _features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The compared feature maps, each position's vector of length 1."""
        h = channels_last((x_BCHW - self.shift_C11) / self.scale_C11)
        found = []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.compared:
                found.append(F.normalize(h, dim=1, eps=1e-10))
        return found


def _perceptual_names() -> dict[str, str]:
    """Our names of the perceptual weights -> those in the file."""
    with torch.device("meta"):
        ours = PerceptualLoss().state_dict()
    return {
        name: f"lin{name.partition('.')[2]}.model.1.weight" if name.startswith("calibration") else name for name in ours
    }


class CodebookAverage:
    """Moves every code to the moving average of the latents it stood for, instead of down a gradient (VQ-VAE-2, arXiv
    1906.00446, appendix A). `total` sums a tensor over all workers, in place."""

    def __init__(self, codebook_KE: Tensor, decay: float, total: Callable[[Tensor], object] | None = None) -> None:
        self.decay, self.total = decay, total
        self.counts_K = codebook_KE.new_zeros(len(codebook_KE))
        self.sums_KE = torch.zeros_like(codebook_KE, requires_grad=False)

    @torch.no_grad()
    def update(self, codebook_KE: Tensor, latents_BNE: Tensor, codes_BN: Tensor) -> None:
        """Change `codebook_KE` in place. Codes that no latent chose for long stay where they are."""
        codes = codes_BN.flatten()
        counts_K = torch.bincount(codes, minlength=len(codebook_KE)).to(self.counts_K.dtype)
        sums_KE = torch.zeros_like(self.sums_KE).index_add_(0, codes, latents_BNE.flatten(0, 1).to(self.sums_KE.dtype))
        if self.total is not None:
            self.total(counts_K)
            self.total(sums_KE)
        self.counts_K.lerp_(counts_K, 1 - self.decay)
        self.sums_KE.lerp_(sums_KE, 1 - self.decay)
        known = self.counts_K > 1e-5
        codebook_KE[known] = self.sums_KE[known] / self.counts_K[known, None]

    def reset(self, moved_K: Tensor) -> None:
        """Begin anew for codes that were restarted elsewhere (BoolTensor [K])."""
        self.counts_K[moved_K] = 0
        self.sums_KE[moved_K] = 0


class ImageLosses(NamedTuple):
    """0-dim tensors. `total` is what to go down from; `parts` are the unweighted terms, for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class ImageObjective:
    """The loss of an image tokenizer, and the discriminator that is part of it (None where `config` asks for none).

    `mean` averages a tensor over all workers, in place.
    """

    def __init__(
        self,
        config: ImageLossConfig,
        commitment: float,
        perceptual: PerceptualLoss | None = None,
        mean: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.config, self.commitment, self.perceptual, self.mean = config, commitment, perceptual, mean
        wanted = config.adversarial > 0
        self.discriminator = (
            PatchDiscriminator(config.discriminator_channels, config.discriminator_layers) if wanted else None
        )

    def to(self, device: torch.device) -> ImageObjective:
        for part in (self.perceptual, self.discriminator):
            if part is not None:
                part.to(device)
        return self

    def discriminator_active(self, step: int) -> bool:
        """Whether the discriminator takes part in a step (the first is 0)."""
        return self.discriminator is not None and step >= self.config.adversarial_start

    def tokenizer(self, reconstruction: Reconstruction, x_BCHW: Tensor, step: int, last_layer: Tensor) -> ImageLosses:
        """What the tokenizer learns from; `last_layer` is its `last_layer` weight."""
        config = self.config
        error = F.l1_loss if config.pixels == "l1" else F.mse_loss
        parts = {"reconstruction": error(reconstruction.x_BCHW, x_BCHW)}
        looks = parts["reconstruction"]
        if self.perceptual is not None:
            parts["perceptual_loss"] = self.perceptual(reconstruction.x_BCHW, x_BCHW)
            looks = looks + config.perceptual * parts["perceptual_loss"]
        total = looks + self.commitment * reconstruction.commitment_loss
        if config.codebook == "gradient":
            total = total + reconstruction.codebook_loss
        parts |= {"codebook_loss": reconstruction.codebook_loss, "commitment_loss": reconstruction.commitment_loss}
        if self.discriminator is not None and self.discriminator_active(step):
            self.discriminator.requires_grad_(False)
            parts["adversarial_loss"] = -self.discriminator(reconstruction.x_BCHW).mean()
            self.discriminator.requires_grad_(True)
            weight = looks.new_tensor(config.adversarial)
            if config.adversarial_adaptive:
                weight = weight * adaptive_weight(looks, parts["adversarial_loss"], last_layer, self.mean)
            parts["adversarial_weight"] = weight
            total = total + weight * parts["adversarial_loss"]
        return ImageLosses(total, {name: part.detach() for name, part in parts.items()})


def discriminator_loss(
    discriminator: Callable[[Tensor], Tensor], reconstruction: Reconstruction, x_BCHW: Tensor
) -> Tensor:
    """The discriminator's own loss on real and reconstructed images; one pass over both."""
    real, fake = discriminator(torch.cat([x_BCHW, reconstruction.x_BCHW.detach()])).chunk(2)
    return hinge_loss(real, fake)
