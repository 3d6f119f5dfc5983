"""An engine with matrices in 8 bits says what the float32 model says, on a small model that has learned something."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.loading import read_transformer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.model.weights import LazyTensor, write_weights
from tests.model.generation.conftest import RunEngine

TEXT, CONTEXT = 128, 64  # ids 8..135 are characters, 136..143 image codes
V = Vocabulary(
    size=144, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(136, 144))
)
SHAPE = ModelConfig(vocabulary_size=V.size, layers=3, width=96, heads=4, kv_heads=2, ffn_width=256, context=CONTEXT)


def characters() -> Tensor:
    """English reference text, as ids."""
    text = " ".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    return 8 + torch.frombuffer(bytearray(text), dtype=torch.uint8).long() % TEXT


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model after 100 steps, far from uniform: 2.5 nats a character where 4.9 are the most."""
    folder, text = tmp_path_factory.mktemp("trained"), characters()
    transformer = Transformer(SHAPE).initialize(0)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (100 - step) / 50)
        starts = torch.randint(len(text) - CONTEXT - 1, (8,), generator=generator)
        batch = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        logits = transformer(batch[:, :-1])
        assert isinstance(logits, Tensor)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2.8
    SHAPE.save(folder)
    write_weights(folder, {name: LazyTensor.of(weight) for name, weight in transformer.state_dict().items()})
    return folder


@torch.inference_mode()
def logprobs(transformer: Transformer, tokens_BT: Tensor) -> Tensor:
    """[B, T, V], by the engine's own pass."""
    cache = PagedCache(SHAPE, 4, 16, dtype=transformer.embedding.weight.dtype)
    decoder, found = Decoder(transformer.eval()), []
    for tokens_T in tokens_BT:
        sequence = Sequence(tokens_T.tolist(), blocks=[0, 1, 2, 3])
        layout = BatchLayout([(sequence, len(tokens_T))], 16)
        x_TD = decoder.hidden(tokens_T, layout.step(cache, 0, torch.device("cpu")))
        found.append(decoder.logits(x_TD).log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-4)])
def test_distributions_are_those_of_float32(trained: Path, dtype: torch.dtype, most: float) -> None:
    text = characters()
    tokens_BT = torch.stack([text[start : start + CONTEXT] for start in range(0, 12 * 5000, 5000)])
    exact = logprobs(read_transformer(trained), tokens_BT)
    found = logprobs(read_transformer(trained, dtype=dtype, int8=True), tokens_BT)
    divergence = F.kl_div(found, exact, log_target=True, reduction="none").sum(-1)
    same = (found.argmax(-1) == exact.argmax(-1)).float().mean()
    print(f"{dtype}: KL {divergence.mean():.2e} nats, at most {divergence.max():.2e}; same top token {same:.4f}")
    assert divergence.mean() < most
    assert same > 0.97
    certain = exact.topk(2).values.diff().abs()[..., 0] > 0.25  # e^0.25: a fifth likelier than the next
    assert (found.argmax(-1) == exact.argmax(-1))[certain].all()


def test_an_engine_answers_as_the_float32_one_does(trained: Path, run_engine: RunEngine) -> None:
    """Greedy text, and guided image codes of the same seed."""
    prompt = [V.bos, *characters()[:20].tolist()]
    greedy, drawn = PhaseSampling(0.0, 1.0), PhaseSampling(1.0)
    requests = [
        Request("text", prompt, SamplingParams(24, "text", text=greedy)),
        Request("image", prompt, SamplingParams(8, "image", image=drawn, seed=3)),
    ]
    found = {int8: run_engine(Engine(read_transformer(trained, int8=int8), V, 4), *requests) for int8 in (False, True)}
    tokens = {
        int8: {name: [id for event in events for id in event.tokens] for name, events in answers.items()}
        for int8, answers in found.items()
    }
    assert len(tokens[True]["text"]) == 24
    assert tokens[True] == tokens[False]
