"""The decoder's passes over the paged cache give what the Transformer's full forward gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from calumma.model.config import ModelConfig
from calumma.model.generation.attention.native import NativeReader
from calumma.model.generation.cache.contiguous import ContiguousCache
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes import decoder as decoders
from calumma.model.generation.passes import head as heads
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout
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
        decoder = Decoder(model, kernels=data.draw(st.sampled_from(["auto", "torch"])))
    keeper = ContiguousCache(cache) if data.draw(st.booleans()) else None
    native = decoder.operations.native
    reader = (
        NativeReader(native, data.draw(st.sampled_from([1, 3, 16]))) if native and data.draw(st.booleans()) else None
    )
    sequences = [Sequence(row.tolist(), 0, [next(blocks) for _ in range(-(-20 // size))]) for row in contexts]
    while any(sequence.pending for sequence in sequences):
        counts = data.draw(st.sampled_from([(1, 1, 1), (1, 1, 0), (0, 1, 5), (9, 1, 1), (3, 3, 3), (2, 0, 9)]))
        pairs = [(s, min(count, s.pending)) for s, count in zip(sequences, counts, strict=True)]
        pairs = [(sequence, count) for sequence, count in pairs if count] or [
            (s, s.pending) for s in sequences if s.pending
        ]
        layout = BatchLayout(pairs, size)
        states = decoder.hidden(torch.tensor(layout.tokens), layout.step(cache, 0, torch.device("cpu"), keeper, reader))
        found = decoder.logits(states)
        for sequence, count in pairs:
            last, row = layout.last[id(sequence)], sequences.index(sequence)
            expected = full[row, sequence.cached : sequence.cached + count]
            assert torch.allclose(found[last - count + 1 : last + 1], expected, atol=1e-5)
            sequence.cached += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_head_gives_the_logits_of_the_plain_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LEAST_BYTES", 1)
    model = build().to(dtype)
    decoder, states = Decoder(model), model.hidden(torch.randint(V, (1, 20)))[0]
    for choice in ("native", "packed", "plain"):
        decoder.products.choice = (choice,) * 3
        for columns in (None, slice(7, 20), slice(3, 4)):
            for count in (1, 2, 20):
                found, expected = decoder.logits(states[:count], columns), model.output(states[:count], columns=columns)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    packed = [head is not None for head in decoder.products._packed.values()]
    assert packed == [heads._onednn_takes(dtype)] * 3


def test_logits_are_by_whose_product_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LEAST_BYTES", 1)
    times = iter([3, 1, 2, 1, 2, 3, 3, 2, 1])  # ours, packed, plain; of 1 state, a few, many
    monkeypatch.setattr(heads, "_seconds", lambda *given: next(times))
    assert Decoder(build(vocabulary_size=32), kernels="auto").products.choice == ("packed", "native", "plain")
    assert Decoder(build(vocabulary_size=32), kernels="native").products.choice == ("native",) * 3
    assert Decoder(build(vocabulary_size=32), kernels="torch").products.choice == ("plain", "packed", "packed")


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
