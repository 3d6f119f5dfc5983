"""Red-team dialogues with a model: what a person says becomes a turn, and the model's answer the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from calumma.model.document import Document
from calumma.platform.study.prompts import as_parts, segments_of
from calumma.platform.study.store.dialogues import Dialogue, Dialogues, OutOfTurn
from calumma.serve.http.wire.errors import APIError
from calumma.serve.study.wire import Part

Ask = Callable[[str, Document], Document]  # a system's name and a conversation -> its answer


class SystemAway(RuntimeError):
    """The system gives no answer now."""


class Talks:
    """ask: raises SystemAway."""

    def __init__(self, dialogues: Dialogues, ask: Ask) -> None:
        self._dialogues, self._ask = dialogues, ask
        self._busy: set[str] = set()
        self._lock = threading.Lock()

    def parts(self, text: str, images: list[str]) -> list[Part]:
        """What a person says as parts, each image decoded and encoded anew. Raises APIError."""
        content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        content += [{"type": "text", "text": text}] if text else []
        try:
            return as_parts(segments_of(content, "user"))
        except ValueError as error:
            raise APIError(str(error)) from error

    def answer(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with the model's answer, which is asked for where it is missing. Raises APIError, OutOfTurn."""
        if not dialogue.awaits_answer:
            return dialogue
        conversation = Document(
            tuple(
                segment
                for said in dialogue.turns
                for segment in segments_of(said.parts, "user" if said.role == "user" else "assistant")
            )
        )
        with self._alone(dialogue.id):
            try:
                given = self._ask(dialogue.system, conversation)
            except SystemAway as error:
                raise APIError(
                    "the model does not answer at the moment; what you said is kept. Try again.",
                    status=503,
                    code="model_away",
                ) from error
            parts = as_parts(given.segments) or [{"type": "text", "text": "(no answer)"}]
            return self._dialogues.say(dialogue.annotator, dialogue.id, len(dialogue.turns), "assistant", parts)

    @contextmanager
    def _alone(self, dialogue: str) -> Iterator[None]:
        """A dialogue's answer is asked for once at a time: a click twice would ask the model twice."""
        with self._lock:
            if dialogue in self._busy:
                raise OutOfTurn("the model is answering already")
            self._busy.add(dialogue)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(dialogue)
