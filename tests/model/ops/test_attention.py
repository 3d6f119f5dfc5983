"""Masks of attention within documents."""

from __future__ import annotations

import pytest
import torch

from calumma.model.ops.attention import attend, document_mask


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_documents_as_the_dense_mask() -> None:
    """On the CPU FlexAttention runs as its own reference implementation: the mask is tested, not the kernel."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    segments = torch.tensor([[0] * 10 + [1] * 25 + [-1] * 5, [0] * 39 + [1]])
    dense, flex = (attend(q, k, v, document_mask(segments, flex=flex)) for flex in (False, True))
    torch.testing.assert_close(flex, dense)
    assert not torch.allclose(dense, attend(q, k, v, None), atol=1e-2)
