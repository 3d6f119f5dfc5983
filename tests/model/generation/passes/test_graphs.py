"""Decode passes of fixed shapes, as they are recorded on a GPU, give what others do; here they run unrecorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.generation.attention.flex import FlexReader
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.graphs import SEQUENCES, FixedShapePass
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
# bos is not 0: the rows that fill a pass up carry id 0 at position 0, and would write what bos has there
V = Vocabulary(
    size=28, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)


@pytest.fixture(scope="module")
def transformer(make_transformer: Callable[..., Transformer]) -> Transformer:
    made = make_transformer(V.size, seed=3)
    with torch.no_grad():
        made.output.weight[[V.eos, V.end_turn]] = 0  # seldom the likeliest
    return made


def answers(engine: Engine, count: int) -> dict[str, list[int]]:
    """A third each of text, guided images and both, a new one at every other step."""
    found: dict[str, list[int]] = {}
    for number in range(count):
        mode: Any = ("text", "image", "interleaved")[number % 3]
        params = SamplingParams(
            5 + number % 30, mode, text=PhaseSampling(1.2, 0.9), image=PhaseSampling(1.0), seed=number
        )
        prompt = [V.bos, *(15 + (number + k) % 12 for k in range(number % 9))]
        engine.add(Request(str(number), prompt, params))
        for event in engine.step() if number % 2 else []:
            found.setdefault(event.request_id, []).extend(event.tokens)
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request_id, []).extend(event.tokens)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 4, "cache_tokens": 184}, {"image_burst": 1, "max_sequences": 3}]
)
def test_fixed_shapes_draw_the_same_tokens(transformer: Transformer, options: dict[str, int]) -> None:
    """Also where the cache is too small for all, whose blocks change hands."""
    settings = {"block_size": 8, "max_sequences": 20, **options}
    plain, fixed = (Engine(transformer, V, N, cuda_graphs=on, **settings) for on in (None, True))  # type: ignore[arg-type]
    assert answers(fixed, 24) == answers(plain, 24)
    graphs = fixed._runner.graphs
    assert graphs is not None
    assert plain._runner.graphs is None
    shapes = list(graphs.passes)
    assert len(shapes) > 3
    assert all(B in SEQUENCES and M in (1, 2, 4, 8, 16) for B, M in shapes)
    assert fixed.statistics.blocks == plain.statistics.blocks


@torch.no_grad()
def test_what_fills_a_pass_up_writes_to_the_block_that_nobody_owns_alone(transformer: Transformer) -> None:
    """Three sequences run as four: the cache changes where the three have their next token, and in its last block."""
    engine = Engine(transformer, V, N, block_size=8, cache_tokens=128, cuda_graphs=True)
    graphs, cache = engine._runner.graphs, engine._runner.cache
    assert graphs is not None
    cache.store.normal_(generator=torch.Generator().manual_seed(0))
    sequences = [
        Sequence([V.bos, *range(15, 27)], cached, blocks) for cached, blocks in ((9, [3, 5]), (1, [0]), (7, [2]))
    ]
    layout = BatchLayout([(sequence, 1) for sequence in sequences], cache.block_size)
    before = cache.store.clone()
    graphs.hidden(torch.tensor(layout.tokens), layout, 0)
    assert list(graphs.passes) == [(4, 2)]
    changed = (cache.store != before).sum((0, 1, 4, 5)).nonzero().tolist()  # [block, offset], in any layer or head
    assert changed == [[0, 1], [2, 7], [5, 1], [cache.blocks - 1, 0]]


def test_a_shape_reads_its_inputs_where_they_were_when_it_was_recorded(transformer: Transformer) -> None:
    """A recorded pass repeats its kernels on the same memory: other inputs must come to the same places."""
    engine = Engine(transformer, V, N, block_size=8, cuda_graphs=True)
    answers(engine, 2)
    graphs = engine._runner.graphs
    assert graphs is not None
    inputs = ("tokens_B", "positions_B", "slots_B", "tables_BM")
    before = {shape: [getattr(fixed, name).data_ptr() for name in inputs] for shape, fixed in graphs.passes.items()}
    answers(engine, 6)
    for shape, places in before.items():
        assert [getattr(graphs.passes[shape], name).data_ptr() for name in inputs] == places


def test_more_sequences_than_are_recorded_run_as_ever(transformer: Transformer) -> None:
    count = SEQUENCES[-1] + 1
    engine = Engine(transformer, V, N, max_sequences=count, cuda_graphs=True)
    for number in range(count):
        engine.add(Request(str(number), [V.bos, 15 + number % 12], SamplingParams(4, seed=number)))
    events = [event for _ in iter(lambda: engine.has_work, False) for event in engine.step()]
    assert len({event.request_id for event in events}) == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_recorded_passes_draw_the_same_tokens(transformer: Transformer) -> None:
    import copy

    moved = copy.deepcopy(transformer).cuda()
    plain, fixed = (Engine(moved, V, N, block_size=8, cuda_graphs=on) for on in (False, True))
    assert answers(fixed, 12) == answers(plain, 12)
    assert fixed._runner.graphs is not None
    assert all(each.graph is not None for each in fixed._runner.graphs.passes.values())


def test_all_shapes_are_recorded_before_anything_is_asked(
    transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest first, in one pool of memory; what is asked for afterwards is there."""
    recorded: list[tuple[int, int, Any]] = []
    monkeypatch.setattr(
        FixedShapePass, "record", lambda self, pool: recorded.append((self.B, self.M, pool)) or pool or "pool"
    )
    engine = Engine(transformer, V, N, block_size=8, max_sequences=2, cuda_graphs=True)
    graphs = engine._runner.graphs
    assert graphs is not None
    graphs.prepare(6)
    shapes = [(B, M) for B, M, _ in recorded]
    assert shapes == [(B, M) for B in (8, 4, 2, 1) for M in (8, 4, 2, 1)]
    assert [pool for *_, pool in recorded] == [None] + ["pool"] * (len(recorded) - 1)
    made = dict(graphs.passes)
    answers(engine, 6)
    assert graphs.passes == made


def test_in_mixed_passes_those_who_answer_are_recorded(transformer: Transformer) -> None:
    engine = Engine(transformer, V, N, block_size=8, cuda_graphs=True, prefill_tokens=4)
    engine.add(Request("0", [V.bos, 15], SamplingParams(30, seed=0)))
    while not engine.step():
        pass
    graphs = engine._runner.graphs
    assert graphs is not None
    graphs.clear()
    engine.add(Request("1", [V.bos, *range(15, 27)], SamplingParams(4, seed=1)))
    engine.step()
    assert [B for B, _ in graphs.passes] == [1], "with the other's prompt beside it"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_recorded_pass_reads_pages_where_they_are(transformer: Transformer) -> None:
    """By tables on the device, filled up with others' blocks and the one that nobody owns."""
    gathers, reads = (Engine(transformer, V, N, block_size=8, cache_tokens=64, cuda_graphs=True) for _ in range(2))
    found = []
    for engine, reader in ((gathers, None), (reads, FlexReader())):
        graphs, cache = engine._runner.graphs, engine._runner.cache
        assert graphs is not None
        graphs.reader = reader
        cache.store.normal_(generator=torch.Generator().manual_seed(0))
        sequences = [
            Sequence([V.bos, *range(15, 27)], cached, blocks)
            for cached, blocks in ((9, [3, 5]), (1, [0, 4]), (7, [2, 3]))
        ]
        layout = BatchLayout([(sequence, 1) for sequence in sequences], cache.block_size)
        with torch.no_grad():
            found.append(graphs.hidden(torch.tensor(layout.tokens), layout, 0))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
