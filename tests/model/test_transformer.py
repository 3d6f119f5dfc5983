"""Causality, cached decoding, document masks, norm orders, presets, compilation, stability instruments."""

from __future__ import annotations

import shutil
from typing import Literal

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer

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


def test_documents_do_not_see_each_other_when_masked() -> None:
    model = build(mask_documents=True)
    first, second = torch.randint(V, (1, 6)), torch.randint(V, (1, 8))
    packed = torch.cat([first, second], dim=1)
    segments = torch.tensor([[0] * 6 + [1] * 8])
    alone = model(second)  # rotary positions are relative, so the offset changes nothing
    assert torch.allclose(model(packed, segments)[:, 6:], alone, atol=1e-5)
    assert not torch.allclose(build()(packed, segments)[:, 6:], alone, atol=1e-3)


def test_lengths_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the model's context of 24"):
        build()(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_dropout_acts_in_training_alone_and_on_all_that_joins_the_residual_stream(norm_order: str) -> None:
    model, tokens = build(dropout=0.5, norm_order=norm_order), torch.randint(V, (1, 8))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    for block in model.blocks:
        block.dropout = 1.0  # what attention and feed-forward give is lost
    assert torch.equal(model.hidden(tokens), model.norm(model.embedding(tokens)))


def test_initialization_is_a_function_of_the_seed() -> None:
    one, same = build().state_dict(), build().state_dict()
    other = build().initialize(1).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_initialization_keeps_the_variance_of_the_residual_stream() -> None:
    """GPT-2's: 0.02, and 0.02 / sqrt(2 layers) for what is added to the stream; norms at 1 and 0."""
    model = build(layers=8, width=64, ffn_width=128)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight"))))
        else:
            adds = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            assert float(weight.detach().std()) == pytest.approx(0.02 / 4 if adds else 0.02, rel=0.1), name


# -- what is needed of the output, and when --


def test_only_the_needed_logits_are_computed() -> None:
    model, tokens = build(), torch.randint(V, (2, 9))
    needed = torch.tensor([[8, 0], [3, 4]])
    found = model(tokens, needed=needed)
    assert found.shape == (2, 2, V)
    assert torch.allclose(found, model(tokens)[torch.arange(2)[:, None], needed], atol=1e-6)
    assert torch.allclose(model.output(model.hidden(tokens)), model(tokens))


def test_only_some_columns_of_the_logits_are_computed() -> None:
    model, tokens = build(), torch.randint(V, (2, 9))
    states = model.hidden(tokens)
    assert torch.allclose(model.output(states, columns=slice(7, 20)), model(tokens)[..., 7:20], atol=1e-6)


# -- the same numbers by other ways --


def gradients(
    model: Transformer, tokens: torch.Tensor, segments: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Of the loss, in training, by weight."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(
        tokens[:, :-1],
        segments,
        targets=tokens[:, 1:],
        mask=tokens[:, 1:] % 3 > 0,
        image_mask=torch.arange(V) < 20,
        z_loss=1e-2,
        normalizer=7.0,
        measure=True,
    )
    loss.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recomputed", [True, "selective"])
@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_recomputed_activations_give_the_same_gradients(
    norm_order: str, recomputed: bool | Literal["selective"]
) -> None:
    """With dropout: what is computed again drops the same."""
    model, tokens = build(dropout=0.3, norm_order=norm_order).train(), torch.randint(V, (2, 13))
    kept = gradients(model, tokens)
    calls = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model.checkpoint_activations(recomputed), tokens)
    assert len(calls) == 2 * len(model.blocks)
    assert kept.keys() == again.keys() == dict(model.named_parameters()).keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient)
    gradients(model.checkpoint_activations(False), tokens)
    assert len(calls) == 3 * len(model.blocks)


def test_selective_recomputation_multiplies_no_matrices_again() -> None:
    model, tokens = build().train(), torch.randint(V, (2, 13))

    def flops(recomputed: bool | Literal["selective"]) -> int:
        with FlopCounterMode(display=False) as counted:
            gradients(model.checkpoint_activations(recomputed), tokens)
        return counted.get_total_flops()

    assert flops(False) == flops("selective") < flops(True)


@pytest.mark.parametrize("recomputed", [False, "selective"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_gradients(recomputed: bool | Literal["selective"]) -> None:
    model, tokens = build(layers=3).train(), torch.randint(V, (2, 9))
    plain = gradients(model, tokens)
    model.checkpoint_activations(recomputed)
    names = list(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compiled = gradients(model.compile_blocks(), tokens)
    assert counters["stats"]["unique_graphs"] == 1  # equal blocks are compiled once
    assert list(model.state_dict()) == names
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


# -- stability instruments --
