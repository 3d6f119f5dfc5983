"""Questions and answers of the quickstart, in the common raw form (one JSON object a line).

The k-th `<image>` mark of a conversation is its k-th image; `captions` says what each image shows.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from calumma.jobs.quickstart.digits import WORDS, Scan

IMAGE_MARK = "<image>"
# The first wording of each kind is the one the evaluation and the quickstart's own questions use.
# Chat clients send the picture before or after the words: both are trained.
RECOGNITION = ("Which digit is this? <image>", "<image> Which digit is this?", "What digit do you see? <image>")
DRAWING = ("Draw {a_digit}.", "Please draw {a_digit}.", "Draw the digit {digit}.")
COUNTING = ("Count from {first} to {last}, with pictures.", "Count from {first} to {last} and draw each digit.")
LONGEST_COUNT = 5


class Shown(Protocol):
    """A picture and what it shows."""

    @property
    def word(self) -> str: ...

    def png(self) -> bytes: ...


@dataclass(frozen=True)
class Conversation:
    question: str
    answer: str
    pictures: tuple[Shown, ...] = ()

    def row(self) -> dict[str, Any]:
        return {
            "conversations": [{"from": "human", "value": self.question}, {"from": "gpt", "value": self.answer}],
            "images": [data_url(p.png()) for p in self.pictures],
            "captions": [p.word for p in self.pictures],
        }


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def with_article(word: str) -> str:
    return f"an {word}" if word == "eight" else f"a {word}"


def recognition_chat(scan: Scan, wording: int = 0) -> Conversation:
    return Conversation(RECOGNITION[wording], scan.word, (scan,))


def drawing_chat(scan: Scan, wording: int = 0) -> Conversation:
    question = DRAWING[wording].format(digit=scan.word, a_digit=with_article(scan.word))
    return Conversation(question, IMAGE_MARK, (scan,))


def counting_chat(scans: list[Scan], wording: int = 0) -> Conversation:
    """A request to count from the first scan's digit to the last's; `scans` show each digit once, ascending."""
    question = COUNTING[wording].format(first=scans[0].word, last=scans[-1].word)
    answer = " ".join(f"{scan.word} {IMAGE_MARK}" for scan in scans)
    return Conversation(question, answer, tuple(scans))


def counting_ranges(longest: int = LONGEST_COUNT) -> list[tuple[int, int]]:
    """Every (first, last) with two to `longest` digits between them, both included."""
    digits = len(WORDS)
    return [(a, b) for a in range(digits) for b in range(a + 1, min(a + longest, digits))]


def wordings(random: np.random.Generator, templates: tuple[str, ...], count: int) -> list[int]:
    """Indices of wordings: the first in half of the cases, the others share the rest."""
    others = len(templates) - 1
    weights = [0.5, *([0.5 / others] * others)]
    return [int(i) for i in random.choice(len(templates), size=count, p=weights)]


def reference_chats(topics: dict[str, str]) -> list[Conversation]:
    """For each page of Python's reference: what it says, answered by its first paragraph of prose."""
    import keyword

    chats = []
    for name, page in topics.items():
        answer = _first_prose(page)
        if answer is None:
            continue
        if keyword.iskeyword(name):
            question = f"What does the keyword `{name}` do in Python?"
        else:
            question = f"What does Python's reference say about `{name}`?"
        chats.append(Conversation(question, answer))
    return chats


def _first_prose(page: str) -> str | None:
    for paragraph in re.split(r"\n\s*\n", page):
        line = re.sub(r"\s+", " ", paragraph)
        if paragraph[:1].isupper() and line.endswith(".") and 40 <= len(line) <= 320 and "version" not in line:
            return line
    return None


def code_chats(sources: list[str], count: int) -> list[Conversation]:
    """Single lines of code, cut once; the answer is the rest of the line."""
    chats = []
    for line in dict.fromkeys(line.strip() for source in sources for line in source.splitlines()):
        match = re.match(r"((?:def|class|import) \S+?[ (])(.{4,60})$", line)
        if match and IMAGE_MARK not in line:
            chats.append(Conversation(f"Complete this line of Python: {match[1].rstrip()}", match[2].rstrip()))
        if len(chats) == count:
            break
    return chats
