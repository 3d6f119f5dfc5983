"""The instruments of stability measure what they say, and show a divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.ops.attention import rotate
from calumma.model.ops.stability import BLOCK, OUTPUT
from calumma.model.transformer import Transformer

V = 50


def build(**changes: object) -> Transformer:
    values: dict[str, object] = dict(
        vocabulary_size=V, layers=2, width=32, heads=4, kv_heads=2, ffn_width=40, context=24
    )
    return Transformer(ModelConfig(**{**values, **changes})).initialize(0).eval()


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
