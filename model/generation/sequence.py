"""A running request as a state machine: text, an image of fixed length, text again; and the cache slots it holds.

Guidance branches (paper, "Generation") are further sequences of the same request, alive within an image phase. Their
slots stay with the request, so a later image re-uses whatever prefix of its context is still in one of them.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

from calumma.model.generation.request import Event, Finish, Phase, PromptTooLong, Request, SamplingParams
from calumma.model.vocabulary import Vocabulary


class Grammar(IntEnum):
    """Which ids may come next; the row of the sampler's mask table. From CODES on it is the image phase."""

    TEXT = 0
    TEXT_OR_IMAGE = 1
    CODES = 2
    END_IMAGE = 3


@dataclass
class Sequence:
    """One cache slot: the tokens of its context, the first `cached` of which are written in the slot."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def pending(self) -> int:
        """Tokens to prefill: all but the last, which the next shared decoding pass takes."""
        return len(self.tokens) - 1 - self.cached

    def shared_prefix(self, context: list[int]) -> int:
        """How many tokens at the front of a context are in the slot already."""
        limit = min(self.cached, len(context) - 1)
        return next((i for i in range(limit) if self.tokens[i] != context[i]), limit)

    def become(self, context: list[int]) -> None:
        self.cached = self.shared_prefix(context)
        self.tokens = list(context)


@dataclass(frozen=True)
class Weights:
    """Guidance as a weighted sum of logits: u + s_image (i - u) + s_text (f - i), sorted by branch.

    A branch of weight 0 need not be run. Without an earlier image in the context, i is u.
    """

    full: float
    images: float
    nothing: float

    @classmethod
    def of(cls, params: SamplingParams, images_before: bool) -> Weights:
        text, image = params.guidance_text, params.guidance_image
        return cls(text, image - text, 1 - image) if images_before else cls(text, 0.0, 1 - text)

    @property
    def branches(self) -> int:
        return (self.images != 0) + (self.nothing != 0)


def whole_images(tokens: list[int], vocabulary: Vocabulary, image_length: int) -> list[int]:
    """The images of a context, each from begin_image to end_image. Raises ValueError on one that is not whole."""
    found: list[int] = []
    position = 0
    while vocabulary.begin_image in tokens[position:]:
        start = tokens.index(vocabulary.begin_image, position)
        position = start + image_length + 2
        image = tokens[start:position]
        if len(image) < image_length + 2 or image[-1] != vocabulary.end_image:
            raise ValueError(
                f"the image at token {start} of the prompt is not whole: begin_image, {image_length} codes, end_image"
            )
        found += image
    return found


@dataclass(frozen=True)
class Need:
    """What a request may use at most, known before it starts: answer tokens, images, cache slots."""

    tokens: int
    images: int
    slots: int

    @classmethod
    def of(cls, request: Request, vocabulary: Vocabulary, image_length: int, context: int) -> Need:
        """Raises PromptTooLong, and ValueError on a prompt that is no prompt."""
        prompt, params = request.tokens, request.params
        if not prompt:
            raise ValueError("the prompt has no tokens; it needs at least bos")
        if min(prompt) < 0 or max(prompt) >= vocabulary.size:
            raise ValueError(f"the prompt's ids must lie in 0..{vocabulary.size - 1}: {min(prompt)}..{max(prompt)}")
        images_before = bool(whole_images(prompt, vocabulary, image_length))
        image_room = image_length + 2
        room = image_room if params.mode == "image" else 1
        if len(prompt) + room > context:
            what = f"the {room} of an image" if params.mode == "image" else "1 for an answer"
            raise PromptTooLong(
                f"the prompt's {len(prompt)} tokens and {what} are more than the context of {context} tokens"
            )
        if params.mode == "image":
            tokens, images = room, 1
        else:
            tokens = min(params.max_tokens, context - len(prompt))
            images = min(params.max_images, tokens // image_room) if params.mode == "interleaved" else 0
        # The first image may come without earlier images, any after it has some: the dearer of those that can occur.
        situations = {images_before} if images == 1 else {images_before, True} if images > 1 else set()
        branches = max((Weights.of(params, before).branches for before in situations), default=0)
        return cls(tokens, images, 1 + branches)


class Generation:
    """A request that holds its slots: slots[0] for its context, the others for guidance branches."""

    def __init__(
        self, request: Request, need: Need, slots: list[int], vocabulary: Vocabulary, image_length: int
    ) -> None:
        self.request, self.params = request, request.params
        self.vocabulary, self.image_length = vocabulary, image_length
        self.full = Sequence(slots[0], list(request.tokens))
        self.spare = [Sequence(slot) for slot in slots[1:]]
        self.branches: list[tuple[Sequence, float]] = []  # of the image that is being drawn, with their weights
        self.weight = 1.0  # of the full context's logits
        self.phase: Phase = "text"
        self.tokens_left, self.images_left = need.tokens, need.images
        self.codes_left = 0
        self.drawn = 0  # random numbers used: one a sampled token
        self.finish: Finish | None = None
        self._images = whole_images(request.tokens, vocabulary, image_length)
        self._unreported: list[int] = []
        self._stops = {vocabulary.eos, vocabulary.end_turn}
        if self.params.mode == "image":  # begin_image needs no pass: it joins the prompt
            self._append(vocabulary.begin_image)
            self._unreported = [vocabulary.begin_image]

    @property
    def slots(self) -> list[int]:
        return [self.full.slot, *(sequence.slot for sequence in self.spare)]

    @property
    def sequences(self) -> list[Sequence]:
        """Those that take part in the next decoding pass, the full context first."""
        return [self.full, *(sequence for sequence, _ in self.branches)]

    @property
    def ready(self) -> bool:
        return all(sequence.pending == 0 for sequence in self.sequences)

    @property
    def grammar(self) -> Grammar:
        if self.phase == "image":
            return Grammar.CODES if self.codes_left else Grammar.END_IMAGE
        fits = self.images_left > 0 and self.tokens_left >= self.image_length + 2
        return Grammar.TEXT_OR_IMAGE if fits else Grammar.TEXT

    def accept(self, tokens: Ids[int], logprobs: Ids[float]) -> Event:
        """Take what a decoding pass sampled: one token, or several codes of one image."""
        self.drawn += len(tokens)
        for sequence in self.sequences:
            sequence.cached += len(tokens)
        forced, self._unreported = self._unreported, []
        if self.phase == "text" and tokens[0] in self._stops:
            self.finish = "stop"
            return Event(self.request.id, [], "text", "stop")
        phase: Phase = "image" if tokens[0] == self.vocabulary.begin_image else self.phase
        for token in tokens:
            self._append(token)
        if self.params.mode == "image" and self.phase == "text":
            self.finish = "stop"
        elif self.tokens_left == 0:
            self.finish = "length"
        return Event(self.request.id, [*forced, *tokens], phase, self.finish, [0.0] * len(forced) + list(logprobs))

    def _append(self, token: int) -> None:
        self.full.tokens.append(token)
        self.tokens_left -= 1
        if token == self.vocabulary.begin_image:
            self._begin_image()
        elif token == self.vocabulary.end_image:
            self.phase = "text"
            self._images += self.full.tokens[-self.image_length - 2 :]
        elif self.phase == "image":
            self.codes_left -= 1
            for sequence, _ in self.branches:
                sequence.tokens.append(token)
            if self.codes_left == 0:  # end_image is forced: nothing to guide
                self.branches, self.weight = [], 1.0

    def _begin_image(self) -> None:
        self.phase, self.codes_left = "image", self.image_length
        self.images_left -= 1
        weights = Weights.of(self.params, images_before=bool(self._images))
        self.weight = weights.full
        begin, bos = self.vocabulary.begin_image, self.vocabulary.bos
        free = list(self.spare)
        for context, weight in (([bos, *self._images, begin], weights.images), ([bos, begin], weights.nothing)):
            if weight != 0:
                sequence = max(free, key=partial(Sequence.shared_prefix, context=context))
                free.remove(sequence)
                sequence.become(context)
                self.branches.append((sequence, weight))
