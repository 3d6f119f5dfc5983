"""What the page and the server say to each other."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from calumma.platform.specification import Section
from calumma.platform.study.judgement import LONGEST_NOTE, Judgement, Label

Part = dict[str, Any]


class Welcome(Section):
    """Whom the link is for, and what is asked."""

    study: str
    mode: str  # preference, safety, red-team
    name: str
    role: str
    instructions: str
    issues: tuple[str, ...]
    harms: tuple[str, ...]


class Turn(Section):
    role: str
    parts: list[Part]


class Task(Section):
    """What is to be judged now; `item` is none when there is nothing."""

    item: str | None
    prompt: tuple[Turn, ...] = ()
    answers: tuple[list[Part], ...] = ()
    rated: int
    left: int
    waiting: bool = False  # others hold what is left


class Rate(Section):
    item: str = Field(max_length=64)
    judgement: Judgement


class Kept(Section):
    """`new`: false where the same judgement was there already."""

    new: bool


class Talk(Section):
    """A red-team dialogue as it stands."""

    dialogue: str
    turns: list[Turn]
    done: int  # dialogues of this annotator that have their label


class Say(Section):
    dialogue: str = Field(max_length=64)
    number: int = Field(ge=0)
    text: str = Field("", max_length=20_000)
    images: list[str] = Field([], max_length=8, description="data URLs")


class Answer(Section):
    """Asks for the answer to a dialogue's last turn."""

    dialogue: str = Field(max_length=64)


class End(Section):
    dialogue: str = Field(max_length=64)
    label: Label
    harm: str | None = None
    note: str = Field("", max_length=LONGEST_NOTE)
