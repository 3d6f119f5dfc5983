"""The losses of the image tokenizer on tiny networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file

from calumma.model.config import ImageLossConfig, ImageTokenizerConfig
from calumma.model.tokenizers.image import ImageTokenizer, Reconstruction
from calumma.model.tokenizers.image_losses import (
    CodebookAverage,
    ImageObjective,
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    hinge_loss,
)

WIDTHS = (2, 3, 4, 3, 2)


def build() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(
        ImageTokenizerConfig(
            resolution=16, codebook_size=12, embedding=4, base_channels=8, multipliers=[1, 2], residual_blocks=1
        )
    )


def pictures(count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count)) * 2 - 1


def small(**values: Any) -> ImageLossConfig:
    return ImageLossConfig(discriminator_channels=4, discriminator_layers=2, **values)


def perceptual_file(folder: Path, leave_out: str = "") -> Path:
    """Random weights of a narrow VGG16, under torchvision's and LPIPS's names."""
    torch.manual_seed(1)
    weights: dict[str, torch.Tensor] = {}
    place, inputs = 0, 3
    for stage, (width, convolutions) in enumerate(zip(WIDTHS, (2, 2, 3, 3, 3), strict=True)):
        for _ in range(convolutions):
            weights[f"features.{place}.weight"] = torch.randn(width, inputs, 3, 3) / 3
            weights[f"features.{place}.bias"] = torch.randn(width) / 3
            place, inputs = place + 2, width  # a convolution and its ReLU
        place += 1  # pooling
        weights[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1)
    save_file({k: v for k, v in weights.items() if k != leave_out}, str(folder / "lpips.safetensors"))
    return folder / "lpips.safetensors"


# -- reconstruction, codebook, commitment --


@pytest.mark.parametrize("pixels", ["l1", "l2"])
@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_the_total_is_the_weighted_sum_of_its_parts(pixels: Any, codebook: Any) -> None:
    tokenizer, x = build(), pictures()
    found = tokenizer(x)
    losses = ImageObjective(small(pixels=pixels, codebook=codebook), 0.3).tokenizer(found, x, 0, tokenizer.last_layer)
    difference = found.x_BCHW - x
    looks = difference.abs().mean() if pixels == "l1" else difference.square().mean()
    distance = (tokenizer.codebook(found.codes_BN) - found.latents_BNE).square().mean()
    learned = 1.0 if codebook == "gradient" else 0.0
    assert torch.allclose(losses.total, looks + (learned + 0.3) * distance)
    losses.total.backward()
    of_codes = tokenizer.codebook.weight.grad
    assert (of_codes is not None) == (codebook == "gradient")
    assert not any(part.requires_grad for part in losses.parts.values())


# -- codebook by moving averages --


@given(decay=st.floats(0.1, 0.95), seed=st.integers(0, 100), steps=st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_codes_are_weighted_means_of_their_latents(decay: float, seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(5, 3, generator=generator, dtype=torch.double)
    before = codebook.clone()
    average = CodebookAverage(codebook, decay)
    weight, weighted = torch.zeros(5, dtype=torch.double), torch.zeros(5, 3, dtype=torch.double)
    for _ in range(steps):
        latents = torch.randn(2, 4, 3, generator=generator, dtype=torch.double)
        codes = torch.randint(4, (2, 4), generator=generator)  # code 4 is never used
        average.update(codebook, latents, codes)
        weight, weighted = weight * decay, weighted * decay
        for latent, code in zip(latents.flatten(0, 1), codes.flatten().tolist(), strict=True):
            weight[code] += 1
            weighted[code] += latent
    used = weight > 0
    assert torch.allclose(codebook[used], weighted[used] / weight[used, None])
    assert torch.equal(codebook[~used], before[~used])
    assert not used[4]


def test_workers_that_add_up_take_one_step() -> None:
    """Two halves of a batch, summed, move the codes as the whole batch does."""
    latents, codes = torch.randn(4, 6, 3), torch.randint(5, (4, 6))
    whole, halves = torch.randn(5, 3), []
    start = whole.clone()
    CodebookAverage(whole, 0.9).update(whole, latents, codes)
    waiting: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):  # first what each would send ...
        own = start.clone()
        mine = slice(2 * rank, 2 * rank + 2)
        CodebookAverage(own, 0.9, lambda t, rank=rank: waiting[rank].append(t.clone())).update(
            own, latents[mine], codes[mine]
        )
    for rank in (0, 1):  # ... then with what the other sent
        other = iter(waiting[1 - rank])
        own = start.clone()
        mine = slice(2 * rank, 2 * rank + 2)
        CodebookAverage(own, 0.9, lambda t, other=other: t.add_(next(other))).update(own, latents[mine], codes[mine])
        halves.append(own)
    assert torch.allclose(halves[0], whole, atol=1e-6)
    assert torch.allclose(halves[0], halves[1], atol=1e-6)


def test_a_code_that_was_moved_elsewhere_begins_anew() -> None:
    codebook = torch.zeros(2, 1)
    average = CodebookAverage(codebook, 0.5)
    average.update(codebook, torch.full((1, 4, 1), 10.0), torch.zeros(1, 4, dtype=torch.long))
    assert codebook[0] == 10
    codebook[0] = -3.0
    average.reset(torch.tensor([True, False]))
    average.update(codebook, torch.full((1, 1, 1), 7.0), torch.ones(1, 1, dtype=torch.long))
    assert codebook.flatten().tolist() == [-3, 7]
    average.update(codebook, torch.full((1, 1, 1), -4.0), torch.zeros(1, 1, dtype=torch.long))
    assert codebook[0] == -4


# -- patch discriminator --


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_is_one_patch(layers: int) -> None:
    side = ImageLossConfig(adversarial=1.0, discriminator_layers=layers).smallest
    judge = PatchDiscriminator(4, layers)
    assert judge(torch.zeros(2, 3, side, side)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        judge(torch.zeros(2, 3, side - 1, side - 1))


def test_a_score_depends_on_its_own_patch_and_image_alone() -> None:
    judge = PatchDiscriminator(4, 2)
    x = pictures(3, 32)
    assert torch.allclose(judge(x)[1:2], judge(x[1:2]), atol=1e-6)
    assert judge(x).shape[2] > 1


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_hinge_loss(real: list[float], fake: list[float]) -> None:
    expected = sum(max(0, 1 - r) for r in real) / len(real) + sum(max(0, 1 + f) for f in fake) / len(fake)
    found = hinge_loss(torch.tensor(real, dtype=torch.double), torch.tensor(fake, dtype=torch.double))
    assert found.item() == pytest.approx(expected / 2)


def test_the_adaptive_weight_makes_gradients_of_one_size() -> None:
    last = torch.randn(4, 3, requires_grad=True)
    x = last * 2
    pixels, scores = (x**2).mean() * 50, x.sum() * 0.01
    weight = adaptive_weight(pixels, scores, last)
    (a,) = torch.autograd.grad(pixels, last, retain_graph=True)
    (b,) = torch.autograd.grad(weight * scores, last, retain_graph=True)
    assert torch.allclose(a.norm(), b.norm(), rtol=1e-2)
    assert not weight.requires_grad
    assert adaptive_weight(pixels, x.sum() * 1e-9, last) == 1e4  # bounded


def test_the_discriminator_counts_from_its_start_on() -> None:
    tokenizer, x = build(), pictures()
    found = tokenizer(x)
    objective = ImageObjective(small(adversarial=0.5, adversarial_start=3, adversarial_adaptive=False), 0.25)
    assert objective.discriminator is not None
    assert [objective.discriminator_active(step) for step in (0, 2, 3, 9)] == [False, False, True, True]
    before = objective.tokenizer(found, x, 2, tokenizer.last_layer)
    after = objective.tokenizer(found, x, 3, tokenizer.last_layer)
    assert "adversarial_loss" not in before.parts
    score = objective.discriminator(found.x_BCHW).mean()
    assert torch.allclose(after.total - before.total, -0.5 * score, atol=1e-5)
    after.total.backward()
    assert all(p.grad is None for p in objective.discriminator.parameters())  # judged, not taught, by this loss
    assert all(p.requires_grad for p in objective.discriminator.parameters())
    assert ImageObjective(small(), 0.25).discriminator is None


def test_the_adaptive_weight_is_taken_at_the_last_layer() -> None:
    tokenizer, x = build(), pictures()
    found = tokenizer(x)
    objective = ImageObjective(small(adversarial=0.5), 0.25)
    assert objective.discriminator is not None
    losses = objective.tokenizer(found, x, 0, tokenizer.last_layer)
    expected = adaptive_weight(
        F.mse_loss(found.x_BCHW, x), -objective.discriminator(found.x_BCHW).mean(), tokenizer.last_layer
    )
    assert torch.allclose(losses.parts["adversarial_weight"], 0.5 * expected)


def test_a_discriminator_learns_to_tell_and_a_tokenizer_to_please_it() -> None:
    torch.manual_seed(0)
    objective = ImageObjective(small(adversarial=1.0, adversarial_adaptive=False), 0.25)
    judge = objective.discriminator
    assert judge is not None
    real = pictures(8)
    fake = (real * 0.2).requires_grad_()
    found = Reconstruction(fake, torch.zeros(8, 1), torch.zeros(()), torch.zeros(()), torch.zeros(8, 1, 1))
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
    first = discriminator_loss(judge, found, real).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = discriminator_loss(judge, found, real)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    assert fake.grad is None  # the reconstruction is not taught by the discriminator's loss
    assert judge(real).mean() > judge(fake).mean()
    score = -judge(fake).mean()
    (pull,) = torch.autograd.grad(score, fake)
    assert -judge(fake - 5 * pull / pull.abs().max() * 0.05).mean() < score


# -- perceptual loss --


def test_perceptual_distance_is_zero_for_equal_images_and_grows(tmp_path: Path) -> None:
    loss = PerceptualLoss.read(perceptual_file(tmp_path))
    x = pictures()
    noise = torch.randn_like(x)
    distances = [loss(x + amount * noise, x).item() for amount in (0.0, 0.05, 0.5)]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_perceptual_distance_is_lpips_formula(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = perceptual_file(tmp_path)
    weights, loss = load_file(str(file)), PerceptualLoss.read(file)
    x, y = pictures(2), pictures(3)[:2]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((image - shift[:, None, None]) / scale[:, None, None] for image in (x, y))
    expected, place = torch.zeros(2), 0
    for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
        if stage:
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
            place += 1
        for _ in range(convolutions):
            kernel, bias = weights[f"features.{place}.weight"], weights[f"features.{place}.bias"]
            a, b = (F.relu(F.conv2d(image, kernel, bias, padding=1)) for image in (a, b))
            place += 2
        of_a, of_b = (image / (image.square().sum(1, keepdim=True).sqrt() + 1e-10) for image in (a, b))
        expected += F.conv2d((of_a - of_b) ** 2, weights[f"lin{stage}.model.1.weight"]).mean((1, 2, 3))
    assert torch.allclose(loss(x, y), expected.mean(), rtol=1e-4)


def test_perceptual_loss_teaches_the_tokenizer_and_is_not_taught(tmp_path: Path) -> None:
    perceptual = PerceptualLoss.read(perceptual_file(tmp_path))
    tokenizer, x = build(), pictures()
    objective = ImageObjective(small(perceptual=2.0), 0.25, perceptual)
    found = tokenizer(x)
    plain = ImageObjective(small(), 0.25).tokenizer(found, x, 0, tokenizer.last_layer)
    losses = objective.tokenizer(found, x, 0, tokenizer.last_layer)
    assert torch.allclose(losses.total - plain.total, 2 * perceptual(found.x_BCHW, x))
    losses.total.backward()
    assert all(p.grad is None for p in perceptual.parameters())
    assert tokenizer.encoder.conv_in.weight.grad is not None


def test_perceptual_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no perceptual weights at"):
        PerceptualLoss.read(tmp_path / "none.safetensors")
    for name in ("features.28.bias", "lin4.model.1.weight"):
        with pytest.raises(ValueError, match=f"lacks perceptual weights.*: {name}$"):
            PerceptualLoss.read(perceptual_file(tmp_path, leave_out=name))
    weights = {name: torch.zeros(1) for name in ("features.0.weight",)}
    with pytest.raises(ValueError, match=r"features\.0\.bias, features\.2\.weight"):
        PerceptualLoss.of(weights, "here")


def test_perceptual_weights_of_another_network_are_refused() -> None:
    with torch.device("meta"):
        names = PerceptualLoss(WIDTHS).state_dict()
    weights = {
        f"lin{name.partition('.')[2]}.model.1.weight" if name.startswith("calibration") else name: torch.zeros(2, 2)
        for name in names
    }
    with pytest.raises(ValueError, match="here does not hold a VGG16"):
        PerceptualLoss.of(weights, "here")


# -- configuration --


def test_the_smallest_image_that_the_losses_take() -> None:
    assert ImageLossConfig().smallest == 1
    assert ImageLossConfig(perceptual_weights="x").smallest == 16
    assert ImageLossConfig(perceptual_weights="x", adversarial=0.1).smallest == 24
    with pytest.raises(ValidationError):
        ImageLossConfig(ema_decay=1.0)


def test_perceptual_loss_takes_the_smallest_image_it_names(tmp_path: Path) -> None:
    loss = PerceptualLoss.read(perceptual_file(tmp_path))
    side = ImageLossConfig(perceptual_weights="x").smallest
    assert loss(pictures(1, side), -pictures(1, side)).isfinite()
    with pytest.raises(RuntimeError):
        loss(pictures(1, side - 1), pictures(1, side - 1))
