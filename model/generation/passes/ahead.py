"""Passes that draw one more id for each of some requests, each issued before the one before it is read: a device
computes while its host looks at what it has drawn.

A pass needs what the one before has drawn on the device alone. What that means for a request, that it has ended or
begins an image, the host knows a pass late: then what the next pass drew for it is void, and only what it drew for the
others counts. So answers are what they would be otherwise.

Shape suffixes: T tokens of a pass, D width, R requests, C columns of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.image_batch import ImageBatch
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.generation.passes.output import HostSample, RunnerOutput, read_samples
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.sampling.sampler import IMAGE, TEXT, SamplerOutput
from calumma.model.generation.scheduler import ScheduledRequest

if TYPE_CHECKING:
    from calumma.model.generation.passes.runner import ModelRunner


@dataclass(frozen=True)
class _Issued:
    """A pass that is not read: what it draws for texts and for images."""

    texts: HostSample | None
    images: HostSample | None


class AheadPasses:
    """Passes of some requests that all have one token to be computed, and are ready to draw.

    unread: how many have been issued and not been read. Sequences count as cached what passes wrote that are read.
    """

    def __init__(self, runner: ModelRunner, scheduled: list[ScheduledRequest]) -> None:
        self.items, self._runner = scheduled, runner
        states = [item.state for item in scheduled]
        self._layout = BatchLayout([(s, 1) for state in states for s in state.sequences], runner.cache.block_size)
        self._texts = [state for state in states if not state.drawing]
        self._images = ImageBatch([state for state in states if state.drawing], self._layout)
        self._answered = {id(state): state.answered for state in states}
        self._text = self._image = None
        if self._texts:
            rows = runner.tensor([self._layout.last[id(s.full)] for s in self._texts])
            self._text = rows, runner.text_inputs(self._texts), runner.metadata(self._texts, TEXT)
        if self._images.rows:
            self._images.to(runner.device)
            rows = runner.tensor(self._images.rows)
            self._image = rows, runner.image_inputs(self._images), runner.metadata(self._images.states, IMAGE)
        self._tokens_T = runner.tensor(self._layout.tokens)
        self._issued = 0
        self._unread: deque[_Issued] = deque()

    @property
    def steady(self) -> bool:
        """Whether all of them still draw what they drew at first."""
        texts = all(not (state.finish or state.drawing) for state in self._texts)
        return texts and all(state.drawing and not state.finish for state in self._images.states)

    @property
    def unread(self) -> int:
        return len(self._unread)

    def slots(self, state: RequestState) -> list[int]:
        """Where in the cache passes that are not read have written for a request."""
        size = self._runner.cache.block_size

        def slot(sequence: Sequence, position: int) -> int:
            return sequence.blocks[position // size] * size + position % size

        return [slot(s, s.cached + number) for s in state.sequences for number in range(self.unread)]

    def issue(self) -> None:
        """One more pass. Sequences have blocks for it. Where it raises nothing has changed."""
        runner, number = self._runner, self._issued
        for item in self.items:
            state = item.state
            runner.sampler.numbers.reserve(state.seat, self._answered[id(state)] + number + 1)
        x_TD = runner.hidden(self._tokens_T, self._layout, self.unread)
        tokens_T, text, image = self._tokens_T, None, None
        if self._image is not None:
            rows, inputs, metadata = self._image
            image = runner.draw_images(self._images, x_TD[rows], inputs, number, metadata)
            drawn_B = self._images.repeat_for_branches(image.token_R.clamp(min=0))  # BROKEN is no id
            tokens_T = tokens_T.index_copy(0, rows, drawn_B)
        if self._text is not None:
            rows, inputs, metadata = self._text
            text = runner.draw_texts(x_TD[rows], inputs, number, metadata)
            tokens_T = tokens_T.index_copy(0, rows, text.token_R.clamp(min=0))
        self._unread.append(_Issued(_on_its_way(text), _on_its_way(image)))
        self._tokens_T, self._issued = tokens_T, number + 1
        runner.computed += len(self._layout.tokens)

    def read(self) -> list[RunnerOutput]:
        """What the oldest unread pass drew, for those it counts for."""
        issued = self._unread.popleft()
        outputs: list[RunnerOutput] = []
        for states, drawing, sample in (
            (self._images.states, True, issued.images),
            (self._texts, False, issued.texts),
        ):
            if sample is not None:
                read = read_samples(states, [sample.wait()], sample.top)
                outputs += [each for each in read if not each.state.finish and each.state.drawing == drawing]
        for output in outputs:
            for sequence in output.state.sequences:
                sequence.cached += 1
                if output.failure is None:
                    sequence.verified = sequence.cached
        return outputs


def _on_its_way(sample: SamplerOutput | None) -> HostSample | None:
    return None if sample is None else HostSample(sample)
