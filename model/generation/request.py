"""What is asked of the engine and what it reports: token ids only, never text or HTTP."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from calumma.model.generation.constraint import Constraint

Mode = Literal["text", "image", "interleaved"]
Phase = Literal["text", "image"]
Finish = Literal["stop", "length", "aborted", "failed"]
FailureKind = Literal["not finite", "out of memory", "no token", "error"]
Schedule = Literal["constant", "linear", "cosine"]
MODES: tuple[Mode, ...] = ("text", "image", "interleaved")
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")
MOST_LOGPROBS = 64
LIKELY = 0.5  # top_p from which a proposed id is likely enough to lie in the nucleus
MOST_PENALTY = 2.0  # OpenAI's range of presence and frequency penalties
MOST_BIAS = 100.0  # and of logit biases
MOST_BIASES = 1024
RANDOM_SEED = -1


class PromptTooLong(ValueError):
    """The prompt and the least room its answer needs exceed the context; the message gives the lengths."""


@dataclass(frozen=True)
class PhaseSampling:
    """How tokens of one phase are drawn. Defaults are the public release's (paper, "Generation").

    temperature: 0 takes the most likely token. top_k: so many of the most likely tokens, 0 is all. min_p: those that
    are at least so likely, as a share of the most likely one's probability. top_p: of what these two leave, the
    smallest set of most likely tokens whose mass reaches it. Tokens exactly as likely as the last one stay with it.
    repetition_penalty: 1 is none; text tokens of the prompt and of the answer so far get their logit divided by it when
    positive and multiplied by it when negative (CTRL, arXiv 1909.05858; prompts count as in transformers and vLLM).
    presence_penalty, frequency_penalty: OpenAI's, subtracted from the logit of text tokens that the answer has: once,
    and as often as they occur; prompts do not count. Raises ValueError on a value out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature {self.temperature} must be 0 or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must lie in 0..1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 1 or more, or 0 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must lie in 0..1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty {self.repetition_penalty} must be more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MOST_PENALTY <= getattr(self, name) <= MOST_PENALTY:
                raise ValueError(f"{name} {getattr(self, name)} must lie in {-MOST_PENALTY:g}..{MOST_PENALTY:g}")

    @property
    def proposes(self) -> bool:
        """Whether a token drawn from all is mostly one that the filters leave, and it is simple to tell."""
        return self.top_p >= LIKELY and not (self.top_k or self.min_p)

    @property
    def counted(self) -> bool:
        """Whether it matters how often the answer has a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def penalized(self) -> bool:
        """Whether it matters which text tokens there are already."""
        return self.repetition_penalty != 1 or self.counted

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True)
class SamplingParams:
    """How a request is answered.

    mode: "text" never begins an image; "image" answers with exactly one image, of the model's fixed length, whatever
    `max_tokens` says; "interleaved" alternates freely, with at most `max_images`.
    max_tokens: most tokens of the answer, all of an image's counted, the closing stop id not. 0 answers nothing and is
    for `prompt_logprobs` alone.
    guidance_text, guidance_image: scales of classifier-free guidance in image phases; 1 and 1 is none.
    guidance_begin, guidance_end: the part of an image's codes that is guided, from 0 to 1 of them; others are drawn
    from the full context alone, at a fraction of the cost (limited intervals: arXiv 2404.07724). guidance_schedule: how
    the scales rise within that part from none: "constant": they are there at once; "linear"; "cosine", slow at both
    ends (arXiv 2404.13040).
    seed: any integer of 64 bits, signed or not (-2 and 2**64 - 2 are one); the same seed, prompt and parameters give
    the same tokens, the n-th of them by the n-th random numbers of the seed. None and -1 draw one.
    prefix: ids the answer begins with, as if they had been drawn: whole images, text, and at the end perhaps an image
    begun, as (begin_image,) for an answer with an image first. An answer cut anywhere and given back as a prefix goes
    on as it would have; the prefix is reported again.
    stop_ids: text ids that end the answer, as eos and end_turn do. min_tokens: so many ids of the answer come before
    any of these. ignore_eos: neither eos nor end_turn comes.
    allowed_ids: the only ids that may come in text, eos and begin_image among them where they may. bad_words: sequences
    of ids that the answer's text does not get. logit_bias: (id, value) pairs to be added to logits of text.
    constraint: a grammar for the answer's text; images are begun in the prefix then, and where the grammar lets a text
    be anything. Where the grammar's text is complete and nothing may follow, the answer ends whatever min_tokens and
    ignore_eos say.
    logprobs, prompt_logprobs: report so many most likely ids for each token of the answer, or of the prompt; None does
    not, and 0 reports the prompt's own alone.
    Raises ValueError on a value out of range.
    """

    max_tokens: int = 512
    mode: Mode = "text"
    max_images: int = 8
    text: PhaseSampling = field(default_factory=PhaseSampling)
    image: PhaseSampling = field(default_factory=PhaseSampling)
    guidance_text: float = 3.0
    guidance_image: float = 1.2
    seed: int | None = None
    prefix: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    allowed_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None
    guidance_begin: float = 0.0
    guidance_end: float = 1.0
    guidance_schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        if self.max_tokens < (1 if self.prompt_logprobs is None else 0):
            raise ValueError(
                f"max_tokens {self.max_tokens} must be 1 or more, or 0 where only prompt_logprobs are asked"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.max_images < 0:
            raise ValueError(f"max_images {self.max_images} must be 0 or more")
        for name, none in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)):
            if getattr(self.image, name) != none:
                raise ValueError(f"{name} applies to text; image codes repeat by nature, so leave it {none} there")
        for name in ("guidance_text", "guidance_image"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must be a finite number")
        if not 0 <= self.guidance_begin <= self.guidance_end <= 1:
            raise ValueError(
                f"guidance_begin {self.guidance_begin} and guidance_end {self.guidance_end} must lie in 0..1, in order"
            )
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(f"guidance_schedule {self.guidance_schedule!r} is not one of {', '.join(SCHEDULES)}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MOST_LOGPROBS:
                raise ValueError(f"{name} {count} must lie in 0..{MOST_LOGPROBS}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed} does not fit in 64 bits")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens {self.min_tokens} must be 0 or more")
        if self.allowed_ids is not None and not self.allowed_ids:
            raise ValueError("allowed_ids names no id: nothing could be answered")
        if any(not word for word in self.bad_words):
            raise ValueError("bad_words has a sequence without ids")
        if len(self.logit_bias) > MOST_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} ids; {MOST_BIASES} are taken at most")
        for token, value in self.logit_bias:
            if not -MOST_BIAS <= value <= MOST_BIAS:
                raise ValueError(f"logit_bias {value} of id {token} must lie in {-MOST_BIAS:g}..{MOST_BIAS:g}")
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise ValueError("logit_bias names an id twice")
        if self.constraint is not None and self.mode == "image":
            raise ValueError("a constraint holds for text, and mode 'image' has none")

    @property
    def random(self) -> bool:
        """Whether the seed is to be drawn."""
        return self.seed is None or self.seed == RANDOM_SEED


def nth_seed(seed: int | None, number: int) -> int | None:
    """The seed of answer `number` of several to one request, from 0: consecutive ones, which wrap at 64 bits; None for
    a random one."""
    return None if seed is None or seed == RANDOM_SEED else (seed + number) % 2**64


@dataclass(frozen=True)
class Request:
    """A prompt (token ids from bos on, images whole) to be continued.

    tenant: whom it is for; tenants share the engine evenly, whatever the number and length of their requests.
    priority: those of a lower number go first in everything, and the others get what these leave.
    salt: any bytes; what is computed for a request is of use to those of the same salt alone.
    adapter: the name of one of the engine's adapters, with which it is answered; "" is the plain model.
    """

    id: str
    tokens: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    tenant: str = ""
    priority: int = 0
    salt: bytes = b""
    adapter: str = ""


class Logprob(NamedTuple):
    """A token's natural log-probability, and those of the most likely ids, the most likely first."""

    value: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a request failed. It was part of a step that went wrong: given to another engine it may do the same there, so
    it is never to be tried again.

    kind: "not finite": the model's logits were no numbers; "out of memory": it was among the newest of a step that
    memory did not suffice for; "no token": its own parameters leave no id that may come; "error": anything else.
    """

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Event:
    """What one engine step added to a request; a step may bring several, one for each phase.

    tokens: the new ids, all of one phase; an image's begin and end ids belong to its image phase. The stop id that ends
    an answer is not among them, so a last event may have none.
    finish: None while the request goes on; "stop": a stop id, or the image of mode "image" is complete; "length":
    max_tokens or the context is used up; "aborted"; "failed", with the `failure`: the tokens so far stand, no others
    come.
    stop_id, stop_logprob: of a last event, the id that ended the answer, where one did, with its own log-probability
    and, where the parameters ask for them, the likeliest ids.
    logprobs: for each token its natural log-probability among the ids its phase allows, after guidance, before
    repetition penalty, temperature and filters. 0 for forced ids.
    top_logprobs: where the parameters ask for them, for each token the likeliest ids and their log-probabilities, the
    most likely first; none for forced ids.
    prompt_logprobs: in a request's first event, where its parameters ask for them: one for each token of the prompt
    after the first, among all ids, by the plain model.
    """

    request_id: str
    tokens: list[int]
    phase: Phase
    finish: Finish | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: list[Logprob] | None = None
    stop_id: int | None = None
    stop_logprob: Logprob | None = None
    failure: Failure | None = None
