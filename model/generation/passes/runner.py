"""Forward passes: all requests' next tokens side by side, then one draw for all texts and one for all images.

A pass that raises has changed nothing: what it wrote to the cache lies behind what sequences count as cached, and what
it drew is drawn again.

Shape suffixes: T tokens of a pass, D width, B sequences that draw (the R requests' full contexts first, then branches),
R requests, C columns of the vocabulary.
"""

from __future__ import annotations

import time
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from calumma.model.generation.attention.choice import fastest
from calumma.model.generation.cache.contiguous import ContiguousCache
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.cache.sizing import BRANCHES
from calumma.model.generation.cache.verification import Note, Verification, Written
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.draft_window import MOST, DraftWindow, GivenWindow, measured
from calumma.model.generation.passes.drafts import lay_out, verify_drafts
from calumma.model.generation.passes.graphs import CudaGraphs
from calumma.model.generation.passes.image_batch import ImageBatch
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.generation.passes.output import NOT_FINITE, RunnerOutput, read_samples
from calumma.model.generation.passes.prompt_scores import score_prompt
from calumma.model.generation.request import Failure
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.sampling.jacobi import JacobiDraft
from calumma.model.generation.sampling.neighbours import Neighbours, NeighboursBySalt
from calumma.model.generation.sampling.rules import masks_of
from calumma.model.generation.sampling.sampler import IMAGE, TEXT, Sampler, SamplerOutput, SamplingMetadata, TextRows
from calumma.model.generation.scheduler import ScheduledRequest
from calumma.model.vocabulary import Vocabulary


class ModelRunner:
    """The decoder, its cache of `blocks` blocks, and the sampler of `seats` requests.

    window: image codes that are drafted ahead, 0 for none, None for as many as pay. graphs: record passes of fixed
    shapes (see CudaGraphs).
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        image_length: int,
        blocks: int,
        block_size: int,
        seats: int,
        context: int,
        window: int | None = 0,
        graphs: bool = False,
    ) -> None:
        weight, config = decoder.embedding, decoder.transformer.config
        self.decoder, self.device = decoder, weight.device
        self.cache = PagedCache(
            config,
            blocks + graphs,  # one that nobody owns
            block_size,
            weight.device,
            weight.dtype,
            self.decoder.kv_heads,
        )
        self.sampler = Sampler(vocabulary, config.vocabulary_size, seats, context, weight.device)
        native = self.decoder.operations.native
        _, self.reader = fastest(config, self.decoder.heads, self.cache, native)
        gathers = self.device.type == "cpu" and self.reader is None
        self.contiguous = ContiguousCache(self.cache) if gathers else None
        self.graphs = CudaGraphs(self.decoder, self.cache, -(-context // block_size), self.reader) if graphs else None
        if self.graphs is not None and self.device.type == "cuda":
            self.graphs.prepare(BRANCHES * seats)
        self.vocabulary, self.image_length = vocabulary, image_length
        self.neighbours = NeighboursBySalt(image_length)
        self.window = MOST if window is None else window
        self.draft_window: DraftWindow = GivenWindow(self.device.type == "cpu")
        if window is None:
            self.draft_window = measured(self._seconds, blocks * block_size)
        self.verification: Verification[RequestState] = Verification()
        self.computed = self.drafted = self.accepted = 0

    def run(self, scheduled: list[ScheduledRequest], steps: int) -> list[RunnerOutput]:
        """Write the scheduled tokens into the cache and draw the next token of those that get to their end; or `steps`
        codes of each, when all are images at their end: then nothing depends on what is drawn, and the host reads the
        device once for all of them. Requests whose logits are no numbers, or whose rules leave no id, fail alone."""
        drafts = [(item.state, copy(item.state.drafts)) for item in scheduled] if self.window else []
        try:
            return self._run(scheduled, steps)
        except BaseException:
            for state, draft in drafts:
                state.drafts = draft
            if self.contiguous is not None:
                self.contiguous.clear()
            raise

    def forget_room(self) -> None:
        """Give back the memory that is held only to be fast."""
        self.cache.forget_room()
        self.sampler.forget_room()
        if self.contiguous is not None:
            self.contiguous.clear()
        if self.graphs is not None:
            self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, scheduled: list[ScheduledRequest], steps: int) -> list[RunnerOutput]:
        for item in scheduled:
            state = item.state
            if self.window and item.samples and state.drawing and state.drafts is None:
                begun = state.full.tokens[len(state.full.tokens) - state.code :]
                columns = [token - self._first_code for token in begun]
                state.drafts = JacobiDraft(state.seed, self.window, self.neighbours.of(state.full.root), columns)
        layout = lay_out(scheduled, self.cache.block_size, self._first_code)
        ready = [item.state for item in scheduled if item.samples]
        texts = [state for state in ready if not state.drawing and state.tokens_left]
        undrawn = [item for item in scheduled if not (item.samples and item.state.tokens_left)]
        images = ImageBatch([state for state in ready if state.drawing], layout)
        text_rows = self.tensor([layout.last[id(s.full)] for s in texts]) if texts else None
        image_rows = self.tensor(images.rows) if images.rows else None
        text_metadata, image_metadata = self.metadata(texts, TEXT), self.metadata(images.states, IMAGE)
        text_inputs = self.text_inputs(texts) if texts else None
        image_inputs = note = None
        if image_rows is not None:
            image_inputs = self.image_inputs(images)
            images.to(self.device)
        for state in (*texts, *images.states):
            self.sampler.numbers.reserve(state.seat, state.answered + steps)
        tokens_T = self.tensor(layout.tokens)
        samples: list[SamplerOutput] = []
        outputs: list[RunnerOutput] = []
        x_TD = torch.empty(0)
        for step in range(steps):
            x_TD = self.hidden(tokens_T, layout, step)
            self.computed += len(layout.tokens)
            if undrawn:
                note = self._check(undrawn, layout, x_TD)
            if image_rows is None or image_inputs is None:
                continue
            if self.window:
                outputs = self._verify(images, x_TD[image_rows], image_inputs[0], image_metadata)
                break
            samples.append(self.draw_images(images, x_TD[image_rows], image_inputs, step, image_metadata))
            if step + 1 < steps:
                drawn_B = images.repeat_for_branches(samples[-1].token_R.clamp(min=0))  # BROKEN is no id
                tokens_T = tokens_T.index_copy(0, image_rows, drawn_B)
        if samples:
            outputs = read_samples(images.states, samples, image_metadata.top)
        if text_rows is not None and text_inputs is not None:
            mask_RW, refused = self._masks(texts)
            sample = self.draw_texts(x_TD[text_rows], text_inputs, 0, text_metadata, mask_RW)
            drawn = read_samples(texts, [sample], text_metadata.top)
            for row, failure in refused.items():
                drawn[row] = RunnerOutput(texts[row], [], [], failure)
            outputs += drawn
        for item in scheduled:
            if item.state.params.prompt_logprobs is not None:
                score_prompt(item, layout, x_TD, self.decoder)
        self._count_cached(scheduled, outputs, steps)
        outputs += self._verified(undrawn, note, waited=bool(outputs) or self.device.type == "cpu")
        if self.graphs is not None and any(output.failure is not None for output in outputs):
            self.cache.clear([self.cache.blocks - 1])  # with which sequences are filled up
        return outputs

    def text_inputs(self, texts: list[RequestState]) -> Tensor:
        """LongTensor [4, R]: of each text its seat, the number of its next id and where that goes among those seen,
        and how many ids are left to it where it may have images."""
        known = [
            [s.seat, s.answered, len(s.penalized_prompt) + s.answered, s.tokens_left if s.images_left > 0 else 0]
            for s in texts
        ]
        return self.tensor(known).T

    def image_inputs(self, images: ImageBatch) -> Tensor:
        """LongTensor [2, R]: of each draw the seat, and the number of the request's next id."""
        return self.tensor([[s.seat, s.answered] for s, _ in images.draws]).T

    def draw_texts(
        self, x_RD: Tensor, inputs_4R: Tensor, ahead: int, metadata: SamplingMetadata, mask_RW: Tensor | None = None
    ) -> SamplerOutput:
        """An id of each text, so many ids after the next."""
        seats_R, number_R, seen_R, left_R = inputs_4R
        begins_R = left_R - ahead >= self.image_length + 2
        rows = TextRows(seen_R + ahead, begins_R, mask_RW)
        if ahead and metadata.penalized:
            metadata = replace(metadata, seen=metadata.seen + ahead)
        sample = self.sampler.sample(self.decoder.logits(x_RD), TEXT, seats_R, number_R + ahead, rows, metadata)
        self.decoder.shard.broadcast(sample.token_R)
        return sample

    def draw_images(
        self, images: ImageBatch, x_BD: Tensor, inputs_2R: Tensor, ahead: int, metadata: SamplingMetadata
    ) -> SamplerOutput:
        """A code of each image, so many codes after the next."""
        logits_RC = images.guide(self.decoder.logits(x_BD, self.sampler.columns[IMAGE]), ahead)
        seats_R, number_R = inputs_2R
        sample = self.sampler.sample(logits_RC, IMAGE, seats_R, number_R + ahead, None, metadata)
        self.decoder.shard.broadcast(sample.token_R)
        return sample

    def hidden(self, tokens_T: Tensor, layout: BatchLayout, step: int) -> Tensor:
        recorded, others = layout.split() if self.graphs is not None else (None, None)
        if self.graphs is not None and recorded is not None:
            count = len(recorded.tokens)
            x_TD = self.graphs.hidden(tokens_T[:count], recorded, step)
            if x_TD is not None:
                rest = [self._computed(tokens_T[count:], others, step)] if others is not None else []
                return torch.cat([x_TD, *rest]) if rest else x_TD
        return self._computed(tokens_T, layout, step)

    def _computed(self, tokens_T: Tensor, layout: BatchLayout, step: int) -> Tensor:
        """`hidden`, not recorded."""
        adapters_T = self.tensor(layout.adapters) if layout.adapters else None
        paged = layout.step(self.cache, step, self.device, self.contiguous, self.reader)
        return self.decoder.hidden(tokens_T, paged, adapters_T)

    def _masks(self, texts: list[RequestState]) -> tuple[Tensor | None, dict[int, Failure]]:
        """Bits of the ids that may come in each text, None where nobody asks for less than all; and the rows for which
        that cannot be told. On a GPU, made while it computes the pass."""
        if not any(state.rules is not None and state.rules.holds(state.answered) for state in texts):
            return None, {}
        rows = [(s.rules, s.answer if s.rules is not None else (), s.may_begin_image) for s in texts]
        masks_RW, refused = masks_of(rows, self.vocabulary.size)
        return masks_RW.to(self.device, non_blocking=True), refused

    def _check(self, undrawn: list[ScheduledRequest], layout: BatchLayout, x_TD: Tensor) -> Note[RequestState]:
        """What the last states tell of sequences that nothing is drawn from."""
        written = [
            Written(item.state, sequence, sequence.cached + count, sequence.lives)
            for item in undrawn
            for sequence, count in zip(item.state.sequences, item.counts, strict=True)
            if count
        ]
        rows_B = self.tensor([layout.last[id(each.sequence)] for each in written])
        finite_B = x_TD[rows_B].isfinite().all(-1)
        return Note.of(self.decoder.shard.broadcast(finite_B.byte()), written)

    def _verified(
        self, undrawn: list[ScheduledRequest], note: Note[RequestState] | None, waited: bool
    ) -> list[RunnerOutput]:
        """What there is to say of requests that nothing was drawn for: that they failed, or are through."""
        if note is not None:
            self.verification.add(note)
        broken = self.verification.read(keep=0 if waited or note is None else 1)
        outputs = [RunnerOutput(state, [], [], NOT_FINITE) for state in broken]
        for item in undrawn:
            if item.samples and item.state not in broken:
                outputs.append(RunnerOutput(item.state, [], []))
        return outputs

    def _verify(
        self, images: ImageBatch, x_BD: Tensor, seats_R: Tensor, metadata: SamplingMetadata
    ) -> list[RunnerOutput]:
        logits_RC = images.guide(self.decoder.logits(x_BD, self.sampler.columns[IMAGE]))
        p_RC, logprobs_RC = self.sampler.image_probabilities(logits_RC, seats_R, metadata)
        most = self.draft_window.most(len(images.states), sum(len(state.sequences) for state in images.states))
        drafted = [len(state.drafts.codes) if state.drafts else 0 for state in images.states]
        outputs = verify_drafts(images, self.decoder.shard.broadcast(p_RC), logprobs_RC, self._first_code, most)
        for codes, output in zip(drafted, outputs, strict=True):
            self.draft_window.note(codes, len(output.tokens) - 1)
        self.drafted += len(images.draws) - len(images.states)
        self.accepted += sum(len(output.tokens) - 1 for output in outputs)
        return outputs

    @torch.inference_mode()
    def _seconds(self, tokens: int) -> float:
        """Of a pass of so many tokens of a sequence, and of verifying them as drafts."""
        size = self.cache.block_size
        blocks = list(range(-(-tokens // size)))
        layout = BatchLayout([(Sequence([self._first_code] * tokens, 0, blocks), tokens)], size)
        draft = JacobiDraft(0, tokens - 1, Neighbours(self.image_length))
        draft.codes = [0] * (tokens - 1)
        began = time.perf_counter()
        x_TD = self._computed(self.tensor(layout.tokens), layout, 0)
        p_TC = self.decoder.logits(x_TD, self.sampler.columns[IMAGE]).softmax(-1)
        draft.verify(p_TC, 0, self.image_length)
        seconds = time.perf_counter() - began
        self.cache.clear(blocks)
        return seconds

    def _count_cached(self, scheduled: list[ScheduledRequest], outputs: list[RunnerOutput], steps: int) -> None:
        """Note in each sequence how many of its tokens the cache now holds."""
        for item in scheduled:
            for sequence, count in zip(item.state.sequences, item.counts, strict=True):
                sequence.cached += count + steps - 1
        for output in outputs:
            accepted = len(output.tokens) - 1 if self.window else 0
            for sequence in output.state.sequences:
                if accepted > 0:  # of a draft, the accepted codes are in the cache but for the last
                    sequence.cached += accepted
                if output.failure is None:
                    sequence.verified = sequence.cached

    @property
    def _first_code(self) -> int:
        """The id of column 0 of the image phase."""
        return self.sampler.columns[IMAGE].start

    def tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)

    @staticmethod
    def metadata(states: list[RequestState], phase: int) -> SamplingMetadata:
        """What some of the requests ask of the sampler."""
        sampling = [s.params.image if phase == IMAGE else s.params.text for s in states]
        penalized = [s for s, each in zip(states, sampling, strict=True) if each.penalized]
        return SamplingMetadata(
            random=any(each.temperature > 0 for each in sampling),
            filtered=any(each.filtered for each in sampling),
            trimmed=any(each.filtered and not each.proposes for each in sampling),
            penalized=bool(penalized),
            seen=max((len(s.penalized_prompt) + s.answered for s in penalized), default=0),
            counted=any(s.params.text.counted for s in penalized),
            biased=0 if phase == IMAGE else max((len(s.params.logit_bias) for s in states), default=0),
            top=max((s.params.logprobs or 0 for s in states), default=0),
        )
