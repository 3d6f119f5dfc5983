"""Log-probabilities of a prompt's own tokens, from the states of the passes that take it in.

Shape suffixes: T tokens of a pass, D width, R tokens scored at once, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.generation.passes.output import id_logprob_pairs
from calumma.model.generation.request import Logprob
from calumma.model.generation.scheduler import ScheduledRequest

# Logits of a prompt are computed for so many tokens at once.
PROMPT_ROWS = 256


def score_prompt(item: ScheduledRequest, layout: BatchLayout, x_TD: Tensor, decoder: Decoder) -> None:
    """Append the scores of the prompt's tokens that follow those of this pass, for a request that asks for them."""
    state, sequence = item.state, item.state.full
    if not item.counts[0]:
        return
    assert state.params.prompt_logprobs is not None
    prompt = state.request.tokens
    done = 1 + len(state.prompt_logprobs)  # of the prompt, the first has none
    begin, end = max(sequence.cached, done - 1), min(sequence.cached + item.counts[0], len(prompt) - 1)
    first = layout.last[id(sequence)] - item.counts[0] + 1 - sequence.cached
    for start in range(begin, end, PROMPT_ROWS):
        stop = min(start + PROMPT_ROWS, end)
        logprobs_RV = decoder.logits(x_TD[first + start : first + stop]).log_softmax(-1)
        own_R1 = torch.tensor(prompt[start + 1 : stop + 1]).to(x_TD.device, non_blocking=True)[:, None]
        values = logprobs_RV.gather(1, own_R1)[:, 0].tolist()
        most = min(state.params.prompt_logprobs, logprobs_RV.shape[1])
        tops: list[list[tuple[int, float]]] = [[] for _ in values]
        if most:
            best = logprobs_RV.topk(most)
            tops = id_logprob_pairs(best.indices, best.values)
        state.prompt_logprobs += [Logprob(value, tuple(top)) for value, top in zip(values, tops, strict=True)]
