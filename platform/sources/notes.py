"""What is told of files beside their documents and bad inputs: what was not read, by name, and warnings.

A reader notes it in the `File` that it reads (`file.notes.skip("members", ".cls")`); curation adds it up, in the order
of files, and tells it in its report, on the console and in the manifest.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from calumma.platform.sources.compression import SUFFIXES
from calumma.platform.sources.names import valid_words

MOST_NAMES = 200  # of one kind that are counted one by one: the fields of a record may be anything
MOST_WARNINGS = 50  # told; all are counted
OTHERS = "others"
SHOWN = 8  # names of a kind in a sentence


class Notes(BaseModel):
    """`unread`: kind -> name -> how many, such as {"members": {".cls": 6}, "fields": {"id": 300}, "files": {".csv": 1}}
    `lacking`: what documents have none of -> how many, such as {"caption": 6}. `warnings`: (place, what), of `warned`.
    `referred`: files below the source's location that were read since records refer to them.
    """

    model_config = ConfigDict(extra="forbid")

    unread: dict[str, dict[str, int]] = {}
    lacking: dict[str, int] = {}
    warnings: list[tuple[str, str]] = []
    warned: int = 0
    referred: set[str] = set()

    def skip(self, kind: str, name: str, count: int = 1) -> None:
        """Count what is left unread. `kind` is a plural: members, fields, files, folders, turns, frames, …"""
        name = valid_words(name)
        if not count:
            return
        names = self.unread.setdefault(kind, {})
        if name not in names and len(names) >= MOST_NAMES:
            name = OTHERS
        names[name] = names.get(name, 0) + count

    def lack(self, what: str, count: int = 1) -> None:
        """Count a document without something that its kind has, such as a caption."""
        self.lacking[what] = self.lacking.get(what, 0) + count

    def warn(self, place: str, what: str) -> None:
        """Tell what was read in spite of a fault."""
        self.warned += 1
        if len(self.warnings) < MOST_WARNINGS:
            self.warnings.append((valid_words(place), valid_words(what)))

    def add(self, other: Notes) -> None:
        """Add those of later files."""
        for kind, names in other.unread.items():
            for name, count in names.items():
                self.skip(kind, name, count)
        for what, count in other.lacking.items():
            self.lack(what, count)
        self.warnings += other.warnings[: MOST_WARNINGS - len(self.warnings)]
        self.warned += other.warned
        self.referred |= other.referred

    def report(self) -> dict[str, Any]:
        """For a manifest: the same for the same files, whatever order they were read in; nothing where nothing is."""
        unread = {kind: dict(sorted(names.items())) for kind, names in sorted(self.unread.items())}
        report: dict[str, Any] = {"unread": unread, "lacking": dict(sorted(self.lacking.items()))}
        if self.warned:
            report |= {"warned": self.warned, "warnings": [{"name": n, "reason": r} for n, r in self.warnings]}
        return {name: value for name, value in report.items() if value}


def sentences(report: dict[str, Any]) -> list[str]:
    """What `Notes.report` says, a line each: without warnings, which have their own."""
    lines = []
    bad = report.get("bad", 0)  # a sample is told to have no caption before its image turns out to be none
    among = f"documents{', with those that are unreadable,' if bad else ''}"
    for kind, names in report.get("unread", {}).items():
        ordered = sorted(names.items(), key=lambda pair: (-pair[1], pair[0]))
        told = ", ".join(f"{name} ({count:,})" for name, count in ordered[:SHOWN])
        more = f" and {len(ordered) - SHOWN:,} more" if len(ordered) > SHOWN else ""
        lines.append(f"{kind} not read: {told}{more}")
    return lines + [
        f"{count:,} of {report.get('read', count) + bad:,} {among} have no {what}"
        for what, count in report.get("lacking", {}).items()
    ]


def suffix(name: str) -> str:
    """The suffix of a file's or member's name, as it is counted: `.tar.gz`, `.jpg` for `.JPG`, a name without one."""
    path = PurePosixPath(name)
    parts = [part.lower() for part in path.suffixes[-2:]]
    if not parts:
        return path.name
    return "".join(parts) if parts[-1] in SUFFIXES else parts[-1]
