"""The chunked loss is the plain formula: values, sums by modality, gradients of the states and of the output weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.ops import loss
from calumma.model.ops.loss import LossSums, linear_loss, sums, trained_rows
from calumma.model.transformer import Transformer

V = 50


def plain(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> tuple[Tensor, LossSums]:
    """By way of all logits, and PyTorch's cross-entropy."""
    logits = F.linear(hidden, weight).float()
    targets, mask = batch["targets"], batch["mask"]
    found = sums(logits, targets, mask, batch["image_mask"])
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    each = nll + batch["z_loss"] * logits.logsumexp(-1).square()
    counted = torch.where(batch["image_mask"][targets], batch.get("image_weight", 1.0), 1.0) * mask
    return (each * counted).sum() / batch["normalizer"], found


def chunked(hidden: Tensor, weight: Tensor, batch: dict[str, Any]) -> tuple[Tensor, LossSums]:
    return linear_loss(
        hidden,
        weight,
        batch["targets"],
        trained_rows(batch["mask"]),
        batch["image_mask"],
        z_loss=batch["z_loss"],
        normalizer=batch["normalizer"],
        image_weight=batch.get("image_weight", 1.0),
        chunk=batch["chunk"],
    )


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, masks (empty, full, whole rows masked), weights and scales of the states."""
    rows, tokens, width = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    trained = draw(st.sampled_from([0.0, 0.3, 1.0]))
    mask = torch.rand(rows, tokens, generator=generator) < trained
    if rows and draw(st.booleans()):
        mask[draw(st.integers(0, rows - 1))] = False
    return {
        "hidden": torch.randn(rows, tokens, width, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0])),
        "weight": torch.randn(V, width, generator=generator),
        "targets": torch.randint(V, (rows, tokens), generator=generator),
        "mask": mask,
        "image_mask": torch.arange(V) < draw(st.sampled_from([0, 20, V])),
        "z_loss": draw(st.sampled_from([0.0, 1e-5, 1e-2])),
        "normalizer": draw(st.sampled_from([1.0, 13.0, 4096.0])),
        "image_weight": draw(st.sampled_from([1.0, 0.25, 0.0])),
        "chunk": draw(st.sampled_from([1, 4, 100])),
    }


@given(batch=batches(), tile=st.sampled_from([1, 120, 1 << 19]), grad=st.sampled_from([1.0, -0.5]))
@settings(deadline=None, max_examples=150)
def test_the_chunked_loss_is_the_plain_one(batch: dict[str, Any], tile: int, grad: float) -> None:
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "TILE", tile)
        for formula in (plain, chunked):
            hidden, weight = (batch[name].clone().requires_grad_() for name in ("hidden", "weight"))
            total, found = formula(hidden, weight, batch)
            (total * grad).backward()
            results.append([total.detach(), *(value.detach() for value in found), hidden.grad, weight.grad])
    for expected, value in zip(*results, strict=True):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * scale)


@given(batch=batches())
@settings(deadline=None, max_examples=30)
def test_without_gradients_the_values_are_the_same(batch: dict[str, Any]) -> None:
    hidden, weight = batch["hidden"], batch["weight"].requires_grad_()
    with torch.no_grad():
        total, found = chunked(hidden, weight, batch)
    expected, expected_sums = chunked(hidden, weight, batch)
    assert not total.requires_grad
    torch.testing.assert_close((total, *found), (expected.detach(), *expected_sums))


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_sums_equal_their_definitions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 7, V, generator=generator) * 3
    targets = torch.randint(V, (2, 7), generator=generator)
    mask = torch.rand(2, 7, generator=generator) < 0.6
    image_ids = torch.arange(V) < 20
    result = sums(logits, targets, mask, image_ids)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    image = image_ids[targets] & mask
    assert torch.allclose(result.image_nll, nll[image].sum(), atol=1e-4)
    assert torch.allclose(result.text_nll, nll[mask & ~image].sum(), atol=1e-4)
    assert (result.image_count, result.text_count) == (image.sum(), (mask & ~image).sum())
    log_z = logits.exp().sum(-1).log()
    assert torch.allclose(result.z_sum, (log_z[mask] ** 2).sum(), rtol=1e-4)


def test_bfloat16_is_as_exact_as_its_logits_and_sums_over_chunks_in_float32() -> None:
    """Against float32 from the same rounded inputs; the gradient's error does not grow with the number of chunks."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 512, 32).bfloat16(), (torch.randn(V, 32) * 0.2).bfloat16()
    batch = {
        "targets": torch.randint(V, (1, 512)),
        "mask": torch.ones(1, 512, dtype=torch.bool),
        "image_mask": torch.arange(V) < 20,
        "z_loss": 1e-4,
        "normalizer": 512.0,
    }

    def gradients(dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        x, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight))
        total, _ = chunked(x, w, batch | {"chunk": chunk})
        total.backward()
        assert x.grad is not None
        assert w.grad is not None
        assert (x.grad.dtype, w.grad.dtype, total.dtype) == (dtype, dtype, torch.float32)
        return total.detach(), x.grad.float(), w.grad.float()

    exact = gradients(torch.float32, 512)
    for chunk in (512, 8):
        total, x, w = gradients(torch.bfloat16, chunk)
        assert total == pytest.approx(float(exact[0]), rel=2e-3)
        assert float((x - exact[1]).norm() / exact[1].norm()) < 0.02
        assert float((w - exact[2]).norm() / exact[2].norm()) < 0.01


def test_gradients_cannot_be_asked_for_twice() -> None:
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    tokens, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    total, _ = linear_loss(hidden, weight, tokens, trained_rows(mask), torch.zeros(V, dtype=torch.bool))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        total.backward()


def test_the_logits_of_all_tokens_never_exist() -> None:
    """Every tensor that the loss makes, forward and backward, is smaller than the logits of all tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = result if isinstance(result, tuple | list) else [result]
            self.elements = max([self.elements, *(x.numel() for x in made if isinstance(x, Tensor))])
            return result

    tokens = 256
    hidden, weight = torch.randn(1, tokens, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    batch = {
        "targets": torch.randint(V, (1, tokens)),
        "mask": torch.ones(1, tokens, dtype=torch.bool),
        "image_mask": torch.zeros(V, dtype=torch.bool),
        "z_loss": 1e-5,
        "normalizer": 1.0,
        "chunk": 16,
    }
    with Largest() as ours:
        chunked(hidden, weight, batch)[0].backward()
    with Largest() as theirs:
        plain(hidden, weight, batch)[0].backward()
    assert theirs.elements == tokens * V
    assert ours.elements == tokens * 8  # the states, and 16 x 50 logits


@pytest.mark.parametrize("trained", [0.0, 0.4, 1.0])
def test_the_transformers_loss_is_that_of_its_logits(trained: float) -> None:
    shape = ModelConfig(vocabulary_size=V, layers=2, width=32, heads=4, kv_heads=2, ffn_width=40, context=24)
    model = Transformer(shape).initialize(0)
    torch.manual_seed(1)
    tokens, mask, image_mask = torch.randint(V, (2, 13)), torch.rand(2, 12) < trained, torch.arange(V) < 20
    found = model(tokens[:, :-1], targets=tokens[:, 1:], mask=mask, image_mask=image_mask, z_loss=1e-2, normalizer=5.0)
    assert found.stability == {}
    found.total.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = sums(model(tokens[:, :-1]), tokens[:, 1:], mask, image_mask)
    total = (expected.text_nll + expected.image_nll + 1e-2 * expected.z_sum) / 5.0
    total.backward()
    torch.testing.assert_close(found.total, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuple(found.sums), tuple(expected), rtol=1e-5, atol=1e-5)
    assert ours.keys() == dict(model.named_parameters()).keys()  # also where nothing is trained: all workers reduce
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_needs_all_of_its_arguments() -> None:
    shape = ModelConfig(vocabulary_size=V, layers=1, width=8, heads=2, kv_heads=2, ffn_width=8, context=8)
    with pytest.raises(ValueError, match="targets, mask and image_mask"):
        Transformer(shape)(torch.zeros(1, 3, dtype=torch.long), targets=torch.zeros(1, 3, dtype=torch.long))
