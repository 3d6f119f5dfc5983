"""Adapters in folders that PEFT itself reads and writes: what it loads of ours, and we of its, says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from calumma.model.adapters.files import CONFIG, WEIGHTS, AdapterError, read_adapter, write_adapter
from calumma.model.config import ModelConfig
from calumma.model.ops.adapter import Adapter, LayerAdapter
from calumma.model.transformer import Transformer

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=32, vocabulary_size=50)
LAYERS = ["attention.query", "attention.key", "attention.value", "attention.output"]
LAYERS += ["feed_forward.gate", "feed_forward.up", "feed_forward.down"]
TOKENS = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(3))


def transformer(seed: int = 0) -> Transformer:
    return Transformer(SHAPE).initialize(seed).eval()


def adapter(
    rank: int = 3, scale: float = 0.7, dora: bool = False, layers: list[str] | None = None, seed: int = 5
) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    plain = transformer().state_dict()
    found = {}
    for name in layers or [f"blocks.{block}.{layer}" for block in range(2) for layer in LAYERS]:
        outputs, inputs = plain[f"{name}.weight"].shape
        magnitude = plain[f"{name}.weight"].norm(dim=1) * (0.5 + torch.rand(outputs, generator=random))
        found[name] = LayerAdapter(
            torch.randn(rank, inputs, generator=random) / 6,
            torch.randn(outputs, rank, generator=random) / 6,
            scale,
            magnitude if dora else None,
        )
    return Adapter(found)


def merged(found: Adapter, seed: int = 0) -> Transformer:
    model = transformer(seed)
    model.load_state_dict(found.merged(model.state_dict()))
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_what_is_written_and_gives_the_logits_of_the_merged_model(dora: bool, tmp_path: Path) -> None:
    ours = adapter(dora=dora)
    write_adapter(tmp_path / "adapter", ours, "base")
    theirs = peft.PeftModel.from_pretrained(transformer(), str(tmp_path / "adapter")).eval()  # type: ignore[arg-type]
    expected = merged(ours)(TOKENS)
    torch.testing.assert_close(theirs(TOKENS), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, transformer()(TOKENS), atol=0.05)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 9),
    alpha=st.floats(0.5, 40),
    rslora=st.booleans(),
    dora=st.booleans(),
    targets=st.lists(st.sampled_from(LAYERS), min_size=1, unique=True),
    lone=st.booleans(),
)
def test_what_peft_writes_is_read_as_it_was_meant(
    rank: int, alpha: float, rslora: bool, dora: bool, targets: list[str], lone: bool, tmp_path_factory: Any
) -> None:
    """Ranks and scales of single layers by patterns, too."""
    folder = tmp_path_factory.mktemp("peft")
    pattern: dict[str, Any] = {f"blocks.1.{targets[0]}": rank + 2} if lone else {}
    asked = peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, use_dora=dora, target_modules=targets,  # type: ignore[arg-type]
        rank_pattern=pattern, alpha_pattern=dict.fromkeys(pattern, alpha * 2), init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(rank)
    theirs = peft.get_peft_model(transformer(), asked).eval()  # type: ignore[arg-type]
    theirs.save_pretrained(str(folder))
    torch.testing.assert_close(merged(read_adapter(folder, SHAPE))(TOKENS), theirs(TOKENS), rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.lists(st.integers(1, 6), min_size=2, max_size=2), dora=st.booleans(), stabilized=st.booleans())
def test_reading_undoes_writing(ranks: list[int], dora: bool, stabilized: bool, tmp_path_factory: Any) -> None:
    layers = {}
    for rank, name in zip(ranks, ["blocks.0.attention.query", "blocks.1.feed_forward.down"], strict=True):
        layers |= adapter(rank, 0.25 * rank, dora, [name]).layers
    folder = tmp_path_factory.mktemp("adapter") / "a"
    write_adapter(folder, Adapter(layers), rank_stabilized=stabilized)
    found = read_adapter(folder, SHAPE)
    assert found.layers.keys() == layers.keys()
    for name, layer in found.layers.items():
        assert layer.scale == pytest.approx(layers[name].scale, rel=1e-5)
        assert torch.equal(layer.down_RI, layers[name].down_RI)
        assert torch.equal(layer.up_OR, layers[name].up_OR)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True, and blocks.0.attention.key does not agree"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", adapter())
    values = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(values | change))
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path / "a", SHAPE)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", adapter())
    with pytest.raises(AdapterError, match=r"blocks\.1\.attention\.key, which the model has not"):
        read_adapter(tmp_path / "a", SHAPE.model_copy(update={"layers": 1}))
    with pytest.raises(AdapterError, match=r"is \[32, 64\] in the model, and the adapter's is \[16, 32\]"):
        read_adapter(tmp_path / "a", SHAPE.model_copy(update={"width": 64}))
    with pytest.raises(AdapterError, match=r"holds no adapter: there is no adapter_config\.json"):
        read_adapter(tmp_path, SHAPE)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * torch.nan}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="values that are no numbers"):
        read_adapter(tmp_path / "a", SHAPE)
    (tmp_path / "a" / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="is not a readable safetensors file"):
        read_adapter(tmp_path / "a", SHAPE)
