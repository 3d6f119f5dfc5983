"""Packed documents that attend apart are learned as if each stood alone, with the loss that it has then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.config import ModelConfig
from calumma.model.encoding import EncodedArrays
from calumma.model.transformer import Transformer
from calumma.platform.tokenizing.packing import pack
from calumma.platform.training.steps.engine import losses
from calumma.platform.training.steps.held_out import HeldOutBatch

SHAPE = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=48, vocabulary_size=40, mask_documents=True
)
IMAGE_V = torch.arange(40) >= 30
MODEL = Transformer(SHAPE).initialize(3).eval()
# A token that nothing precedes in its document is never a target there: packed, something else would precede it.
documents = st.lists(st.lists(st.integers(3, 39), min_size=2, max_size=30), min_size=1, max_size=8)


def batch(rows: list[Any]) -> HeldOutBatch:
    masks = [row.loss_mask if row.loss_mask is not None else row.segments >= 0 for row in rows]
    columns = [np.stack([row.tokens for row in rows]), np.stack(masks), np.stack([row.segments for row in rows])]
    tokens, mask, segments = (torch.from_numpy(column) for column in columns)
    return HeldOutBatch(tokens.long(), mask, segments.long())


def encoded(ids: list[int]) -> EncodedArrays:
    trained = np.ones(len(ids), np.bool_)
    trained[0] = False
    return EncodedArrays(np.array(ids, np.int32), trained)


def scores(found: HeldOutBatch) -> torch.Tensor:
    with torch.no_grad():
        scored: torch.Tensor = MODEL(
            found.tokens[:, :-1], found.segments[:, :-1], targets=found.tokens[:, 1:], mask=found.mask[:, 1:],
            image_mask=IMAGE_V, scores=True,
        )  # fmt: skip
    return scored


@settings(max_examples=25, deadline=None)
@given(found=documents, alone=st.booleans())
def test_each_document_has_the_loss_that_it_has_alone(found: list[list[int]], alone: bool) -> None:
    rows = pack([encoded(ids) for ids in found], SHAPE.context + 1, pad=0, alone=alone)
    packed = batch(rows)
    scored, left = scores(packed), [list(ids) for ids in found]
    for tokens_T, segments_T, scores_T in zip(packed.tokens, packed.segments, scored, strict=True):
        for number in range(int(segments_T.max()) + 1):
            own = segments_T == number
            ids = tokens_T[own].tolist()
            left.remove(ids)
            loss = -float(scores_T[own[1:]].sum()) / (len(ids) - 1)
            [row] = pack([encoded(ids)], len(ids), pad=0)
            expected = -float(scores(batch([row])).sum()) / (len(ids) - 1)
            assert loss == pytest.approx(expected, abs=1e-6)
    assert not left
    assert len(rows) == len(found) if alone else len(rows) <= len(found)


def test_together_a_document_sees_those_before_it() -> None:
    """What the property is about: without the mask the second document's loss is another."""
    rows = pack([encoded([5, 6, 7]), encoded([8, 9, 10])], 9, pad=0)
    together = Transformer(SHAPE.model_copy(update={"mask_documents": False}))
    together.load_state_dict(MODEL.state_dict())
    apart, mixed = (float(losses(m, batch(rows), IMAGE_V).sums.text_nll) for m in (MODEL, together))
    assert abs(apart - mixed) > 1e-4
