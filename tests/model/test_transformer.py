"""Causality, cached decoding, document masks, norm orders, presets, compilation, stability instruments."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from calumma.model.config import ModelConfig, preset
from calumma.model.generation.cache.contiguous import ContiguousCache
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes import decoder as decoders
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.ops.attention import attend, document_mask, rotate
from calumma.model.ops.stability import BLOCK, OUTPUT
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


@variants
@settings(deadline=None, max_examples=15)
@given(data=st.data())
@torch.no_grad()
def test_cached_passes_equal_the_full_forward(changes: dict[str, object], data: st.DataObject) -> None:
    """Contexts in any blocks, taken in by parts of any size, side by side: prompts, single tokens, or nothing."""
    model, size = build(**changes), data.draw(st.integers(1, 8))
    contexts = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    full = model(contexts)
    blocks = iter(torch.randperm(3 * -(-20 // size)).tolist())
    cache = PagedCache(model.config, blocks=3 * -(-20 // size), block_size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders, "FUSED_BYTES", data.draw(st.sampled_from([0, 1 << 20])))
        decoder = Decoder(model)
    keeper = ContiguousCache(cache) if data.draw(st.booleans()) else None
    sequences = [Sequence(row.tolist(), 0, [next(blocks) for _ in range(-(-20 // size))]) for row in contexts]
    while any(sequence.pending for sequence in sequences):
        counts = data.draw(st.sampled_from([(1, 1, 1), (1, 1, 0), (0, 1, 5), (9, 1, 1), (3, 3, 3), (2, 0, 9)]))
        pairs = [(s, min(count, s.pending)) for s, count in zip(sequences, counts, strict=True)]
        pairs = [(sequence, count) for sequence, count in pairs if count] or [
            (s, s.pending) for s in sequences if s.pending
        ]
        layout = BatchLayout(pairs, size)
        states = decoder.hidden(torch.tensor(layout.tokens), layout.step(cache, 0, torch.device("cpu"), keeper))
        found = decoder.logits(states)
        for sequence, count in pairs:
            last, row = layout.last[id(sequence)], sequences.index(sequence)
            expected = full[row, sequence.cached : sequence.cached + count]
            assert torch.allclose(found[last - count + 1 : last + 1], expected, atol=1e-5)
            sequence.cached += count


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


@pytest.mark.parametrize(
    ("name", "millions", "within"),
    [
        ("chameleon-7b", 7040, 0.01),
        ("chameleon-34b", 34300, 0.01),
        ("calumma-20m", 20, 0.05),
        ("calumma-125m", 125, 0.05),
        ("calumma-350m", 350, 0.05),
        ("calumma-1.3b", 1300, 0.05),
    ],
)
def test_presets_have_the_sizes_in_their_names(name: str, millions: float, within: float) -> None:
    with torch.device("meta"):
        model = Transformer(preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=within)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(KeyError, match="chameleon-34b, chameleon-7b"):
        preset("chameleon-8b")
    with pytest.raises(ValidationError, match=r"no model preset 'x'; there are: calumma-1\.3b"):
        ModelConfig.model_validate({"preset": "x"})


def test_a_preset_can_be_named_and_changed_in_a_configuration() -> None:
    small = ModelConfig.model_validate({"preset": "calumma-125m", "context": 512, "vocabulary_size": 0})
    assert small == preset("calumma-125m").model_copy(update={"context": 512, "vocabulary_size": 0})
    assert ModelConfig.model_validate_json(small.model_dump_json()) == small


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_head_gives_the_logits_of_the_plain_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "PACKED_BYTES", 1)
    model = build().to(dtype)
    decoder, states = Decoder(model), model.hidden(torch.randint(V, (1, 9)))[0]
    for columns in (None, slice(7, 20), slice(3, 4)):
        for count in (1, 2, 9):
            found, expected = decoder.logits(states[:count], columns), model.output(states[:count], columns=columns)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    packed = [head is not None for head in decoder._packed.values()]
    assert packed == [decoders._onednn_takes(dtype)] * 3


@torch.no_grad()
def test_a_cached_pass_waits_for_no_device() -> None:
    """Fake tensors have no values: reading one, as the host does when it waits for a device, is an error."""
    with FakeTensorMode():
        model = build()
        cache, decoder = PagedCache(model.config, blocks=6, block_size=4), Decoder(model)
        layout = BatchLayout([(Sequence([1] * 7, 6, [3, 1]), 1), (Sequence([1] * 9, 3, [0, 2, 5]), 6)], 4)
        tokens = torch.zeros(7, dtype=torch.long)
        found = decoder.logits(decoder.hidden(tokens, layout.step(cache, 0, torch.device("cpu"))))
        assert found.shape == (7, V)
        with pytest.raises(DataDependentOutputException):
            found.max().item()


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


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_recomputed_activations_give_the_same_gradients(norm_order: str) -> None:
    """With dropout: what is computed again drops the same."""
    model, tokens = build(dropout=0.3, norm_order=norm_order).train(), torch.randint(V, (2, 13))
    kept = gradients(model, tokens)
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model.checkpoint_activations(), tokens)
    assert len(calls) == 2 * len(model.blocks)
    assert kept.keys() == again.keys() == dict(model.named_parameters()).keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient)
    gradients(model.checkpoint_activations(False), tokens)
    assert len(calls) == 3 * len(model.blocks)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_gradients() -> None:
    model, tokens = build(layers=3).train(), torch.randint(V, (2, 9))
    plain = gradients(model, tokens)
    names = list(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compiled = gradients(model.compile_blocks(), tokens)
    assert counters["stats"]["unique_graphs"] == 1  # equal blocks are compiled once
    assert list(model.state_dict()) == names
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_documents_as_the_dense_mask() -> None:
    """On the CPU FlexAttention runs as its own reference implementation: the mask is tested, not the kernel."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    segments = torch.tensor([[0] * 10 + [1] * 25 + [-1] * 5, [0] * 39 + [1]])
    dense, flex = (attend(q, k, v, document_mask(segments, flex=flex)) for flex in (False, True))
    torch.testing.assert_close(flex, dense)
    assert not torch.allclose(dense, attend(q, k, v, None), atol=1e-2)


# -- stability instruments --


def test_stability_instruments_measure_what_they_say() -> None:
    """Against the plain formulas, on a sequence so short that nothing is sampled."""
    model, tokens = build(), torch.randint(V, (2, 13))
    seen: dict[str, torch.Tensor] = {}
    first = model.blocks[0].attention

    def keep(name: str) -> Any:
        return lambda module, given, result: seen.__setitem__(name, result)

    first.query_norm.register_forward_hook(keep("q"))
    first.key_norm.register_forward_hook(keep("k"))
    with torch.no_grad():
        first.query_norm.weight *= 3
        logits = model(tokens[:, :-1])
        loss = model(
            tokens[:, :-1],
            targets=tokens[:, 1:],
            mask=torch.ones(2, 12, dtype=torch.bool),
            image_mask=torch.zeros(V, dtype=torch.bool),
            measure=True,
        )
    found = {name: float(value) for name, value in loss.stability.items()}
    assert found.keys() == {f"layer_{layer:02d}/{name}" for layer in (0, 1) for name in BLOCK} | set(OUTPUT)
    assert found["layer_00/query_norm"] == pytest.approx(float(seen["q"].norm(dim=-1).mean()), rel=1e-4)
    assert found["layer_00/key_norm"] == pytest.approx(float(seen["k"].norm(dim=-1).mean()), rel=1e-4)
    q, k = (rotate(seen[name], model.rope[None, :12]).transpose(1, 2) for name in "qk")
    scores = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2)) / 8**0.5
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    assert found["layer_00/attention_logit_max"] == pytest.approx(float(scores[:, :, causal].max()), rel=1e-4)
    assert found["log_z"] == pytest.approx(float(logits.logsumexp(-1).mean()), rel=1e-4)
    assert found["log_z_max"] == pytest.approx(float(logits.logsumexp(-1).max()), rel=1e-4)
    assert found["logit_norm"] == pytest.approx(float(logits.norm(dim=-1).mean()), rel=1e-4)
    assert found["layer_01/activation_rms"] > 0
    assert model.hidden(tokens).shape == (2, 13, 32)


def test_growing_states_are_seen() -> None:
    """What diverges shows in the instrument made for it."""
    tokens = torch.randint(V, (1, 13))

    def measured(change: Any) -> dict[str, float]:
        model = build(query_key_norm=False)
        with torch.no_grad():
            change(model)
        mask, image = torch.ones(1, 12, dtype=torch.bool), torch.zeros(V, dtype=torch.bool)
        loss = model(tokens[:, :-1], targets=tokens[:, 1:], mask=mask, image_mask=image, measure=True)
        return {name: float(value) for name, value in loss.stability.items()}

    calm = measured(lambda model: None)
    keys = measured(lambda model: model.blocks[1].attention.key.weight.mul_(100))
    assert keys["layer_01/key_norm"] == pytest.approx(100 * calm["layer_01/key_norm"], rel=1e-3)
    assert keys["layer_01/attention_logit_max"] > 50 * calm["layer_01/attention_logit_max"]
    head = measured(lambda model: model.output.weight.mul_(1000))
    assert head["logit_norm"] == pytest.approx(1000 * calm["logit_norm"], rel=1e-3)
    assert head["log_z_max"] > calm["log_z_max"] + 10
