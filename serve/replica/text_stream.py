"""An output's text as it may be sent: no broken UTF-8, nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from calumma.model.tokenizers.text import StreamDecoder
from calumma.serve.protocol import TextDelta, Token

TopLogprobs = tuple[tuple[int, bytes, float], ...]


class StopChecker:
    """Finds the first stop string in a text that comes in pieces. However it is cut, the result is the same: the text
    ends where the first stop string that completes begins (of several that complete at one character, the longest)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str, stops: bool = True) -> str:
        """The text that is safe to send now: what may be the beginning of a stop string is held back. stops: whether
        one that completes in it counts."""
        if self.stopped:
            return ""
        held, text = len(self._held), self._held + text
        ends = [(stop, text.find(stop, max(0, held - len(stop) + 1))) for stop in self._stops if stops]
        found = [(at + len(stop), at) for stop, at in ends if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the text ends or is interrupted by an image."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _characters(surface: bytes) -> int:
    """How many a token has by itself; of a token with part of a character, as many as there can be."""
    try:
        return len(surface.decode())
    except UnicodeDecodeError:
        return len(surface)


class TextStream:
    """Token ids in, text out. tokens: each delta names the tokens that end in it."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str] = (), tokens: bool = False) -> None:
        self._decoder = decoder
        self._checker = StopChecker(stops)
        self._tokens = tokens
        self._pending: list[tuple[int, Token]] = []  # (where it ends, token)
        self._decoded = self._sent = 0  # characters
        self._stops = True  # of the last token

    @property
    def stopped(self) -> bool:
        """A stop string has come; further tokens are ignored."""
        return self._checker.stopped

    @property
    def length(self) -> int:
        """Characters decoded so far."""
        return self._decoded

    @property
    def pending(self) -> int:
        """Tokens that no delta has named yet."""
        return len(self._pending)

    def push(
        self, token: int, surface: bytes, logprob: float | None = None, top: TopLogprobs = (), stops: bool = True
    ) -> TextDelta | None:
        """The text that may be sent after one more token. stops: whether a stop string that it completes counts."""
        self._stops = stops
        if self.stopped:
            return None
        begin = self._decoded
        text = self._decoder.push(token)
        self._decoded += len(text)
        if self._tokens:
            begin = max(begin, self._decoded - _characters(surface))  # before it, what an earlier token left open
            self._pending.append((self._decoded, Token(token, surface, begin, logprob, top)))
        return self._delta(self._checker.push(text, stops))

    def finish(self) -> TextDelta | None:
        """What is left when the text ends, or is interrupted by an image."""
        if self.stopped:
            return None
        text = self._decoder.finish()
        self._decoded += len(text)
        text = self._checker.push(text, self._stops)
        return self._delta(text + ("" if self.stopped else self._checker.finish()), last=True)

    def _delta(self, text: str, last: bool = False) -> TextDelta | None:
        self._sent += len(text)
        if self.stopped:  # a token that reaches into the stop string counts, one that begins there does not
            ready = [token for end, token in self._pending if token.begin < self._sent or end <= self._sent]
            self._pending = []
        else:
            ready = [token for end, token in self._pending if last or end <= self._sent]
            self._pending = self._pending[len(ready) :]
        return TextDelta(text, tuple(ready)) if text or ready else None
