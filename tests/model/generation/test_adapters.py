"""Adapters side by side in one engine: each request gets what it would get alone, of a model that its adapter is merged
into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.ops.adapter import Adapter, LayerAdapter
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 4
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
PROMPTS = [[V.bos, 15, 20, 17], [V.bos, 15, 20, 17, 22, 16], [V.bos, 4, 7, 9, 14, 8, 5, 18]]
NAMES = ["", "one", "two", "lengths"]


def adapter(model: Transformer, seed: int, layers: list[str], dora: bool = False, rank: int = 3) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name.endswith(layer) for layer in layers):
            outputs, inputs = module.weight.shape
            found[name] = LayerAdapter(
                torch.randn(rank, inputs, generator=random) / 4,
                torch.randn(outputs, rank, generator=random) / 4,
                1.5,
                module.weight.detach().norm(dim=1) * (0.5 + torch.rand(outputs, generator=random)) if dora else None,
            )
    return Adapter(found)


@pytest.fixture(scope="module")
def base(make_transformer: Any) -> Transformer:
    found: Transformer = make_transformer(30, bias={V.begin_image: 2.0, V.eos: -3.0, V.end_turn: -3.0})
    return found


@pytest.fixture(scope="module")
def adapters(base: Transformer) -> dict[str, Adapter]:
    return {
        "one": adapter(base, 1, ["query", "value", "down"]),
        "two": adapter(base, 2, ["key", "attention.output", "gate", "up"], rank=5),
        "lengths": adapter(base, 3, ["query", "key", "down"], dora=True, rank=1),
    }


@pytest.fixture(scope="module")
def merged(base: Transformer, adapters: dict[str, Adapter], make_transformer: Any) -> dict[str, Transformer]:
    found = {"": base}
    for name, each in adapters.items():
        found[name] = make_transformer(30, bias={V.begin_image: 2.0, V.eos: -3.0, V.end_turn: -3.0})
        found[name].load_state_dict(each.merged(base.state_dict()))
    return found


def request(id: str, prompt: int, name: str, heat: float = 0.0, **more: Any) -> Request:
    text, image = PhaseSampling(temperature=heat), PhaseSampling(temperature=heat)
    params = SamplingParams(max_tokens=14, mode="interleaved", max_images=1, text=text, image=image, seed=3)
    return Request(id, PROMPTS[prompt], params, adapter=name, **more)


def answers(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {each.id: [] for each in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for event in engine.step():
            assert event.failure is None
            found[event.request_id] += event.tokens
    return found


@pytest.mark.parametrize("graphs", [False, True])
def test_base_and_adapters_in_one_batch_answer_as_each_alone(
    graphs: bool, base: Transformer, adapters: dict[str, Adapter], merged: dict[str, Transformer]
) -> None:
    asked = [request(f"{name}{prompt}", prompt, name) for name in NAMES for prompt in range(len(PROMPTS))]
    found = answers(Engine(base, V, N, adapters=adapters, cuda_graphs=graphs), *asked)
    for each in asked:
        plain = replace(each, adapter="")
        assert found[each.id] == answers(Engine(merged[each.adapter], V, N), plain)[each.id], each.id
    assert len({tuple(found[f"{name}0"]) for name in NAMES}) == len(NAMES)  # or it would show nothing


def test_equal_prompts_of_different_adapters_share_nothing(
    base: Transformer, adapters: dict[str, Adapter], merged: dict[str, Transformer]
) -> None:
    """One after the other, so that the second could find what the first has computed."""
    engine = Engine(base, V, N, adapters=adapters, block_size=2)
    for name in [*NAMES, *NAMES]:
        found = answers(engine, request("r", 1, name))["r"]
        assert found == answers(Engine(merged[name], V, N), request("r", 1, ""))["r"], name
    assert engine.statistics.prefix_hit_tokens > 0  # of the second round


@settings(max_examples=15, deadline=None)
@given(
    mix=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2)), min_size=1, max_size=6), window=st.integers(0, 3)
)
def test_any_mix_gives_each_what_it_gets_alone(
    mix: list[tuple[str, int]], window: int, base: Transformer, adapters: dict[str, Adapter]
) -> None:
    """With few blocks, so that requests are taken out and in again, and with drafted codes."""
    asked = [request(f"{number}", prompt, name, 0.8) for number, (name, prompt) in enumerate(mix)]
    options: dict[str, Any] = {"adapters": adapters, "jacobi_window": window}
    tight = answers(Engine(base, V, N, 3, cache_tokens=96, block_size=8, **options), *asked)
    for each in asked:
        assert tight[each.id] == answers(Engine(base, V, N, **options), each)[each.id]


def test_what_cannot_be_served_is_refused(base: Transformer, adapters: dict[str, Adapter]) -> None:
    with pytest.raises(ValueError, match="there is no adapter 'three'; there are: one, two, lengths"):
        Engine(base, V, N, adapters=adapters).add(request("r", 0, "three"))
    whole = replace(adapters["one"], whole={"output.weight": base.output.weight.detach()})
    head = Adapter({"output": LayerAdapter(torch.zeros(1, 32), torch.zeros(30, 1), 1.0)})
    for changed in (whole, head):
        with pytest.raises(ValueError, match=r"'one' changes output.*, which is not served beside others: merge it"):
            Engine(base, V, N, adapters={"one": changed})
    with pytest.raises(ValueError, match=r"the adapter 'far': it adapts blocks\.7"):
        Engine(
            base, V, N, adapters={"far": Adapter({"blocks.7.x": adapters["one"].layers["blocks.0.attention.query"]})}
        )
