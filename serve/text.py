"""An answer's text as it may be shown: no broken UTF-8, nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from calumma.model.tokenizers.text import StreamDecoder
from calumma.serve.pieces import TextPiece, Token

Top = tuple[tuple[int, bytes, float], ...]


class StopWatch:
    """Finds the first stop string in a text that comes in pieces. However it is cut, the result is the same: the text
    ends where the first stop string that completes begins (of several that complete at one character, the longest)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show now: what may be the beginning of a stop string is held back."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
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
    """How many a token has by itself; of part of a character, as many as there can be."""
    try:
        return len(surface.decode())
    except UnicodeDecodeError:
        return len(surface)


class TextStream:
    """Tokens of an answer in, pieces of text out. With `tokens`, each piece names the tokens that end in it."""

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str] = (), tokens: bool = False) -> None:
        self._decoder = decoder
        self._watch = StopWatch(stops)
        self._tokens = tokens
        self._waiting: list[tuple[int, Token]] = []  # (where it ends, token)
        self._decoded = self._shown = 0  # characters

    @property
    def stopped(self) -> bool:
        """A stop string has come; nothing is taken in any more."""
        return self._watch.stopped

    @property
    def length(self) -> int:
        """Characters taken in."""
        return self._decoded

    def push(self, token: int, surface: bytes, logprob: float | None = None, top: Top = ()) -> TextPiece | None:
        """What one more token lets be shown."""
        if self.stopped:
            return None
        begin = self._decoded
        text = self._decoder.push(token)
        self._decoded += len(text)
        if self._tokens:
            begin = max(begin, self._decoded - _characters(surface))  # before it, what an earlier token left open
            self._waiting.append((self._decoded, Token(token, surface, begin, logprob, top)))
        return self._piece(self._watch.push(text))

    def finish(self) -> TextPiece | None:
        """What is left when the text ends, or is interrupted by an image."""
        if self.stopped:
            return None
        text = self._decoder.finish()
        self._decoded += len(text)
        return self._piece(self._watch.push(text) + ("" if self.stopped else self._watch.finish()), last=True)

    def _piece(self, text: str, last: bool = False) -> TextPiece | None:
        self._shown += len(text)
        if self.stopped:  # a token that reaches into the stop string counts, one that begins there does not
            ready = [token for end, token in self._waiting if token.begin < self._shown or end <= self._shown]
            self._waiting = []
        else:
            ready = [token for end, token in self._waiting if last or end <= self._shown]
            self._waiting = self._waiting[len(ready) :]
        return TextPiece(text, tuple(ready)) if text or ready else None
