"""The cache fills what a device has left, as told by arithmetic and by one pass; nothing then runs out of memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calumma.model.config import ModelConfig, preset
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams, Shard
from calumma.model.generation.cache import contiguous, sizing
from calumma.model.generation.cache.device_memory import HostMemory, MemoryBudget
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sizing import Footprint, Workload, pass_bytes, weight_bytes
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.profiling import MemoryShort, largest_pass
from calumma.model.loading import described
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from tests.model.generation.conftest import MakeTransformer, RunEngine
from tests.model.generation.memory_device import CountedDevice

HALF = torch.bfloat16
KILOBYTES = 650
WORKLOAD = Workload(max_sequences=16, prefill_tokens=2048, graphs=True)
V = Vocabulary(
    size=29, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)


def unread(config: ModelConfig, int8: bool) -> Transformer:
    """In bfloat16; within FakeTensorMode without memory, but with all that tensors know of theirs."""
    transformer = described(config, int8)
    for name, weight in list(transformer.named_parameters()):
        path, _, attribute = name.rpartition(".")
        dtype = weight.dtype if weight.dtype == torch.int8 or attribute == "scale" else HALF
        own = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device="cpu"), requires_grad=False)
        setattr(transformer.get_submodule(path), attribute, own)
    transformer.rebuild_rope("cpu")
    return transformer.eval()


@pytest.mark.parametrize(("name", "bfloat16", "int8"), [("chameleon-7b", 14.0, 7.6), ("chameleon-34b", 68.6, 35.4)])
def test_weights_of_the_published_shapes(name: str, bfloat16: float, int8: float) -> None:
    """7.0 and 34.3 billion; embedding and output projection stay in bfloat16."""
    config = preset(name)
    assert weight_bytes(config, HALF) / 1e9 == pytest.approx(bfloat16, abs=0.05)
    assert weight_bytes(config, HALF, int8=True) / 1e9 == pytest.approx(int8, abs=0.05)
    halves = [weight_bytes(config, HALF, shard=Shard(index, 2)) for index in (0, 1)]
    assert halves[0] == pytest.approx(weight_bytes(config, HALF) / 2, rel=1e-3)
    assert halves[0] == halves[1]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["chameleon-7b", "chameleon-34b"])
def test_the_largest_pass_of_the_published_shapes_takes_what_is_counted_for_it(name: str, int8: bool) -> None:
    """Every tensor of the real shapes is made, without its memory. A pass's need does not grow with the layers."""
    config = preset(name).model_copy(update={"layers": 2})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        transformer, device = unread(config, int8), CountedDevice(10**12)
        with device:
            device.hold(list(transformer.parameters()))
            assert device.used == weight_bytes(config, HALF, int8)
            decoder, blocks = Decoder(transformer), -(-config.context // 32)

            def work() -> None:
                largest_pass(decoder, PagedCache(config, blocks, 32, "cpu", HALF), WORKLOAD)

            taken = device.peak(work)
    assert taken is not None
    taken -= config.context * Footprint.of(config, HALF, int8, WORKLOAD).position
    assert taken <= pass_bytes(config, HALF, int8, WORKLOAD) <= 2 * taken


footprints = st.builds(
    Footprint,
    weights=st.just(0),
    activations=st.just(0),
    position=st.integers(1, 10**6),
    gathered=st.integers(0, 10**5),
    most_gathered=st.integers(0, 10**6),
    margin=st.just(0),
)


@given(footprint=footprints, left=st.integers(-(10**9), 10**12))
def test_as_many_positions_as_fit_and_no_more(footprint: Footprint, left: int) -> None:
    positions = footprint.positions(left)
    assert positions == 0 or footprint.cache(positions) <= left
    assert footprint.cache(positions + 1) > left


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins for a small device, which has no second copies of keys."""
    monkeypatch.setattr(sizing, "HOST_BYTES", 60_000)
    monkeypatch.setattr(contiguous, "CONTIGUOUS_BYTES", 0)


def busy() -> list[Request]:
    """Long texts, and guided images after pictures; all in different contexts."""
    image = [V.begin_image, 7, 9, 14, 8, V.end_image]
    params: list[dict[str, Any]] = [
        {"max_tokens": 60, "mode": "text", "text": PhaseSampling(1.0)},
        {"max_tokens": 20, "mode": "interleaved", "prefix": (V.begin_image,), "image": PhaseSampling(1.0)},
    ]
    return [
        Request(str(n), [V.bos, *image, *[15 + (n + i) % 14 for i in range(30 + n)]], SamplingParams(**params[n % 2]))
        for n in range(6)
    ]


@pytest.mark.usefixtures("small")
def test_an_engine_fills_its_share_of_a_device_and_never_runs_out_of_memory(
    make_transformer: MakeTransformer, run_engine: RunEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Six requests, three of them with guidance, in a cache that they nearly outgrow together."""
    caplog.set_level(logging.INFO)
    bias = {V.eos: -100.0, V.end_turn: -100.0}  # answers end at their length
    transformer, device = make_transformer(V.size, bias=bias, context=128), CountedDevice(KILOBYTES * 1000)
    with device:
        device.hold(list(transformer.parameters()))
        memory = MemoryBudget(device, share=0.9)
        options: dict[str, Any] = {"max_sequences": 6, "prefill_tokens": 64, "memory": memory}
        engine = Engine(transformer, V, 4, kernels="torch", **options)  # gathers, as is counted
        answers = run_engine(engine, *busy())
    now = engine.statistics
    assert {events[-1].finish for events in answers.values()} == {"length"}
    assert now.counters.failed == 0
    assert f"a cache of {now.blocks * now.block_size} positions" in caplog.text
    assert 0.65 * 900 * KILOBYTES <= device.most <= 900 * KILOBYTES


@pytest.mark.usefixtures("small")
def test_a_large_device_is_filled_no_further_than_is_of_use(make_transformer: MakeTransformer) -> None:
    transformer, device = make_transformer(V.size, context=128), CountedDevice(10**9)
    engine = Engine(transformer, V, 4, memory=MemoryBudget(device, most=999))
    assert engine.statistics.blocks * engine.statistics.block_size == 992


@pytest.mark.usefixtures("small")
def test_a_device_without_room_for_a_context_is_refused_with_the_numbers(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(V.size, context=128)
    device = CountedDevice(300_000)
    device.hold(list(transformer.parameters()))
    with pytest.raises(MemoryShort, match=r"room for \d+ positions, less than a context of 128.*weights 0\.1 MB"):
        Engine(transformer, V, 4, prefill_tokens=64, memory=MemoryBudget(device))


def test_a_share_is_of_all_that_is_there_or_of_ones_own_part() -> None:
    device = CountedDevice(1000)
    device.used = 300  # 200 of which are the engine's
    assert MemoryBudget(device, 0.9).left(200) == 600
    assert MemoryBudget(device, 0.9, part=0.5, alone=False, reserved=50).left(200) == 200
    device.used = 900
    assert MemoryBudget(device, 0.9, part=0.5, alone=False, reserved=50).left(200) == 100
    host = HostMemory()
    assert 0 < host.free() <= host.total
