"""Masks of attention within documents."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from calumma.model.ops.attention import Runs, attend, document_mask


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_documents_as_the_dense_mask() -> None:
    """On the CPU FlexAttention runs as its own reference implementation: the mask is tested, not the kernel."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    segments = torch.tensor([[0] * 10 + [1] * 25 + [-1] * 5, [0] * 39 + [1]])
    dense, flex = (attend(q, k, v, document_mask(segments, form)) for form in ("dense", "flex"))
    torch.testing.assert_close(flex, dense)
    assert not torch.allclose(dense, attend(q, k, v, None), atol=1e-2)


def _gradients(form: Literal["dense", "runs"], segments: torch.Tensor, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    B, T = segments.shape
    heads = (4, kv_heads, kv_heads)
    q, k, v = (torch.randn(B, T, count, 16, generator=generator, requires_grad=True) for count in heads)
    out = attend(*(x.transpose(1, 2) for x in (q, k, v)), document_mask(segments, form))
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_document_alone_attends_as_behind_a_dense_mask(kv_heads: int) -> None:
    """Two rows that end and begin with the same number hold two documents."""
    segments = torch.tensor([[0] * 70 + [1] * 1 + [2] * 25 + [-1] * 4, [-1] * 99 + [0]])
    for ours, theirs in zip(*(_gradients(form, segments, kv_heads) for form in ("runs", "dense")), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_long_documents_are_taken_alone_and_short_ones_behind_a_mask() -> None:
    assert document_mask(torch.tensor([[0] * 90 + [1] * 60, [0] * 150])) == Runs((90, 60, 150))
    assert isinstance(document_mask(torch.arange(150)[None] // 10), torch.Tensor)
