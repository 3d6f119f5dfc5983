"""Held-out conversations of curated documents: the user's turn is asked, the assistant's is what was expected.

Picture to word, word to picture, words and pictures in turn. Words are compared, pictures are named by a judge; beside
the shares stand how much drawings differ, and which label was taken for which.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.model.generation.request import Mode
from calumma.platform.evaluation.benchmarks.items import Answers, BenchmarkDataError, Graded, Item, Measured, measured
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.judge import labelled_pictures
from calumma.platform.evaluation.metrics.pictures import distinct, diversity
from calumma.platform.evaluation.systems.prompts import Sampling
from calumma.platform.evaluation.tasks import Case, Grade, InvalidCase, Kind, grade, make_case, texts_and_images
from calumma.platform.reports.confusion import confusion_matrix
from calumma.platform.reports.contact_sheet import Cell, contact_sheet

KINDS: dict[str, Kind] = {
    "picture_to_word": "recognition",
    "word_to_picture": "generation",
    "words_and_pictures": "interleaved",
}
MODES: dict[Kind, Mode] = {"recognition": "text", "generation": "image", "interleaved": "interleaved"}
SPARE_TOKENS = 16  # an answer may be longer than the expected one
MOST_CELLS = 100  # pictures on a contact sheet, at most
COLUMNS = 10
MOST_LABELS = 40  # of a matrix that can still be read


@dataclass(frozen=True)
class Expected:
    """`words`: of the answer, or labels of its pictures; `pictures`: those it has in the data, as files."""

    words: tuple[str, ...]
    pictures: Sequence[bytes] = field(repr=False)


Names = Callable[[Sequence[PILImage.Image], Sequence[str]], list[str]]  # pictures, labels to choose from -> labels


def read_conversations(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """Raises BenchmarkDataError, StorageError."""
    from calumma.platform.shards.documents import read_documents

    kind, items = KINDS[task.benchmark], []
    for number, document in enumerate(islice(read_documents(location), task.limit)):
        try:
            case = make_case(kind, document)
        except InvalidCase as error:
            raise BenchmarkDataError(f"{location}: document {number + 1}: {error}") from error
        # A token is one byte at least: words are never cut that are as long as the expected ones.
        room = len(case.expected.text.encode()) + SPARE_TOKENS
        sampling = Sampling(MODES[kind], room, seed=seed + number, max_images=len(case.words) + 1)
        real = [image.data if isinstance(image.data, bytes) else image.png() for image in case.expected.images]
        text = f"{case.prompt.text}\n{case.expected.text}"
        items.append(Item(str(number), case.prompt, sampling, Expected(case.words, real), text))
    if not items:
        raise BenchmarkDataError(f"{location} has no documents")
    return items


def grade_conversations(
    task: SuiteTask,
    items: Sequence[Item],
    answers: Answers,
    names: Names,
    judged: dict[str, float],
    training: str | None = None,
) -> Measured:
    """`judged`: how good the judge is who gives `names`. `training`: location of pictures to compare drawings with."""
    kind = KINDS[task.benchmark]
    cases = [Case(kind, item.prompt, Document(()), tuple(item.expected.words)) for item in items]
    documents = [each[0].document for each in answers]
    labels = _labels(task, cases)
    shown = [[image.open() for image in document.images] for document in documents]
    named = iter(names([picture for each in shown for picture in each], labels)) if kind != "recognition" else iter(())
    grades = []
    for case, document in zip(cases, documents, strict=True):
        grades.append(grade(case, document, lambda pictures: [next(named) for _ in pictures]))
    graded = [
        Graded(_values(kind, one, task.parts), one.answer, " ".join(case.words))
        for case, one in zip(cases, grades, strict=True)
    ]
    together: dict[str, float] = {}
    if kind == "interleaved":  # of pictures, which answers have several of
        drawn = [right for one in grades for right in one.digits]
        together["digits"] = sum(drawn) / len(drawn)
    if kind == "generation":
        real = [[Image(each).open() for each in item.expected.pictures[:1]] for item in items]
        together |= _differences([case.words[0] for case in cases], shown, real)
        if training is not None:
            together |= _likeness(training, [each[0] for each in shown if each], [one for each in real for one in each])
    if kind != "recognition":
        together |= {f"judge_{name}": value for name, value in judged.items()}
    sheets = {"sheet": _png(_sheet(cases, documents, grades))}
    if kind != "interleaved" and 1 < len(labels) <= MOST_LABELS:
        pairs = [(case.words[0], one.answer) for case, one in zip(cases, grades, strict=True)]
        asked, said = ("shown", "read") if kind == "recognition" else ("asked for", "drawn, by the judge")
        sheets["confusion"] = _png(confusion_matrix(pairs, labels, asked, said))
    return measured(graded, together, sheets=sheets)


def _values(kind: Kind, one: Grade, parts: Sequence[str]) -> dict[str, float]:
    if kind == "recognition":
        return {"accuracy": float(one.right)}
    if kind == "generation":
        apart = {part: float(bool(one.parts) and one.parts[place]) for place, part in enumerate(parts)}
        return {"accuracy": float(one.right), **(apart if len(parts) > 1 else {})}
    return {"valid": float(one.right), "words": float(one.words)}


def _labels(task: SuiteTask, cases: Sequence[Case]) -> list[str]:
    """Those that were asked for, in the task's own order first."""
    asked = {word for case in cases for word in case.words}
    return [*(label for label in task.labels), *sorted(asked - set(task.labels))]


def _likeness(training: str, drawn: Sequence[PILImage.Image], real: Sequence[PILImage.Image]) -> dict[str, float]:
    from calumma.platform.evaluation.likeness import Likeness

    return Likeness([picture for picture, _ in labelled_pictures(training)]).measure(drawn, real)


def _differences(
    words: Sequence[str], shown: Sequence[Sequence[PILImage.Image]], real: Sequence[Sequence[PILImage.Image]]
) -> dict[str, float]:
    """How much drawings differ: all of them, those of one word among each other, and these over how much the real
    pictures differ that the expected answers have for the word."""
    every = [picture for each in shown for picture in each[:1]]
    found = {"distinct": distinct(every), "diversity": diversity(every)}
    within = _diversity_within(words, [each[:1] for each in shown])
    if within is not None:
        found["diversity_within"] = within
        if usual := _diversity_within(words, real):
            found["diversity_of_real"] = within / usual
    return found


def _diversity_within(words: Sequence[str], shown: Sequence[Sequence[PILImage.Image]]) -> float | None:
    """The mean over words of the distance of two pictures of it; none: no word has two."""
    same: dict[str, list[PILImage.Image]] = {}
    for word, each in zip(words, shown, strict=True):
        same.setdefault(word, []).extend(each)
    several = [diversity(pictures) for pictures in same.values() if len(pictures) > 1]
    return sum(several) / len(several) if several else None


def _sheet(cases: Sequence[Case], answers: Sequence[Document], grades: Sequence[Grade]) -> PILImage.Image:
    """Recognition shows what was asked about, the other kinds what was drawn; an even choice of all cases."""
    cells: list[Cell] = []
    for i in range(0, len(cases), max(1, len(cases) // MOST_CELLS)):
        if cases[i].kind == "recognition":
            cells += [Cell(image.open(), grades[i].answer, grades[i].right) for image in cases[i].prompt.images[:1]]
        elif cases[i].kind == "generation":
            cells += [Cell(p.open(), cases[i].words[0], grades[i].right) for p in answers[i].images[:1]]
        else:
            cells += _interleaved_cells(answers[i], grades[i])
    return contact_sheet(cells[:MOST_CELLS], COLUMNS)


def _interleaved_cells(answer: Document, graded: Grade) -> list[Cell]:
    cells: list[Cell] = []
    text = ""
    for piece in texts_and_images(answer):
        if isinstance(piece, Text):
            text = piece.text.strip()
        else:
            right = graded.digits[len(cells)] if len(cells) < len(graded.digits) else False
            cells.append(Cell(piece.open(), text, right))
    return cells


def _png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
