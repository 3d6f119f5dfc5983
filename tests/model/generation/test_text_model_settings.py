"""What text models have otherwise than the paper's: the engine's pass computes what the Transformer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calumma.model.config import ModelConfig, RopeScaling
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes import decoder as passes
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.loading import read_transformer
from calumma.model.transformer import Transformer
from calumma.model.weights import LazyTensor, open_weights, write_weights

BIASES = {"query_key_value_bias": True, "attention_output_bias": True, "feed_forward_bias": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {"query_key_norm": "rms", "own_head_size": 12, "tied": True},
    "qwen2": {
        "query_key_norm": False,
        "query_key_value_bias": True,
        "rope_scaling": RopeScaling(kind="yarn", factor=4, original_context=16),
    },
    "biased": {"query_key_norm": False, "rope_scaling": RopeScaling(kind="linear", factor=2), **BIASES},
    "all": {"query_key_norm": "rms", "tied": True, "norm_order": "swin", **BIASES},
}
T = 40


@pytest.fixture(params=SETTINGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    shape = dict(vocabulary_size=50, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=64)
    return ModelConfig(**shape, **SETTINGS[request.param])


@pytest.fixture
def directory(config: ModelConfig, tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    transformer = Transformer(config)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    config.save(tmp_path)
    write_weights(tmp_path, {name: LazyTensor.of(tensor) for name, tensor in transformer.state_dict().items()})
    return tmp_path


def tokens() -> Tensor:
    return torch.randint(50, (T,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def by_the_engine(transformer: Transformer) -> Tensor:
    """Logits [T, V] of a prompt in two pieces, then a token at a time, over the paged cache."""
    config = transformer.config
    cache = PagedCache(config, 4, 16, dtype=transformer.embedding.weight.dtype)
    decoder, found, done = Decoder(transformer.eval()), [], 0
    for size in (20, 12, *[1] * (T - 32)):
        done += size
        sequence = Sequence(tokens()[:done].tolist(), blocks=[3, 1, 0, 2])
        sequence.cached = done - size
        layout = BatchLayout([(sequence, size)], 16)
        x_TD = decoder.hidden(tokens()[done - size : done], layout.step(cache, 0, torch.device("cpu")))
        found.append(decoder.logits(x_TD))
    return torch.cat(found)


@torch.inference_mode()
def at_once(transformer: Transformer) -> Tensor:
    logits = transformer.eval()(tokens()[None])
    assert isinstance(logits, Tensor)
    return logits[0]


def test_a_directory_holds_every_weight_once(directory: Path, config: ModelConfig) -> None:
    assert ("output.weight" in open_weights(directory)) is not config.tied
    transformer = read_transformer(directory)
    assert (transformer.output.weight is transformer.embedding.weight) is config.tied
    assert at_once(transformer).std() > 0.1


@pytest.mark.parametrize("fused", [True, False])
def test_the_paged_pass_is_the_whole_one(directory: Path, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(passes, "FUSED_BYTES", 0)
    transformer = read_transformer(directory)
    torch.testing.assert_close(by_the_engine(transformer), at_once(transformer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_matrices_in_8_bits_are_near(directory: Path, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(passes, "FUSED_BYTES", 0)
    exact, int8 = at_once(read_transformer(directory)), read_transformer(directory, int8=True)
    torch.testing.assert_close(by_the_engine(int8), at_once(int8), atol=1e-3, rtol=1e-3)
    assert torch.corrcoef(torch.stack([exact.flatten(), at_once(int8).flatten()]))[0, 1] > 0.99


def test_the_engines_pass_in_bfloat16(directory: Path) -> None:
    exact, half = at_once(read_transformer(directory)), read_transformer(directory, dtype=torch.bfloat16)
    assert torch.corrcoef(torch.stack([exact.flatten(), by_the_engine(half).flatten()]))[0, 1] > 0.99


def test_a_cast_leaves_a_tied_output_tied(config: ModelConfig) -> None:
    transformer = Transformer(config).to(torch.bfloat16).to_empty(device="cpu")
    assert (transformer.output.weight is transformer.embedding.weight) is config.tied
    assert len(dict(transformer.named_parameters())) == len(transformer.state_dict())
