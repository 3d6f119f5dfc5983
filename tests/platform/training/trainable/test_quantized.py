"""Adapters on weights of few bits: the products are those of torchao's own dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchao.quantization import Int8Tensor, PerRow, to_nf4

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.specification import SpecificationError
from calumma.platform.training.forecast import shape
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.trainable import parameters, quantized

SHAPE = ModelConfig(
    layers=2, width=64, heads=4, kv_heads=2, ffn_width=128, context=32, vocabulary_size=50, query_key_value_bias=True
)
VOCABULARY = Vocabulary(
    size=50, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(40, 48))
)
TOKENS = torch.arange(60).view(2, 30) % 50

Stage = Callable[..., PretrainSpecification]


def of_torchao(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 4:
        stored = to_nf4(weight_OI, 64, weight_OI.numel() // 64)
        return stored.get_original_weight()  # type: ignore[no-any-return]
    return Int8Tensor.from_hp(weight_OI, PerRow()).dequantize()  # type: ignore[no-any-return]


def prepared(spec: PretrainSpecification) -> tuple[Transformer, Transformer]:
    """A model made ready for a stage, and a plain one with what torchao makes of its weights."""
    assert spec.lora is not None
    assert spec.lora.quantize is not None
    plain = Transformer(SHAPE).initialize(0)
    for name, value in plain.named_parameters():  # biases that count
        if name.endswith("bias"):
            value.data.normal_(generator=torch.Generator().manual_seed(1))
    trained = Transformer(SHAPE)
    trained.load_state_dict(plain.state_dict())
    trained = parameters.set_trainable(trained, spec, VOCABULARY)
    weights = dict(plain.named_parameters())
    for name, stored in quantized.weights_of(trained).items():
        stored.store(weights[name].detach())
        weights[name].data = of_torchao(weights[name].detach(), spec.lora.quantize)
    return trained, plain


@pytest.mark.parametrize("targets", [["blocks.*"], ["blocks.*.attention.query"]])
@pytest.mark.parametrize(("bits", "farthest"), [(4, 0.2), (8, 0.01)])
def test_logits_are_those_of_the_dequantized_weights(
    stage: Stage, bits: int, farthest: float, targets: list[str]
) -> None:
    trained, plain = prepared(stage(initial="m", model=None, lora={"quantize": bits, "targets": targets}))
    assert set(quantized.weights_of(trained)) == {
        f"blocks.{layer}.{name}.weight" for layer in range(2) for name in shape.block_matrices(SHAPE)
    }
    torch.testing.assert_close(trained(TOKENS), plain(TOKENS), rtol=0, atol=1e-6)
    whole = Transformer(SHAPE).initialize(0).blocks[0].get_submodule("feed_forward.up").weight
    lost = (plain.blocks[0].get_submodule("feed_forward.up").weight - whole).norm() / whole.norm()
    assert 0 < lost < farthest


@pytest.mark.parametrize("fields", [{"quantize": 4}, {"quantize": 8}, {"quantize": 4, "dora": True}])
def test_adapters_learn_as_on_plain_weights_of_these_values(stage: Stage, fields: dict[str, Any]) -> None:
    spec = stage(initial="m", model=None, lora=fields)
    trained, plain = prepared(spec)
    same = stage(initial="m", model=None, lora=fields | {"quantize": None})
    beside = parameters.set_trainable(plain, same, VOCABULARY)
    if "dora" in fields:  # they begin as the lengths of the weights before these were quantized
        for name, value in trained.named_parameters():
            if name.endswith("magnitude"):
                value.data.copy_(beside.get_parameter(name))
    for model in (trained, beside):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            model(TOKENS).logsumexp(-1).mean().backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    found = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    assert found
    assert all(name.rpartition(".")[2].startswith("lora_") for name in found)
    for name, value in found.items():
        torch.testing.assert_close(value, beside.get_parameter(name), rtol=1e-4, atol=1e-6)
    weights = dict(trained.state_dict()) | quantized.dequantized(trained)
    merged = Transformer(SHAPE)
    merged.load_state_dict(parameters.plain_weights(weights, spec, VOCABULARY))
    torch.testing.assert_close(merged(TOKENS), trained(TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_forecast_counts_the_bytes_that_are_stored(stage: Stage, bits: int) -> None:
    spec = stage(initial="m", model=None, lora={"quantize": bits, "rank": 2})
    trained, _ = prepared(spec)
    sizes, stored = shape.Sizes.of(SHAPE, spec), quantized.weights_of(trained).values()
    assert sizes.quantized == sum(weight.numel for weight in stored)
    found = shape.quantized_bytes(SHAPE, bits, 4, sizes.quantized)
    # scales of scales are few, and fewer than one for each of these small matrices there are not
    assert found == pytest.approx(sum(weight.bytes() for weight in stored), rel=0.005)
    assert sizes.total + sizes.added - sizes.quantized == sum(p.numel() for p in trained.parameters())


def test_what_cannot_be_quantized_is_refused(stage: Stage) -> None:
    with pytest.raises(ValueError, match="needs `initial`"):
        stage(lora={"quantize": 4})
    with pytest.raises(SpecificationError, match=r"6 x 10 is no multiple of 64 numbers; use 8 bits"):
        quantized.QuantizedWeight(4, (6, 10))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_blocks_that_are_all_alike_are_kept(bits: quantized.Bits, value: float) -> None:
    """What their scales are told apart by is then 0, and divided by."""
    weight = quantized.QuantizedWeight(bits, (8, 64))
    weight.store(torch.full((8, 64), value))
    torch.testing.assert_close(weight.dequantized(torch.float32), torch.full((8, 64), value), rtol=0, atol=value / 250)
