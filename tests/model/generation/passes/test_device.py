"""What a device asks of the engine: images are drawn without waiting for the host, and weights may be bfloat16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 16  # codes of an image
CONTEXT = 96
V = Vocabulary(
    size=40, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 23))
)


@pytest.fixture
def made(make_transformer: Callable[..., Transformer]) -> Transformer:
    transformer = make_transformer(V.size, seed=3, context=CONTEXT)
    with torch.no_grad():
        transformer.output.weight[[V.eos, V.end_turn]] = 0  # seldom the likeliest
    return transformer


class Waits(TorchDispatchMode):
    """Counts what waits for a device's result: values that go to the host, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *given: Any, **named: Any) -> Any:
            self.found[name] += 1
            return method(tensor, *given, **named)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in self.WAITING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_codes_of_several_passes_are_read_together_and_nothing_else_is(
    made: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(made, V, N, image_burst=8)
    for number in range(3):
        params = SamplingParams(mode="image", image=PhaseSampling(1.0, 0.9, top_k=9, min_p=0.01), seed=number)
        engine.add(Request(str(number), [V.bos, 30 + number], params))
    while not engine.step() or engine.statistics.running_text:
        pass
    passes: list[Any] = []
    monkeypatch.setattr(
        engine._runner, "hidden", lambda *a, hidden=engine._runner.hidden: passes.append(a) or hidden(*a)
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the sampler takes the ways it takes there
    with Waits(monkeypatch) as waits:
        events = engine.step()
    assert len(passes) == 8
    assert [len(event.tokens) for event in events] == [8, 8, 8]
    assert waits.found == {"tolist": 2}, "the tokens, and their log-probabilities"


def test_bfloat16_answers_are_what_its_plain_passes_find_likely(made: Transformer) -> None:
    """Greedy texts and guided-free images in company: rounding may tip a near tie, and nothing more."""
    transformer = made.to(torch.bfloat16)
    engine = Engine(transformer, V, N, prefill_tokens=5, block_size=8)
    prompts = {str(number): [V.bos, *range(24, 24 + number)] for number in range(1, 9)}
    greedy = PhaseSampling(temperature=0)
    for id, prompt in prompts.items():
        mode: Any = "text" if int(id) % 2 else "interleaved"
        prefix = () if int(id) % 2 else (V.begin_image,)
        params = SamplingParams(
            30, mode, 1, text=greedy, image=greedy, guidance_text=1.0, guidance_image=1.0, prefix=prefix
        )
        engine.add(Request(id, prompt, params))
    found: dict[str, list[int]] = {id: [] for id in prompts}
    while engine.has_work:
        for event in engine.step():
            found[event.request_id] += event.tokens
    assert sum(map(len, found.values())) > 150
    text, image = ~V.mask([*V.image_ids, *V.special_ids]), V.mask(V.image_ids)
    for id, answer in found.items():
        tokens = torch.tensor([[*prompts[id], *answer]])
        with torch.inference_mode():
            logits_TV = transformer(tokens)[0, len(prompts[id]) - 1 : -1].float()
        for token, logits_V in zip(answer, logits_TV, strict=True):
            if token in (V.begin_image, V.end_image):
                continue  # forced
            allowed = image if token in V.code_of else text
            best = logits_V[: V.size][allowed].max()
            assert logits_V[token] >= best - 0.05 * logits_V.abs().max()
