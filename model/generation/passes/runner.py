"""Forward passes: all requests' next tokens side by side, then one draw for all texts and one for all images.

Shape suffixes: T tokens of a pass, B sequences that draw (the R requests' full contexts first, then branches), R
requests, C columns of the vocabulary, M blocks of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calumma.model.generation.cache.contiguous import ContiguousCache
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.graphs import CudaGraphs
from calumma.model.generation.passes.image_batch import ImageBatch
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.generation.request import Logprob
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.sampling.jacobi import JacobiDraft
from calumma.model.generation.sampling.sampler import IMAGE, TEXT, Sampler, SamplerOutput, SamplingMetadata
from calumma.model.generation.scheduler import ScheduledRequest
from calumma.model.generation.tensor_parallel import Shard
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

BROKEN = "the model's logits are not numbers: its weights are broken, or overflow their dtype"


# Logits of a prompt are computed for so many tokens at once.
PROMPT_ROWS = 256


@dataclass
class RunnerOutput:
    """What a pass drew for a request; no tokens where only its prompt was asked about."""

    generation: RequestState
    tokens: list[int]
    logprobs: list[Logprob]


class ModelRunner:
    def __init__(
        self,
        transformer: Transformer,
        vocabulary: Vocabulary,
        blocks: int,
        block_size: int,
        seats: int,
        context: int,
        shard: Shard | None = None,
        window: int = 0,
        graphs: bool = False,
    ) -> None:
        weight = next(transformer.parameters())
        self.decoder, self.device = Decoder(transformer, shard), weight.device
        self.cache = PagedCache(
            transformer.config,
            blocks + graphs,  # one that nobody owns
            block_size,
            weight.device,
            weight.dtype,
            self.decoder.kv_heads,
        )
        self.sampler = Sampler(vocabulary, transformer.config.vocabulary_size, seats, context, weight.device)
        self.keeper = ContiguousCache(self.cache) if self.device.type == "cpu" else None
        self.graphs = CudaGraphs(self.decoder, self.cache, -(-context // block_size)) if graphs else None
        self.window = window
        self.computed = self.drafted = self.accepted = 0

    def run(self, parts: list[ScheduledRequest], steps: int) -> list[RunnerOutput]:
        """Write the parts' tokens into the cache and draw the next token of those that get to their end; or `steps`
        codes of each, when all parts are images at their end: then nothing depends on what is drawn, and the host reads
        the device once for all of them."""
        for part in parts:
            if self.window and part.samples and part.generation.drawing and part.generation.drafts is None:
                part.generation.drafts = JacobiDraft(part.generation.seed + part.generation.answered, self.window)
        pairs = [pair for part in parts for pair in zip(part.generation.sequences, part.counts, strict=True)]
        layout = self._layout(parts)
        texts = [p.generation for p in parts if p.samples and not p.generation.drawing and p.generation.tokens_left]
        images = ImageBatch([p.generation for p in parts if p.samples and p.generation.drawing], layout)
        text_rows = self._tensor([layout.last[id(g.full)] for g in texts]) if texts else None
        image_rows = self._tensor(images.rows) if images.rows else None
        text_needs, image_needs = sampling_metadata(texts, TEXT), sampling_metadata(images.generations, IMAGE)
        text_inputs = self._tensor([[g.seat, g.answered, g.may_begin_image] for g in texts]).T if texts else None
        image_inputs = None
        if image_rows is not None:
            image_inputs = self._tensor([[g.seat, g.answered] for g, _ in images.draws]).T
            images.to(self.device)
        tokens_T = self._tensor(layout.tokens)
        drawn: list[SamplerOutput] = []
        x_TD = torch.empty(0)
        for step in range(steps):
            x_TD = self._hidden(tokens_T, layout, step)
            self.computed += len(layout.tokens)
            if image_rows is not None and image_inputs is not None:
                columns = self.sampler.columns[IMAGE]
                logits_RC = images.guide(self.decoder.logits(x_TD[image_rows], columns))
                if self.window:
                    p_RC, logprobs_RC = self.sampler.image_probabilities(logits_RC, image_inputs[0], image_needs)
                    break
                number_R = image_inputs[1] + step
                drawn.append(self.sampler.sample(logits_RC, IMAGE, image_inputs[0], number_R, None, image_needs))
                self.decoder.shard.agree(drawn[-1].token_R)
                if step + 1 < steps:
                    tokens_T = tokens_T.index_copy(0, image_rows, images.each(drawn[-1].token_R))
        results = self._read(images.generations, drawn, image_needs.top) if drawn else []
        if self.window and images.rows:
            results += self._verify(images, self.decoder.shard.agree(p_RC), logprobs_RC)
        if text_rows is not None and text_inputs is not None:
            logits_RV = self.decoder.logits(x_TD[text_rows])
            seats_R, number_R, begins_R = text_inputs
            text = self.sampler.sample(logits_RV, TEXT, seats_R, number_R, begins_R.bool(), text_needs)
            self.decoder.shard.agree(text.token_R)
            results += self._read(texts, [text], text_needs.top)
        for part in parts:
            self._prompt_logprobs(part, layout, x_TD)
            if part.samples and not part.generation.tokens_left:
                results.append(RunnerOutput(part.generation, [], []))
        for sequence, count in pairs:
            sequence.cached += count + (steps - 1)
        if self.window:  # of a draft, what stands is in the cache but for the last
            for result in results:
                for sequence in result.generation.sequences:
                    sequence.cached += max(0, len(result.tokens) - 1)
        return results

    def _hidden(self, tokens_T: Tensor, layout: BatchLayout, step: int) -> Tensor:
        x_TD = self.graphs.hidden(tokens_T, layout, step) if self.graphs is not None else None
        if x_TD is not None:
            return x_TD
        return self.decoder.hidden(tokens_T, layout.step(self.cache, step, self.device, self.keeper))

    def _layout(self, parts: list[ScheduledRequest]) -> BatchLayout:
        """Where the parts' tokens stand, and after them their drafts."""
        pairs = []
        for part in parts:
            drafts = self._ids(part.generation.drafts.codes) if part.draft and part.generation.drafts else []
            for sequence, count in zip(part.generation.sequences, part.counts, strict=True):
                if count:
                    pairs.append((sequence, count + len(drafts)))
                    sequence.tokens += drafts
        layout = BatchLayout(pairs, self.cache.block_size)
        for part in parts:
            for sequence in part.generation.sequences if part.draft else []:
                del sequence.tokens[-part.draft :]
        return layout

    def _verify(self, images: ImageBatch, p_RC: Tensor, logprobs_RC: Tensor) -> list[RunnerOutput]:
        """What stands of the drafts, with one code more for each image."""
        if not bool(p_RC.isfinite().all()):
            raise FloatingPointError(BROKEN)
        results, begin = [], 0
        for generation in images.generations:
            assert generation.drafts is not None
            end = begin + 1 + len(generation.drafts.codes)
            self.drafted += end - begin - 1
            stands = generation.drafts.verify(p_RC[begin:end], generation.codes_left)
            self.accepted += len(stands) - 1
            rows_RC = logprobs_RC[begin : begin + len(stands)]
            values = rows_RC.gather(1, self._tensor(stands)[:, None])[:, 0].tolist()
            top = generation.params.logprobs or 0
            tops: list[list[tuple[int, float]]] = [[] for _ in stands]
            if top:
                found = rows_RC.topk(min(top, rows_RC.shape[1]))
                tops = _pairs(found.indices + self.sampler.columns[IMAGE].start, found.values)
            logprobs = [
                Logprob(value, tuple(pair for pair in pairs if pair[1] > -math.inf))
                for value, pairs in zip(values, tops, strict=True)
            ]
            results.append(RunnerOutput(generation, self._ids(stands), logprobs))
            begin = end
        return results

    def _ids(self, codes: list[int]) -> list[int]:
        """Ids of columns of the image phase."""
        return [code + self.sampler.columns[IMAGE].start for code in codes]

    def _read(self, generations: list[RequestState], drawn: list[SamplerOutput], top: int) -> list[RunnerOutput]:
        """To the host. Raises FloatingPointError where the model's logits are no numbers."""
        tokens_RS = torch.stack([step.token_R for step in drawn], dim=1).tolist()
        values_RS = torch.stack([step.logprob_R for step in drawn], dim=1).tolist()
        if any(math.isnan(value) for row in values_RS for value in row):
            raise FloatingPointError(BROKEN)
        tops = [_pairs(step.top_ids_RK, step.top_logprobs_RK) for step in drawn] if top else []
        results = []
        for row, (generation, tokens, values) in enumerate(zip(generations, tokens_RS, values_RS, strict=True)):
            most = generation.params.logprobs or 0
            logprobs = [
                Logprob(value, tuple(pair for pair in tops[step][row][:most] if pair[1] > -math.inf) if most else ())
                for step, value in enumerate(values)
            ]
            results.append(RunnerOutput(generation, tokens, logprobs))
        return results

    def _prompt_logprobs(self, part: ScheduledRequest, layout: BatchLayout, x_TD: Tensor) -> None:
        """Of the prompt's tokens that follow those of this part, where the request asks for them."""
        generation, sequence = part.generation, part.generation.full
        if generation.params.prompt_logprobs is None:
            return
        prompt = generation.request.tokens
        done = 1 + len(generation.prompt_logprobs)  # of the prompt, the first has none
        begin, end = max(sequence.cached, done - 1), min(sequence.cached + part.counts[0], len(prompt) - 1)
        first = layout.last[id(sequence)] - part.counts[0] + 1 - sequence.cached
        for start in range(begin, end, PROMPT_ROWS):
            stop = min(start + PROMPT_ROWS, end)
            logprobs_RV = self.decoder.logits(x_TD[first + start : first + stop]).log_softmax(-1)
            values = logprobs_RV.gather(1, self._tensor(prompt[start + 1 : stop + 1])[:, None])[:, 0].tolist()
            most = min(generation.params.prompt_logprobs, logprobs_RV.shape[1])
            tops: list[list[tuple[int, float]]] = [[] for _ in values]
            if most:
                found = logprobs_RV.topk(most)
                tops = _pairs(found.indices, found.values)
            generation.prompt_logprobs += [Logprob(value, tuple(top)) for value, top in zip(values, tops, strict=True)]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)


def sampling_metadata(generations: list[RequestState], phase: int) -> SamplingMetadata:
    """What some of the requests ask of the sampler."""
    sampling = [g.params.image if phase == IMAGE else g.params.text for g in generations]
    penalized = [g.answered for g, each in zip(generations, sampling, strict=True) if each.repetition_penalty != 1]
    return SamplingMetadata(
        random=any(each.temperature > 0 for each in sampling),
        filtered=any(each.filtered for each in sampling),
        penalized=max(penalized, default=0),
        top=max((g.params.logprobs or 0 for g in generations), default=0),
    )


def _pairs(ids_RK: Tensor | None, values_RK: Tensor | None) -> list[list[tuple[int, float]]]:
    if ids_RK is None or values_RK is None:
        return []
    return [list(zip(*row, strict=True)) for row in zip(ids_RK.tolist(), values_RK.tolist(), strict=True)]
