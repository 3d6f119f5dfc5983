"""What a person says about answers, and how it is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field

from calumma.platform.specification import Section

Kind = Literal["preference", "safety"]
Preference = Literal["left", "same", "right"]
Fulfilment = Literal["fully", "partly", "not"]
Label = Literal["safe", "unsafe", "unsure"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PREFERENCES: tuple[Preference, ...] = get_args(Preference)
FULFILMENTS: tuple[Fulfilment, ...] = get_args(Fulfilment)
LABELS: tuple[Label, ...] = get_args(Label)
LONGEST_NOTE = 4000  # characters


class InvalidJudgement(ValueError):
    """A judgement that is not one of its study; the message says what is missing or wrong."""


class AnswerJudgement(Section):
    """Of one answer."""

    fulfils: Fulfilment | None = None
    issues: tuple[str, ...] = ()
    label: Label | None = None


class Judgement(Section):
    """Of the answers to a prompt, in the order in which they were shown."""

    preference: Preference | None = None
    answers: tuple[AnswerJudgement, ...]
    note: str = Field("", max_length=LONGEST_NOTE)

    def require(self, kind: Kind, issues: tuple[str, ...]) -> None:
        """Raises InvalidJudgement unless it says all that a study of this kind asks, and nothing else."""
        if len(self.answers) != (2 if kind == "preference" else 1):
            raise InvalidJudgement(f"it judges {len(self.answers)} answers, which are not those that were shown")
        if (self.preference is None) == (kind == "preference"):
            raise InvalidJudgement(
                f"preference must be {' | '.join(PREFERENCES) if kind == 'preference' else 'absent'}"
            )
        for number, answer in enumerate(self.answers, start=1):
            if (answer.fulfils is None) == (kind == "preference"):
                what = " | ".join(FULFILMENTS) if kind == "preference" else "absent"
                raise InvalidJudgement(f"answer {number}: fulfils must be {what}")
            if (answer.label is None) == (kind == "safety"):
                raise InvalidJudgement(
                    f"answer {number}: label must be {' | '.join(LABELS) if kind == 'safety' else 'absent'}"
                )
            if unknown := sorted(set(answer.issues) - set(issues)):
                raise InvalidJudgement(f"answer {number}: no issue of this study is called {', '.join(unknown)}")


@dataclass(frozen=True)
class Rating:
    """A judgement, whose it is, and of what. `systems`: in the order in which their answers were shown."""

    item: str
    annotator: str
    systems: tuple[str, ...]
    judgement: Judgement
    given_at: float = 0.0  # seconds since 1970
    seconds: float | None = None  # from when the answers were given out

    @property
    def preferred(self) -> str | None:
        """The system whose answer is better; None for about the same."""
        place = {"left": 0, "right": 1}.get(self.judgement.preference or "")
        return None if place is None else self.systems[place]
