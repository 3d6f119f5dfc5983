"""What an endpoint can be asked, found by one small request of each kind, so that a run begins with what it can do.

Servers differ more in what they pass over than in what they refuse: one that answers without looking at the picture
counts the same tokens with it and without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.evaluation.systems.prompts import Answer, NoScores, NoSuchPath, Prompt, Sampling, System

Ability = Literal["chat", "continue", "score", "see", "draw"]
HELLO = Text("Say yes.", "user")
SQUARE = PILImage.new("RGB", (64, 64), (200, 30, 30))


def needed(prompts: Sequence[Prompt]) -> set[Ability]:
    """To answer these prompts."""
    found: set[Ability] = set()
    for prompt in prompts:
        if prompt.document.images:
            found.add("see")
        if prompt.sampling.mode != "text":
            found.add("draw")
        elif prompt.document.is_conversation or prompt.document.images:
            found.add("chat")
        else:
            found.add("continue")
    return found


def lacking(system: System, wanted: Collection[Ability]) -> dict[Ability, str]:
    """Those of the abilities that the endpoint does not have, with what it answered. Raises SystemAway, and
    UnusableSystem where it answers nobody (a wrong key)."""
    found: dict[Ability, str] = {}
    for ability in sorted(wanted, key=list(CHECKS).index):
        if (reason := CHECKS[ability](system)) is not None:
            found[ability] = reason
    return found


def _ask(system: System, *segments: Text | Image, **sampling: object) -> Answer:
    try:
        [answer] = system.answer([Prompt(Document(segments), Sampling(max_tokens=1, **sampling))])  # type: ignore[arg-type]
    except NoSuchPath as error:
        return Answer(Document(()), finish="failed", error=str(error))
    return answer


def _chats(system: System) -> str | None:
    answer = _ask(system, HELLO)
    return None if answer.error is None else f"it does not answer in /chat/completions: {answer.error}"


def _continues(system: System) -> str | None:
    answer = _ask(system, Text("One, two,"))
    return None if answer.error is None else f"it does not continue texts by /completions: {answer.error}"


def _scores(system: System) -> str | None:
    try:
        system.score([("One, two,", " three")])
    except (NoScores, NoSuchPath) as error:
        return str(error)
    return None


def _sees(system: System) -> str | None:
    without, beside = _ask(system, HELLO), _ask(system, Image(SQUARE, role="user"), HELLO)
    if beside.error is not None:
        return f"it takes no pictures: {beside.error}"
    if 0 < beside.prompt_tokens <= without.prompt_tokens:
        return "it does not look at pictures: it counts the same tokens with one and without"
    return None


def _draws(system: System) -> str | None:
    answer = _ask(system, Text("Draw a red square.", "user"), mode="image")
    if answer.error is not None:
        return f"it draws nothing: {answer.error}"
    if not answer.document.images:
        return "it draws nothing: asked for a picture (`images` says by which way), it answered without one"
    return None


CHECKS: dict[Ability, Callable[[System], str | None]] = {
    "chat": _chats, "continue": _continues, "score": _scores, "see": _sees, "draw": _draws,
}  # fmt: skip
