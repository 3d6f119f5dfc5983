"""MNIST (idx files) as recognition and as drawing: drawings are judged by a classifier trained on real scans."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.evaluation.benchmarks.files import named, read
from calumma.platform.evaluation.benchmarks.items import (
    Answers,
    BenchmarkDataError,
    Graded,
    Item,
    Measured,
    first_text,
    measured,
    pictures,
)
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.judge import Judge
from calumma.platform.evaluation.metrics.pictures import distinct, diversity
from calumma.platform.evaluation.metrics.questions import first_line, vqa_answer
from calumma.platform.evaluation.systems.prompts import Sampling

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_TRAINING = 4000  # scans for the judge; a support vector machine's time grows with their square
Scans = list[tuple[PILImage.Image, int]]


def read_scans(location: str, split: str, limit: int | None = None) -> Scans:
    """Raises BenchmarkDataError."""
    prefix = "train" if split == "train" else "t10k"
    [images, *_] = named(location, rf"{prefix}-images[-.]idx3-ubyte(\.gz)?$", f"{prefix}-images-idx3-ubyte(.gz)")
    [labels, *_] = named(location, rf"{prefix}-labels[-.]idx1-ubyte(\.gz)?$", f"{prefix}-labels-idx1-ubyte(.gz)")
    pixels, digits = _idx(images), _idx(labels)
    if pixels.ndim != 3 or digits.ndim != 1 or len(pixels) != len(digits):
        raise BenchmarkDataError(
            f"{images} has the shape {pixels.shape}, {labels} {digits.shape}: they do not belong together"
        )
    return [(PILImage.fromarray(pixels[n]), int(digits[n])) for n in range(len(digits))[:limit]]


def _idx(uri: str) -> np.ndarray:
    data = read(uri)
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        count = data[3]
        shape = struct.unpack(f">{count}I", data[4 : 4 + 4 * count])
        return np.frombuffer(data, np.uint8, int(np.prod(shape)), 4 + 4 * count).reshape(shape)
    except (OSError, EOFError, IndexError, struct.error, ValueError) as error:
        raise BenchmarkDataError(f"{uri} is no whole idx file: {error}") from error


def read_mnist(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """Which digit a scan shows."""
    return [
        Item(
            str(number),
            Document(
                (Image(scan.resize((112, 112)), role="user"), Text(task.prompt or "Which digit is this?", "user"))
            ),
            Sampling(max_tokens=8, seed=seed + number),
            digit,
            "",
        )
        for number, (scan, digit) in enumerate(read_scans(location, task.split or "test", task.limit))
    ]


def grade_mnist(items: Sequence[Item], answers: Answers) -> Measured:
    said = [vqa_answer(first_line(first_text(each)).rstrip(".")) for each in answers]
    return measured([
        Graded({"accuracy": float(text == str(item.expected))}, text, str(item.expected))
        for item, text in zip(items, said, strict=True)
    ])  # fmt: skip


def read_drawn(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """Digits in turn, as many as there are test scans, or `limit`. The judge's own scans must be there, too."""
    count = task.limit or len(read_scans(location, "test"))
    read_scans(location, "train", 1)
    return [
        Item(
            str(number),
            Document((Text((task.prompt or "Draw a {digit}.").format(digit=WORDS[number % 10]), "user"),)),
            Sampling(mode="image", seed=seed + number),
            [number % 10, location],
            "",
        )
        for number in range(count)
    ]


def grade_drawn(items: Sequence[Item], answers: Answers) -> Measured:
    location = items[0].expected[1]
    scans = read_scans(location, "train", MOST_TRAINING)
    judge = Judge.train([(scan, str(digit)) for scan, digit in scans])
    drawn = [[image.open() for image in pictures(each)[:1]] for each in answers]
    seen = iter(judge.classify([picture for each in drawn for picture in each]))
    graded = []
    for item, each in zip(items, drawn, strict=True):
        label = next(seen) if each else "no picture"
        graded.append(Graded({"accuracy": float(label == str(item.expected[0]))}, label, str(item.expected[0])))
    every = [picture for each in drawn for picture in each]
    same = [[p for p, item in _pairs(items, drawn) if item.expected[0] == digit] for digit in range(10)]
    several = [each for each in same if len(each) > 1]
    together = {"distinct": distinct(every), "diversity": diversity(every)}
    if several:
        together["diversity_within"] = sum(map(diversity, several)) / len(several)
    own = judge.accuracy([(scan, str(digit)) for scan, digit in read_scans(location, "test", 1000)])
    return measured(graded, {**together, "judge_accuracy": own})


def _pairs(items: Sequence[Item], drawn: Sequence[Sequence[PILImage.Image]]) -> list[tuple[PILImage.Image, Item]]:
    return [(picture, item) for item, each in zip(items, drawn, strict=True) for picture in each]
