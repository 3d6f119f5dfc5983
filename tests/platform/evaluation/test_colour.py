"""The judge of pictures in colour, whose labels have parts, and how drawings compare with real pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw

from calumma.model.document import Document, Image, Text
from calumma.platform.evaluation import judge
from calumma.platform.evaluation.judge import Judge, JudgeDataError
from calumma.platform.evaluation.likeness import Likeness
from calumma.platform.evaluation.tasks import Case, grade, make_case, summary

PARTS = ("shape", "colour")
Labelled = list[tuple[PILImage.Image, str]]


def drawn(shape: str, colour: str, random: np.random.Generator) -> PILImage.Image:
    picture = PILImage.new("RGB", (64, 64), "white")
    x, y, size = (int(n) for n in random.integers([10, 10, 36], [14, 14, 42]))
    place = (x, y, x + size, y + size)
    pen = ImageDraw.Draw(picture)
    pen.ellipse(place, fill=colour) if shape == "circle" else pen.rectangle(place, fill=colour)
    return picture


@pytest.fixture(scope="module")
def parts() -> tuple[Labelled, Labelled]:
    """Training and held-out pictures; blue circles are in the second alone."""
    random = np.random.default_rng(0)
    kinds = [(shape, colour) for shape in ("circle", "square") for colour in ("red", "green", "blue")]
    trained = [(drawn(*kind, random), " | ".join(kind)) for kind in kinds for _ in range(12)]
    return [pair for pair in trained if pair[1] != "circle | blue"], [
        (drawn("circle", "blue", random), "circle | blue") for _ in range(12)
    ]


@pytest.fixture(scope="module")
def trained(parts: tuple[Labelled, Labelled]) -> Judge:
    return Judge.train(parts[0], "colour", len(PARTS))


def test_a_combination_it_has_not_seen_is_judged_by_its_parts(trained: Judge, parts: tuple[Labelled, Labelled]) -> None:
    marks = np.array(trained.marks(parts[1]))
    assert marks[:, 1].mean() == 1  # colour
    assert marks[:, 0].mean() > 0.8  # shape
    assert trained.accuracy(parts[1]) == marks.all(1).mean()


def test_a_label_without_its_parts_is_told(parts: tuple[Labelled, Labelled]) -> None:
    with pytest.raises(JudgeDataError, match="has not 2 parts"):
        Judge.train([*parts[0], (parts[0][0][0], "circle")], "colour", 2)


def test_colour_features_tell_colours_that_are_alike_in_grey() -> None:
    red, green = (PILImage.new("RGB", (64, 64), colour) for colour in ((200, 0, 0), (0, 102, 0)))
    assert np.abs(np.subtract(*judge.features([red, green]))).max() < 0.01
    assert np.linalg.norm(np.subtract(*judge.colour_features([red, green]))) > 5


def drawing(label: str) -> Case:
    document = Document((Text("Draw it.", "user"), Image(PILImage.new("RGB", (64, 64)), label, "assistant")))
    return make_case("generation", document)


def test_parts_of_a_drawing_are_counted_apart(trained: Judge) -> None:
    random = np.random.default_rng(1)
    answers = [Document((Image(drawn("circle", "red", random)),)), Document(())]
    grades = [grade(drawing("circle | green"), answer, trained.classify) for answer in answers]
    assert [g.right for g in grades] == [False, False]
    assert summary("generation", grades, PARTS) == {"accuracy": 0, "shape": 0.5, "colour": 0}


def test_stories_say_the_first_part_of_each_label(trained: Judge) -> None:
    random = np.random.default_rng(2)
    labels = ("circle | red", "square | blue")
    pictures = [drawn(*label.split(" | "), random) for label in labels]
    said = [part for label, p in zip(labels, pictures, strict=True) for part in (Text(label.split(" | ")[0]), Image(p))]
    expected = [Text("Tell.", "user")]
    expected += [Image(p, label, "assistant") for p, label in zip(pictures, labels, strict=True)]  # type: ignore[misc]
    marks = grade(make_case("interleaved", Document(tuple(expected))), Document(tuple(said)), trained.classify)
    assert (marks.right, marks.words, marks.digits) == (True, True, (True, True))


# -- likeness


def test_real_pictures_are_more_like_real_ones_than_others_are(parts: tuple[Labelled, Labelled]) -> None:
    random = np.random.default_rng(3)
    training = [picture for picture, _ in parts[0]]
    likeness = Likeness(training)
    fresh = [drawn(*label.split(" | "), random) for _, label in parts[0]]
    noise = [PILImage.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)) for _ in fresh]
    near, far = likeness.measure(fresh, training), likeness.measure(noise, training)
    assert near["frechet"] < 0.2 * far["frechet"]
    assert near["nearest"] < far["nearest"]


def test_copies_are_found(parts: tuple[Labelled, Labelled]) -> None:
    training, real = ([picture for picture, _ in part] for part in parts)
    found = Likeness(training).measure(training[:6] + training[:1], real)
    assert (found["copies"], found["nearest"]) == (1, pytest.approx(0, abs=1e-6))
    assert found["distinct"] == pytest.approx(6 / 7)
    assert Likeness(training).measure(training[:1], real) == {}
