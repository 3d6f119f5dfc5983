"""A request under way as a state machine: text, an image of fixed length, text again.

Guidance branches (paper, "Generation") are further sequences of the same request, alive while an image's codes are
drawn: only then do they take blocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from calumma.model.generation.admission import RequestLimits, whole_images
from calumma.model.generation.cache.block_manager import root_of
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.constraint import TokenConstraint
from calumma.model.generation.guidance import GuidanceInterval, GuidanceWeights
from calumma.model.generation.request import Event, Failure, Finish, Logprob, Phase, Request
from calumma.model.generation.sampling.jacobi import JacobiDraft
from calumma.model.generation.sampling.rules import TextRules
from calumma.model.vocabulary import Vocabulary


class _Token(NamedTuple):
    """One id of the answer, not reported yet."""

    id: int
    phase: Phase
    logprob: Logprob


FORCED = Logprob(0.0)
NONE = GuidanceInterval(GuidanceWeights(1.0, 0.0, 0.0), 0, 0, "constant")


class RequestState:
    """Preempted, it keeps all but its blocks and its seat.

    arrival: its number in the order of requests. seat: its row of the sampler's tables, -1 is none. seated: the row
    that holds its settings. taken_in: tokens that had to be computed when it was last given a seat. answered_before:
    what `answered` was then. constraint: its grammar, at the beginning. adapter: the number of its adapter. Raises
    ValueError on a prefix that the grammar does not allow.
    """

    def __init__(
        self,
        request: Request,
        limits: RequestLimits,
        arrival: int,
        vocabulary: Vocabulary,
        image_length: int,
        constraint: TokenConstraint | None = None,
        adapter: int = 0,
    ) -> None:
        self.request, self.params, self.arrival = request, request.params, arrival
        self.vocabulary, self.image_length = vocabulary, image_length
        self.seat = self.seated = -1
        self.taken_in = self.answered_before = 0
        self.seed = request.params.seed or 0  # the engine has drawn it where it is random
        root = root_of(request.salt, request.adapter)
        self.full = Sequence(list(request.tokens), root=root, adapter=adapter)
        self.branches: list[tuple[Sequence, float]] = []  # of the image that is being drawn, with their weights
        self.sequences = [self.full]  # that take part in the next pass, the full context first, then the branches
        self.retired: list[Sequence] = []  # branches that have no further use: their blocks are to be released
        self.guidance = NONE  # of the image that is being drawn
        self.phase: Phase = "text"
        self.answered = 0  # ids of the answer; the next one takes the random numbers of this index
        self.tokens_left = limits.tokens
        self.images_left = limits.images
        self.codes_left = 0
        self.images_done = 0
        self.finish: Finish | None = None
        self.failure: Failure | None = None
        self.prompt_logprobs: list[Logprob] = []
        self.drafts: JacobiDraft | None = None  # of the image that is being drawn, where codes are drafted
        self.rules = TextRules.of(self.params, vocabulary, constraint)
        self.penalized_prompt = self._penalized_prompt()
        self._images = whole_images(request.tokens, vocabulary, image_length)
        self._unreported: list[_Token] = []
        self._stops = {vocabulary.eos, vocabulary.end_turn, *request.params.stop_ids}
        self._stop: _Token | None = None  # that ended the answer
        self._prompt_reported = self.params.prompt_logprobs is None
        prefix = self.params.prefix if limits.tokens else ()
        if self.params.mode == "image" and limits.tokens and not prefix:
            prefix = (vocabulary.begin_image,)
        for token in prefix:
            self._append(token, FORCED)
        if self.drawing and not self.codes_left:
            self._append(vocabulary.end_image, FORCED)

    @property
    def drawing(self) -> bool:
        """Whether the next id is an image code."""
        return self.phase == "image"

    @property
    def codes_alike(self) -> int:
        """How many of the next codes are drawn from the same sequences."""
        return self.guidance.alike(self.code, self.image_length)

    @property
    def code(self) -> int:
        """The number of the next code in its image."""
        return self.image_length - self.codes_left

    def weights(self, code: int) -> tuple[float, ...]:
        """What the logits of each of the sequences weigh at a code of the image."""
        strength = self.guidance.strength(code)
        return 1 + strength * (self.guidance.weights.full - 1), *(strength * weight for _, weight in self.branches)

    @property
    def ids_ahead(self) -> int:
        """So many of the next ids can be drawn before any of them is looked at, as far as the request knows."""
        if self.drawing:
            return 0 if self.drafts is not None else self.codes_alike
        return 0 if self.rules is not None else self.tokens_left

    @property
    def may_begin_image(self) -> bool:
        return self.images_left > 0 and self.tokens_left >= self.image_length + 2

    @property
    def answer(self) -> list[int]:
        """The ids of the answer so far."""
        return self.full.tokens[len(self.request.tokens) :]

    @property
    def penalized_ids(self) -> list[int]:
        """The ids that count for penalties: of the prompt each once, then the answer's, `pad` for what is no text."""
        is_text_V, pad = self.vocabulary.text_mask, self.vocabulary.pad
        answer = torch.tensor(self.answer, dtype=torch.long)
        return [*self.penalized_prompt, *torch.where(is_text_V[answer], answer, pad).tolist()]

    def fail(self, failure: Failure, tokens: Ids[int] = (), logprobs: Ids[Logprob] = ()) -> list[Event]:
        """End it after these tokens; what it has not reported yet is reported."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            self._append(token, logprob)
        self.finish, self.failure = "failed", failure
        return self._report()

    def accept(self, tokens: Ids[int], logprobs: Ids[Logprob]) -> list[Event]:
        """Take what a pass sampled: one token, or several codes of one image. The last is not in the cache yet."""
        if not tokens:  # nothing was to be sampled: the prompt's log-probabilities alone, or the prefix is all of it
            self.finish = "stop" if self.params.mode == "image" and self.images_done else "length"
        elif self.phase == "text" and tokens[0] in self._stops:
            self.finish = "stop"
            self._stop = _Token(tokens[0], self.phase, logprobs[0])
        else:
            for token, logprob in zip(tokens, logprobs, strict=True):
                self._append(token, logprob)
            if self.params.mode == "image" and self.phase == "text":
                self.finish = "stop"
            elif self.tokens_left == 0:
                self.finish = "length"
        return self._report()

    def _report(self) -> list[Event]:
        if len(self._unreported) == 1 and self.finish is None and self._prompt_reported:  # what most steps bring
            [token], self._unreported = self._unreported, []
            top = [token.logprob.top] if self.params.logprobs else []
            return [Event(self.request.id, [token.id], token.phase, None, [token.logprob.value], top)]
        events = []
        for phase, group in groupby(self._unreported, key=lambda token: token.phase):
            run = list(group)
            top = [token.logprob.top for token in run] if self.params.logprobs else []
            values = [token.logprob.value for token in run]
            events.append((phase, [token.id for token in run], values, top))
        self._unreported = []
        if self.finish and not events:
            events.append((self.phase, [], [], []))
        made = []
        for phase, ids, values, top in events:
            prompt = None
            if not self._prompt_reported and self.failure is None:
                prompt, self._prompt_reported = self.prompt_logprobs, True
            made.append(Event(self.request.id, ids, phase, None, values, top, prompt))
        if self.finish:
            stop = self._stop
            made[-1] = replace(
                made[-1],
                finish=self.finish,
                stop_id=None if stop is None else stop.id,
                stop_logprob=None if stop is None else stop.logprob,
                failure=self.failure,
            )
        return made

    def _append(self, token: int, logprob: Logprob) -> None:
        vocabulary = self.vocabulary
        if (
            self.rules is not None
            and self.phase == "text"
            and token not in (vocabulary.begin_image, vocabulary.end_image)
        ):
            self.rules.advance(token)
        self.full.tokens.append(token)
        self.tokens_left -= 1
        self.answered += 1
        if token == vocabulary.begin_image:
            self._unreported.append(_Token(token, "image", logprob))
            self._begin_image()
            return
        self._unreported.append(_Token(token, self.phase, logprob))
        if token == vocabulary.end_image:
            self.phase = "text"
            self.images_done += 1
            self._images += self.full.tokens[-self.image_length - 2 :]
        elif self.phase == "image":
            self.codes_left -= 1
            for sequence, _ in self.branches:
                sequence.tokens.append(token)
            if self.code == self.guidance.stop:
                self._retire_branches()
            elif self.code == self.guidance.start:
                self._open_branches()
            if self.codes_left == 0:
                self._retire_branches()
                if logprob is not FORCED:  # the end of a drawn image is no choice, so no pass is spent on it
                    self._append(vocabulary.end_image, FORCED)

    def _penalized_prompt(self) -> list[int]:
        """The prompt's text ids, each once, where they count."""
        if self.params.text.repetition_penalty == 1:
            return []
        prompt = torch.tensor(self.request.tokens)
        return prompt[self.vocabulary.text_mask[prompt]].unique().tolist()

    def _begin_image(self) -> None:
        self.phase, self.codes_left = "image", self.image_length
        self.images_left -= 1
        self.guidance = GuidanceInterval.of(self.params, bool(self._images), self.image_length)
        if self.guidance.start == 0:
            self._open_branches()

    def _open_branches(self) -> None:
        """With what there is of the image already."""
        begin, bos, weights = self.vocabulary.begin_image, self.vocabulary.bos, self.guidance.weights
        codes = self.full.tokens[len(self.full.tokens) - self.code :]
        for context, weight in (([bos, *self._images, begin], weights.images), ([bos, begin], weights.nothing)):
            if weight != 0:
                branch = Sequence(context + codes, root=self.full.root, adapter=self.full.adapter)
                self.branches.append((branch, weight))
                self.sequences = [*self.sequences, branch]

    def _retire_branches(self) -> None:
        self.retired += [sequence for sequence, _ in self.branches]
        self.branches, self.drafts = [], None
        self.sequences = [self.full]
