"""Counts of a curation: what was read, kept, dropped and bad, by name what was not read and the first things that were
bad."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from calumma.model.document import Document, Image
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.notes import Notes

MOST_EXAMPLES = 200  # bad inputs named in a report; all are counted


class BadExample(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    reason: str


class DocumentCounts(BaseModel):
    """`read` counts documents, kept or dropped; `bad` counts what could not be read as one."""

    model_config = ConfigDict(extra="forbid")

    kept: int = 0
    copies: int = 0  # of kept documents, that up-sampling adds
    dropped: dict[str, int] = {}
    bad: int = 0
    bytes_lost: int = 0
    images: int = 0
    characters: int = 0
    image_first: int = 0  # documents that begin with an image
    examples: list[BadExample] = []
    notes: Notes = Field(default_factory=Notes)  # what was not read, and warnings

    @property
    def read(self) -> int:
        return self.kept + sum(self.dropped.values())

    def keep(self, document: Document) -> None:
        self.kept += 1
        self.images += len(document.images)
        self.characters += len(document.text)
        self.image_first += isinstance(document.segments[0], Image)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def skip(self, bad: BadInput) -> None:
        self.bad += 1
        self.bytes_lost += bad.bytes_lost
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(BadExample(name=bad.name, reason=bad.reason))

    def add(self, other: DocumentCounts) -> None:
        """Add the counts of another task."""
        for name in ("kept", "copies", "bad", "bytes_lost", "images", "characters", "image_first"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.examples += other.examples[: MOST_EXAMPLES - len(self.examples)]
        self.notes.add(other.notes)

    def bad_share(self, bytes_total: int) -> float:
        """The share of the input that is bad: of the items or, if that is more, of the bytes (a file that cannot be
        read at all is one item, however much it held)."""
        items = self.bad / max(1, self.bad + self.read)
        return max(items, self.bytes_lost / max(1, bytes_total))

    def report(self) -> dict[str, Any]:
        counts = self.model_dump(mode="json", exclude={"examples", "notes"})
        notes = self.notes.report()
        return {"read": self.read, **counts, **notes, "bad_inputs": [bad.model_dump() for bad in self.examples]}
