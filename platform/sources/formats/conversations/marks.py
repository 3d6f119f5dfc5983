"""Marks that stand for images inside a conversation's text: LLaVA's `<image>`, Lumina's `<|image|>`, Qwen's
`<img>path</img>`, and numbered ones.

A mark that is not the one asked for makes its record bad: it is never text that a model would learn to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from calumma.platform.sources.files import Malformed

Form = Literal["<image>", "<|image|>", "<img>", "<image_1>", "<|image_1|>"]
OtherMarks = Literal["bad", "text"]
FORMS: dict[Form, re.Pattern[str]] = {
    "<image>": re.compile("<image>"),
    "<|image|>": re.compile(r"<\|image\|>"),
    "<img>": re.compile(r"<img>(.*?)</img>", re.DOTALL),
    "<image_1>": re.compile(r"<image_(\d+)>"),
    "<|image_1|>": re.compile(r"<\|image_(\d+)\|>"),
}
# What the data of models in use have for images, video and sound.
KNOWN = re.compile(
    r"<\|?(?:image|img|video|audio|speech)s?[_ ]?\d*\|?>|</img>|<\|(?:vision_start|image_pad|video_pad)\|>"
    r"|<(?:start_of_image|image_soft_token|image_placeholder|ImageHere|image_patch|im_patch|im_start|im_end|VIDEO|IMAGE|Image|Img|image-placeholder)>|\[IMG\]"
)


class Mark(int):
    """The place of the image of this number; -1: the next one."""


class MarkedPath(str):
    """The place of the image of this path."""


def has_none(words: str) -> bool:
    """Whether a text surely has no mark, as most have none."""
    return "<" not in words and "[IMG]" not in words


class Marks:
    """Splits texts at marks of one form."""

    def __init__(self, form: Form = "<image>", others: OtherMarks = "bad") -> None:
        self.form = form
        self._pattern, self._others = FORMS[form], others

    def split(self, words: str) -> Iterator[str | Mark | MarkedPath]:
        """The texts and marks of a text, without texts that are empty. Raises Malformed on a mark of another form."""
        end = 0
        for match in self._pattern.finditer(words):
            yield from self._text(words[end : match.start()])
            end = match.end()
            if not match.groups():
                yield Mark(-1)
            elif self.form == "<img>":
                yield MarkedPath(match[1].strip())
            else:
                yield Mark(int(match[1][:9]) - 1)
        yield from self._text(words[end:])

    def _text(self, words: str) -> Iterator[str]:
        if self._others == "bad" and (other := KNOWN.search(words)):
            readable = [form for form, pattern in FORMS.items() if pattern.match(words, other.start())]
            advice = f"the source's options may say {{mark: {readable[0]!r}}}" if readable else "no option reads it"
            raise Malformed(
                f"has the mark {other[0]!r}, which is not {self.form!r}; {advice}; {{other_marks: text}} makes it text"
            )
        if words:
            yield words
