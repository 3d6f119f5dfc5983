"""Safety policies: what they are shown, how the settings name one, and an example.

A policy is a callable that is shown a prompt before it reaches the model, and the answer so far before any more of it
reaches the client (http/moderation.py); it returns None, or the reason that the client is told. `Safety.policy` of the
settings names what makes one, `package.module:callable`, called with `Safety.options`; `calumma.serve.safety:keywords`
is an example.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from calumma.model.document import Document
from calumma.serve.settings import Safety


@dataclass(frozen=True)
class PolicyInput:
    """What a policy is shown: a prompt, or an answer as far as it has come and would be sent."""

    stage: Literal["prompt", "answer"]
    document: Document


Policy = Callable[[PolicyInput], str | None]


def keywords(words: Iterable[str], reason: str = "this request is against the rules of this server") -> Policy:
    """A policy that declines texts in which one of the words occurs as a whole word, whatever its case, its accents'
    encoding or the width of its letters (Unicode NFKC). An example: words alone tell little about intent."""
    alternatives = "|".join(re.escape(_plain(word)) for word in words if word.strip())
    if not alternatives:
        raise ValueError("keywords: give at least one word")
    pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")

    def policy(look: PolicyInput) -> str | None:
        return reason if pattern.search(_plain(look.document.text)) else None

    return policy


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def load_policy(safety: Safety) -> Policy | None:
    """The policy that the settings name. Raises ValueError."""
    if safety.policy is None:
        return None
    module, _, name = safety.policy.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"safety.policy: {safety.policy!r} is no package.module:callable: {error}") from error
    try:
        policy: Policy = make(**safety.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"safety.options do not fit {safety.policy}: {error}") from error
    if not callable(policy):
        raise ValueError(f"safety.policy: {safety.policy!r} made a {type(policy).__name__}, which cannot be called")
    return policy
