"""Examples of a fine-tuning, looked at before anything is computed: what they are, and what is wrong with them, each
kind of fault with the first place that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from calumma.model.document import Document, Image, Text
from calumma.platform.cluster.progress import Progress, no_progress
from calumma.platform.sources.files import BadInput, Item
from calumma.platform.sources.look.guess import first_records
from calumma.platform.sources.look.look import Look, look
from calumma.platform.sources.notes import Notes, sentences
from calumma.platform.sources.preferences import is_preference
from calumma.platform.sources.reading import list_source, name_of, read_source
from calumma.platform.sources.specification import Source

NO_QUESTION = "an answer without a question"
NO_ANSWER = "a question without an answer"
NOTHING_TRAINED = "no answer that is trained"
EVERY = 256  # documents between two reports of progress


class WrongExamples(ValueError):
    """The examples are not what a fine-tuning needs; the message names the first that shows it."""


@dataclass
class Examples:
    """What was found. `faults`: kind of fault -> (how many, the first one's place)."""

    documents: int = 0
    conversations: int = 0
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return sum(count for count, _ in self.faults.values())

    def add(self, item: Item) -> None:
        if isinstance(item, BadInput):
            self._fault(item.reason, item.name)
            return
        if (wrong := fault(item)) is not None:
            self._fault(wrong, name_of(item))
            return
        self.documents += 1
        self.conversations += item.is_conversation

    def told(self) -> list[str]:
        """A line for each kind of fault."""
        return [
            f"{count:,} {'is' if count == 1 else 'are'} wrong: {reason}; the first: {place}"
            for reason, (count, place) in sorted(self.faults.items(), key=lambda fault: -fault[1][0])
        ]

    def _fault(self, reason: str, place: str) -> None:
        count, first = self.faults.get(reason, (0, place))
        self.faults[reason] = (count + 1, first)


def answers(document: Document) -> Iterator[Text | Image]:
    """The segments that a loss is taken on: all of a plain document."""
    for segment in document.segments:
        if segment.trained and (segment.role == "assistant" or not document.is_conversation):
            yield segment


def fault(document: Document) -> str | None:
    """What keeps a document from being an example."""
    if document.is_conversation:
        roles = [turn.role for turn in document.turns()]
        if roles[0] == "assistant":
            return NO_QUESTION
        if "assistant" not in roles:
            return NO_ANSWER
    return None if any(answers(document)) else NOTHING_TRAINED


def are_preferences(location: str) -> bool:
    """Whether the first records are pairs of answers, a wanted and an unwanted one. Raises StorageError."""
    files, _ = list_source("conversations", location)
    return any(is_preference(row) for uri in list(files)[:1] for row in first_records(uri, 3))


def find_source(location: str, format: str | None, options: dict[str, object]) -> Source:
    """What the examples seem to be. Raises WrongExamples where they are nothing that is read, or where reading them
    would take a guess about where their images belong."""
    seen = look(location, format, options, documents=1)
    if seen.guess is None:
        raise WrongExamples(f"{location}: no format is known for it: {seen.why_not}; `calumma data look` shows more")
    if seen.guess.options.get("unmarked") == "first" and "unmarked" not in options:
        place = _first_unmarked(seen, options)
        raise WrongExamples(
            f"{place}: has images and no mark that says where they stand. Write <image> where each belongs, or put "
            "them first with --option unmarked=first"
        )
    if not seen.documents:
        first = f"; the first: {seen.bad[0].name}: {seen.bad[0].reason}" if seen.bad else ""
        raise WrongExamples(f"{location}: nothing of it could be read as {seen.guess.format}{first}")
    return seen.source().model_copy(update={"name": "examples", "location": seen.location})


def _first_unmarked(seen: Look, options: dict[str, object]) -> str:
    assert seen.guess is not None
    plain = look(seen.location, seen.guess.format, options, documents=1)
    return next((bad.name for bad in plain.bad if "unmarked" in bad.reason), seen.location)


def check(source: Source, max_bad_share: float, progress: Progress = no_progress) -> Examples:
    """Read all examples once. Raises WrongExamples on more faults than are allowed, and where nothing is left."""
    found, notes = Examples(), Notes()
    files, _ = list_source(source.format, source.location)
    items = (item for uri in files for item in read_source(source, uri, notes=notes))
    for number, item in enumerate(items):
        found.add(item)
        if number % EVERY == 0:
            progress(number, 0, f"{number:,} examples looked at")
    found.unread = sentences({"read": found.documents, **notes.report()})
    total = found.documents + found.wrong
    if not total:
        raise WrongExamples(f"{source.location}: there are no examples in it")
    if found.wrong > max_bad_share * total:
        told = "\n".join(f"  {line}" for line in found.told())
        raise WrongExamples(
            f"{source.location}: {found.wrong:,} of {total:,} examples are wrong, more than --max-bad-share "
            f"{max_bad_share:g} allows:\n{told}"
        )
    if not found.documents:
        raise WrongExamples(f"{source.location}: there are no examples in it")
    return found
