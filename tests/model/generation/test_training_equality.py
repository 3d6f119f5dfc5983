"""The training forward pass and the engine find the same log-probabilities, whatever the company: what is learned from
the engine's answers rests on it (preference tuning, reinforcement learning)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 16  # codes of an image
V = Vocabulary(
    size=300, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 135))
)
TEXT = [*V.text_ids, V.eos, V.end_turn]
WITHIN = 1e-5  # nats, in float32
MODES: tuple[Any, ...] = ("text", "image", "interleaved")


@pytest.fixture(scope="module")
def transformer(make_transformer: Callable[..., Transformer]) -> Transformer:
    made = make_transformer(
        V.size, seed=5, std=0.15, layers=4, width=64, heads=8, kv_heads=4, ffn_width=96, context=192
    )
    with torch.no_grad():
        made.output.weight[[V.eos, V.end_turn]] = 0
    return made


def requests() -> list[Request]:
    """Of each mode, with prompts of 1 to 80 tokens, some with an image among them."""
    generator, found = torch.Generator().manual_seed(1), []
    for number in range(12):
        prompt = [V.bos, *torch.randint(135, V.size, (7 * number,), generator=generator).tolist()]
        if number % 4 == 1:
            codes = torch.randint(7, 135, (N,), generator=generator).tolist()
            prompt[1:1] = [V.begin_image, *codes, V.end_image]
        warm = PhaseSampling(1.0, 1.0)
        params = SamplingParams(
            20 + number, MODES[number % 3], 1, warm, warm, 1.0, 1.0, seed=number, prompt_logprobs=0,
            prefix=(V.begin_image,) if number % 3 == 2 else (),
        )  # fmt: skip
        found.append(Request(str(number), prompt, params))
    return found


def training_scores(transformer: Transformer, rows: list[list[int]]) -> list[Tensor]:
    """Of every token but the first of some documents, as a padded batch of the trainer finds them."""
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([row + [V.pad] * (longest - len(row)) for row in rows])
    mask_BT = torch.arange(1, longest) < torch.tensor([[len(row)] for row in rows])
    image_mask = V.mask(V.image_ids)
    transformer.train()
    scores_BT = transformer(
        tokens_BT[:, :-1], targets=tokens_BT[:, 1:], mask=mask_BT, image_mask=image_mask, scores=True
    )
    assert scores_BT.requires_grad
    transformer.eval()
    return [scores[: len(row) - 1].detach() for row, scores in zip(rows, scores_BT, strict=True)]


def answered(engine: Engine, asked: list[Request], together: bool) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {request.id: [] for request in asked}
    for batch in [asked] if together else [[request] for request in asked]:
        for request in batch:
            engine.add(request)
        while engine.has_work:
            for event in engine.step():
                events[event.request_id].append(event)
    return events


@pytest.mark.parametrize("company", ["alone", "together", "in parts"])
def test_answers_have_the_log_probabilities_that_training_finds(transformer: Transformer, company: str) -> None:
    """An answer's are of the ids that may come: text, or a code of an image; a prompt's of all ids."""
    options: dict[str, Any] = {"prefill_tokens": 23, "max_sequences": 5} if company == "in parts" else {}
    asked = requests()
    found = answered(Engine(transformer, V, N, block_size=8, **options), asked, company != "alone")
    rows = [[*request.tokens, *(token for event in found[request.id] for token in event.tokens)] for request in asked]
    assert sum(map(len, rows)) > 700
    whole = training_scores(transformer, rows)
    spread = 0.0
    for request, row, scores in zip(asked, rows, whole, strict=True):
        prompt = [each.value for event in found[request.id] for each in event.prompt_logprobs or ()]
        torch.testing.assert_close(torch.tensor(prompt), scores[: len(prompt)], rtol=0, atol=WITHIN)
        assert len(prompt) == len(request.tokens) - 1
        drawn = [value for event in found[request.id] for value in event.logprobs]
        expected = _among_allowed(transformer, row, request)
        torch.testing.assert_close(torch.tensor(drawn), expected, rtol=0, atol=WITHIN)
        spread = max(spread, float(expected.std()))
    assert spread > 0.5, "as of an untrained model, whatever is computed"


def test_an_answer_given_back_as_a_prompt_scores_as_in_training(transformer: Transformer) -> None:
    """How a trainer asks the engine for another policy's scores: all ids count, in a batch of any lengths."""
    asked = requests()
    found = answered(Engine(transformer, V, N), asked, True)
    rows = [[*request.tokens, *(t for event in found[request.id] for t in event.tokens)] for request in asked]
    scoring = SamplingParams(0, prompt_logprobs=0)
    again = answered(Engine(transformer, V, N), [Request(str(n), row, scoring) for n, row in enumerate(rows)], True)
    for number, scores in enumerate(training_scores(transformer, rows)):
        own = [each.value for event in again[str(number)] for each in event.prompt_logprobs or ()]
        torch.testing.assert_close(torch.tensor(own), scores, rtol=0, atol=WITHIN)


def test_with_native_kernels_the_bits_do_not_depend_on_company(transformer: Transformer) -> None:
    """Of answers whose prompts are taken in whole, alone and with eleven others."""
    asked = requests()
    alone, together = (answered(Engine(transformer, V, N, kernels="native"), asked, each) for each in (False, True))
    for request in asked:
        one, other = (
            [(e.tokens, e.logprobs, e.prompt_logprobs) for e in found[request.id]] for found in (alone, together)
        )
        flat = [
            [(t, v) for tokens, values, _ in each for t, v in zip(tokens, values, strict=True)] for each in (one, other)
        ]
        assert flat[0] == flat[1]
        assert one[0][2] == other[0][2]


def _among_allowed(transformer: Transformer, row: list[int], request: Request) -> Tensor:
    """Of an answer's tokens, by the Transformer's logits of the ids that may come."""
    begin = len(request.tokens)
    logits_TV = transformer(torch.tensor([row]))[0, begin - 1 : -1].detach()
    images_left = {"text": 0, "image": 1, "interleaved": request.params.max_images}[request.params.mode]
    values: list[float] = []
    codes: int | None = None
    for token, logits_V in zip(row[begin:], logits_TV, strict=True):
        if codes is None:
            allowed = TEXT
            room = request.params.mode == "image" or len(values) + N + 2 <= request.params.max_tokens
            if images_left and room:
                allowed = [V.begin_image] if request.params.mode == "image" else [*TEXT, V.begin_image]
        else:
            allowed = V.image_ids if codes < N else [V.end_image]
        given = len(values) < len(request.params.prefix)  # not drawn
        values.append(0.0 if given else float(logits_V[token] - logits_V[allowed].logsumexp(-1)))
        if token == V.begin_image:
            codes, images_left = 0, images_left - 1
        elif codes is not None:
            codes = None if token == V.end_image else codes + 1
    return torch.tensor(values)
