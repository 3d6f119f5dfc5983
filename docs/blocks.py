"""The fenced blocks of a page, and the `calumma` commands and YAML in them: what tests parse and `check` runs.

A block with a `title` is a file that later commands use. A comment right before a block says what else it is:

    <!-- elsewhere -->                not run by `make docs-check` (a cluster, a network, hours); parsed all the same
    <!-- part of pretrain -->         some fields of a specification: checked one by one
    <!-- wrong -->                    a specification that must be refused
    <!-- fails -->                    the last command is meant to fail: that is what the text is about
    <!-- until http://HOST:PORT -->   a command that stays: ended when something answers there
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)(?P<fence>```+) *(?P<info>[^\n`]*)\n"
    r"(?P<text>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
SHELL = ("sh", "bash", "console")
MARKS = re.compile(r"elsewhere|fails|wrong|part of (?P<part>\w+)|until (?P<url>http://\S+)")
OPERATORS = frozenset({"|", "||", "&&", ";", "&", "(", ")"})


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its opening fence, from 1."""

    page: str
    line: int
    language: str
    title: str | None
    mark: str
    text: str
    follows: bool = False
    """Whether nothing stands between it and the block before."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def elsewhere(self) -> bool:
        return self.mark == "elsewhere"

    @property
    def part(self) -> str | None:
        found = MARKS.fullmatch(self.mark)
        return found["part"] if found else None

    @property
    def url(self) -> str | None:
        found = MARKS.fullmatch(self.mark)
        return found["url"] if found else None

    @property
    def shell(self) -> bool:
        return self.language in SHELL and self.title is None


def blocks(file: Path, root: Path) -> Iterator[Block]:
    """All fenced blocks of a Markdown file. Raises ValueError on a mark that means nothing."""
    content = file.read_text(encoding="utf-8")
    end = 0  # of the block before
    for found in FENCE.finditer(content):
        page, line = file.relative_to(root).as_posix(), content.count("\n", 0, found.start("fence")) + 1
        mark = (found["mark"] or "").strip()
        if mark and not MARKS.fullmatch(mark):
            raise ValueError(f"{page}:{line}: <!-- {mark} --> means nothing; blocks.py lists what does")
        info = found["info"].strip()
        title = re.search(r'title="([^"]+)"', info)
        text = (
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE) if found["indent"] else found["text"]
        )
        follows = end > 0 and not content[end : found.start()].strip()
        yield Block(page, line, info.partition(" ")[0], title[1] if title else None, mark, text, follows)
        end = found.end()


def commands(script: str, program: str = "calumma") -> Iterator[list[str]]:
    """The words behind the program's name of each call in a shell script. Raises ValueError on quotes without end."""
    for line in script.replace("\\\n", " ").splitlines():
        splitter = shlex.shlex(line, posix=True, punctuation_chars="();&|")
        splitter.whitespace_split = True
        words: list[str] = []
        for word in [*splitter, ";"]:
            if word not in OPERATORS:
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):  # variables of this call alone
                del words[0]
            if words and words[0] == program:
                yield _without_redirections(words[1:])
            words = []


def _without_redirections(words: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif re.fullmatch(r"\d?(>>?|<)", word):
            skip = True
        elif not re.match(r"\d?(>>?|<)\S", word):
            kept.append(word)
    return kept
