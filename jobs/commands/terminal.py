"""Text of others as a terminal may show it: characters, line ends and tabs, and nothing that steers the terminal, moves
what is there already, or makes words read otherwise than they stand (ECMA-48; Unicode Standard Annex 9).
"""

from __future__ import annotations

import re

ESC = "\x1b"
# What begins a sequence, and what then belongs to it. Parameters and intermediates of a control sequence, then its end;
# strings of commands (titles, links, clipboard, images) up to BEL or ST, which a line end takes the place of.
CONTROL = re.compile(r"[0-?]*[ -/]*([@-~])?")
STRING = re.compile(r"[^\x07\x9c\x1b\n]*(\x07|\x9c|\x1b\\|(?=\n)|(?=\x1b[^\\]))?")
ESCAPE = re.compile(r"[ -/]*([0-~])?")
STRINGS_7BIT, STRINGS_8BIT = "]PX^_", "\x9d\x90\x98\x9e\x9f"
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\u2028\u2029\ufff9-\ufffb\U000e0000-\U000e007f]"  # separators, annotations, tags: not for the eye
)
BEGIN = re.compile(f"[{ESC}\x9b{STRINGS_8BIT}]")
LONGEST = 2**16  # characters of a sequence without an end that are waited for


class TerminalText:
    """A text that comes in pieces, which may cut sequences anywhere."""

    def __init__(self) -> None:
        self._held = ""  # the beginning of a sequence whose end has not come

    def feed(self, piece: str) -> str:
        """What may be shown of the next piece."""
        text, self._held, shown, place = self._held + piece, "", [], 0
        while found := BEGIN.search(text, place):
            shown.append(text[place : found.start()])
            end = _end_of_sequence(text, found.start())
            if end is None:
                self._held = text[found.start() :] if len(text) - found.start() < LONGEST else ""
                place = len(text)
                break
            place = end
        shown.append(text[place:])
        return UNSEEN.sub("", "".join(shown)).encode(errors="replace").decode()


def terminal_text(text: str) -> str:
    """A whole text, without its sequences and unseen characters."""
    return TerminalText().feed(text)


def _end_of_sequence(text: str, begin: int) -> int | None:
    """Where the sequence ends that begins there; None where its end is missing."""
    kind, after = text[begin], begin + 1
    if kind == ESC:
        if after == len(text):
            return None
        if text[after] == "[":
            pattern, after = CONTROL, after + 1
        elif text[after] in STRINGS_7BIT:
            pattern, after = STRING, after + 1
        else:
            pattern = ESCAPE
    else:
        pattern = CONTROL if kind == "\x9b" else STRING
    found = pattern.match(text, after)
    assert found is not None  # all of these match nothing, too
    if found.end() == len(text) and found[1] is None:
        return None
    return found.end()
