"""Causality, cached decoding, document masks, norm orders, losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.config import ModelConfig, preset
from calumma.model.loss import sums
from calumma.model.transformer import KVCache, Transformer

V = 50


def build(**changes: object) -> Transformer:
    values: dict[str, object] = dict(
        vocabulary_size=V, layers=2, width=32, heads=4, kv_heads=2, ffn_width=40, context=24
    )
    return Transformer(ModelConfig(**{**values, **changes})).initialize(0).eval()


variants = pytest.mark.parametrize(
    "changes", [{}, {"norm_order": "swin"}, {"query_key_norm": False}, {"kv_heads": 4}, {"kv_heads": 1}]
)


@variants
def test_a_later_token_changes_no_earlier_logit(changes: dict[str, object]) -> None:
    model, tokens = build(**changes), torch.randint(V, (2, 16))
    before = model(tokens)
    for position in (1, 7, 15):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % V
        after = model(changed)
        assert torch.allclose(after[:, :position], before[:, :position], atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-4)


@variants
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_cached_decoding_equals_the_full_forward(changes: dict[str, object], data: st.DataObject) -> None:
    """Rows of different lengths in any slots, prefilled in chunks with padding on the right, then token by token."""
    model = build(**changes)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    slots = data.draw(st.permutations(range(4)))[: len(lengths)]
    tokens = torch.randint(
        V, (len(lengths), 20), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    cache = KVCache(model.config, slots=4, length=24)
    where, start = torch.tensor(slots), torch.zeros(len(lengths), dtype=torch.long)
    full = model(tokens)
    prefill = model(tokens[:, : max(lengths)], cache=cache, slots=where, start=start)
    for row, length in enumerate(lengths):
        assert torch.allclose(prefill[row, :length], full[row, :length], atol=1e-5)
    start = torch.tensor(lengths)
    for _ in range(5):
        step = model(tokens.gather(1, start[:, None]), cache=cache, slots=where, start=start)
        assert torch.allclose(step[:, 0], full[torch.arange(len(lengths)), start], atol=1e-5)
        start = start + 1


def test_documents_do_not_see_each_other_when_masked() -> None:
    model = build(mask_documents=True)
    first, second = torch.randint(V, (1, 6)), torch.randint(V, (1, 8))
    packed = torch.cat([first, second], dim=1)
    segments = torch.tensor([[0] * 6 + [1] * 8])
    alone = model(second)  # rotary positions are relative, so the offset changes nothing
    assert torch.allclose(model(packed, segments)[:, 6:], alone, atol=1e-5)
    assert not torch.allclose(build()(packed, segments)[:, 6:], alone, atol=1e-3)


def test_lengths_beyond_the_context_or_cache_are_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="more than the model's context of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    cache = KVCache(model.config, slots=1, length=8)
    zero = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="beyond the cache"):
        model(torch.zeros(1, 9, dtype=torch.long), cache=cache, slots=zero, start=zero)


def test_dropout_acts_in_training_alone() -> None:
    model, tokens = build(dropout=0.5), torch.randint(V, (1, 8))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_initialization_is_a_function_of_the_seed() -> None:
    one, same = build().state_dict(), build().state_dict()
    other = build().initialize(1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize(("name", "billions"), [("chameleon-7b", 7.04), ("chameleon-34b", 34.3)])
def test_the_published_shapes_have_their_sizes(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = Transformer(preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(KeyError, match="chameleon-34b, chameleon-7b"):
        preset("chameleon-8b")


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_losses_equal_their_definitions(seed: int) -> None:
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
