"""What a system is asked and what it answers: mixed-modal documents, and log-probabilities of texts.

All of it is plain data that crosses processes. One prompt that cannot be answered costs itself: its answer has an
`error`, and nothing else is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from calumma.model.document import Document
from calumma.model.generation.request import Mode


@dataclass(frozen=True)
class Sampling:
    """How a prompt is answered. `max_tokens` counts text; images come beside, at most `max_images` of them where the
    mode is interleaved. `stop`: texts before which an answer of text ends. `cut_front`: a prompt of text that is too
    long for an engine loses its front, as lm-evaluation-harness has it. Images are drawn with the paper's guidance.
    """

    mode: Mode = "text"
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    max_images: int = 4
    cut_front: bool = False


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, or a plain document, with or without images, to be continued."""

    document: Document
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Answer:
    """`finish`: "stop", "length", or what an endpoint says; "failed" where there is an `error`. `seconds`: from when
    the prompt was handed in, together with others, until it was answered."""

    document: Document
    prompt_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    seconds: float = 0.0
    finish: str = "stop"
    error: str | None = None


@dataclass(frozen=True)
class Score:
    """The natural log-probability of a text's tokens, how many they are, whether each was the likeliest, and how many
    stood before them."""

    value: float
    tokens: int = 0
    greedy: bool = False
    prompt_tokens: int = 0


class UnusableSystem(RuntimeError):
    """A system that cannot be used; the message says what was asked, what came back and what to do."""


class NoScores(UnusableSystem):
    """An endpoint that gives no log-probabilities of a text."""


class NoSuchPath(UnusableSystem):
    """An endpoint that does not have what was asked for (404, 405)."""


class SystemAway(UnusableSystem):
    """An endpoint that did not answer for longer than its patience. Nothing of what was answered is lost."""


Progress = Callable[[int, int], object]  # prompts done, of how many
Told = Callable[[str], object]  # a line for the person who waits


class System(Protocol):
    """Answers come in the order of the prompts. `close` when done, or use it as a context."""

    name: str

    def answer(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Answer]: ...

    def score(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Score]:
        """Of each (context, continuation), the continuation's log-probability."""
        ...

    def score_whole(self, texts: Sequence[str], progress: Progress | None = None) -> list[Score]:
        """Of each text, from its first token on; what is longer than the context is taken in windows."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
