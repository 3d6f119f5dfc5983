"""Drafted image codes in a pass: laid out after a request's own tokens, and verified by the distributions it computes
(speculative Jacobi decoding, sampling/jacobi.py).

Shape suffixes: R draws, C columns of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.image_batch import ImageBatch
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.generation.passes.output import NOT_FINITE, RunnerOutput, id_logprob_pairs, possible
from calumma.model.generation.request import Logprob
from calumma.model.generation.scheduler import ScheduledRequest


def lay_out(scheduled: list[ScheduledRequest], block_size: int, first_code: int) -> BatchLayout:
    """Where the scheduled tokens stand, and after them their drafts. first_code: the id of column 0 of images."""
    pairs = []
    drafted: list[tuple[Sequence, int]] = []
    try:
        for item in scheduled:
            codes = item.state.drafts.codes if item.draft and item.state.drafts else []
            for sequence, count in zip(item.state.sequences, item.counts, strict=True):
                if count:
                    pairs.append((sequence, count + len(codes)))
                    if codes:
                        drafted.append((sequence, len(sequence.tokens)))
                        sequence.tokens += [code + first_code for code in codes]
        return BatchLayout(pairs, block_size)
    finally:
        for sequence, length in drafted:
            del sequence.tokens[length:]


def verify_drafts(
    batch: ImageBatch, p_RC: Tensor, logprobs_RC: Tensor, first_code: int, most: int
) -> list[RunnerOutput]:
    """The accepted codes of each request's draft, and one code more. p: what each draw's code is distributed as, but
    for filters that `proposes`; logprobs: what is reported. most: codes that each drafts next. A request whose logits
    are no numbers fails; a draft after which they are none is not looked at."""
    finite = p_RC.isfinite().all(-1).tolist()
    outputs, begin = [], 0
    for state in batch.states:
        assert state.drafts is not None
        end = begin + 1 + len(state.drafts.codes)
        sound = finite[begin:end].index(False) if not all(finite[begin:end]) else end - begin
        if not sound:
            outputs.append(RunnerOutput(state, [], [], NOT_FINITE))
            begin = end
            continue
        own_XC, image = p_RC[begin : begin + sound], state.params.image
        top_p = image.top_p if image.proposes and image.temperature > 0 else 1.0
        accepted = state.drafts.verify(own_XC, state.answered, state.codes_alike, most, top_p)
        rows_RC = logprobs_RC[begin : begin + len(accepted)]
        columns_R1 = torch.tensor(accepted, device=rows_RC.device)[:, None]
        values = rows_RC.gather(1, columns_R1)[:, 0].tolist()
        top = state.params.logprobs or 0
        tops: list[list[tuple[int, float]]] = [[] for _ in accepted]
        if top:
            best = rows_RC.topk(min(top, rows_RC.shape[1]))
            tops = id_logprob_pairs(best.indices + first_code, best.values)
        logprobs = [Logprob(value, possible(pairs)) for value, pairs in zip(values, tops, strict=True)]
        outputs.append(RunnerOutput(state, [code + first_code for code in accepted], logprobs))
        begin = end
    return outputs
