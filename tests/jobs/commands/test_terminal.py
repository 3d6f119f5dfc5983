"""What a terminal gets to see of what others wrote."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.jobs.commands.terminal import TerminalText, terminal_text


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("two\nlines,\ta tab, é 七 👩\u200d👧", "two\nlines,\ta tab, é 七 👩\u200d👧"),
        ("\x1b[31;1mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[Hover\x1b[1Awritten", "overwritten"),
        ("\x1b]0;your title\x07a", "a"),
        ("\x1b]52;c;cm0gLXJmIC8=\x1b\\b", "b"),  # writes the clipboard
        ("\x1b]8;;http://evil.example\x1b\\my bank\x1b]8;;\x1b\\", "my bank"),
        ("\x1bP+q544e\x1b\\c\x1b_G\x1b\\d\x1b^x\x1b\\e\x1bXy\x1b\\", "cde"),
        ("\x9b31mC1\x9d0;title\x9c\x90q\x9c", "C1"),
        ("\x1bc\x1b(Bf\x1b#8g\x1b7", "fg"),
        ("good\rbad\x08\x08\x7f\x07\x0b\x0c\x00", "goodbad"),
        ("if \u202euser\u2066 // admin\u2069\u200f\u061c", "if user // admin"),
        ("a\U000e0068\U000e0069", "a"),
        ("\x1b]0;never ended\nnext line", "\nnext line"),
        ("\x1b]0;never ended\x1b[31mred", "red"),
        ("cut off \x1b[3", "cut off "),
        ("half \ud83d of a pair", "half ? of a pair"),
    ],
)
def test_what_would_steer_a_terminal_is_left_out(sent: str, shown: str) -> None:
    assert terminal_text(sent) == shown
    for cut in range(len(sent)):  # a server may send it in any pieces
        text = TerminalText()
        assert text.feed(sent[:cut]) + text.feed(sent[cut:]) == shown


@given(st.lists(st.text(alphabet="ab[]0;m\\\n\x07\x1b\x9b\x9c\x9d\u202e", max_size=8), max_size=8))
def test_no_pieces_bring_a_control_character_through(pieces: list[str]) -> None:
    text = TerminalText()
    shown = "".join(map(text.feed, pieces))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    sent = iter("".join(pieces))
    assert all(character in sent for character in shown), "in order, and nothing else"


def test_a_sequence_without_an_end_is_not_waited_for_forever() -> None:
    text = TerminalText()
    assert text.feed("\x1b]" + "x" * 100_000) == ""
    assert text.feed("seen") == "seen"
