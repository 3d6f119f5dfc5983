"""VQAv2: questions about COCO's images in one file, their answers in another.

https://visualqa.org/vqa_v2_teaser.html
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from calumma.model.document import Text
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, Draft, File, Malformed, Reference
from calumma.platform.sources.formats.benchmarks.annotations import (
    LARGEST,
    PROBES,
    identity,
    images_below,
    objects,
    parse_object,
)
from calumma.platform.sources.formats.benchmarks.captions import IMAGES
from calumma.platform.sources.formats.images.values import OtherImages
from calumma.platform.sources.formats.records.containers import words_of
from calumma.platform.sources.registry import ReaderItem, reader

QUESTIONS, ANNOTATIONS = "questions.json", "annotations.json"
NAMES = ("COCO_{subset}_{id:012d}.jpg", "{id:012d}.jpg")  # as COCO named images in 2014, and in 2017


def _choose(uris: list[str]) -> tuple[Collection[str], Collection[str]]:
    along = [uri for uri in uris if uri.endswith(ANNOTATIONS) or uri.lower().endswith(IMAGES)]
    return [uri for uri in uris if uri.endswith(QUESTIONS)], along


@reader("vqav2", (QUESTIONS,), references="location", choose=_choose)
def vqav2(
    file: File, *, annotations: str | None = None, prompt: str = "{question}", other_images: OtherImages = "bad"
) -> Iterator[ReaderItem]:
    """v2_OpenEnded_mscoco_train2014_questions.json with v2_mscoco_train2014_annotations.json beside it (`annotations`:
    the name of another file beside it): conversations of an image, its question (as `prompt` says it) and the answer
    that most people gave. Images are found below the source's `images` (default: its location), also in train2014/.
    """
    content = parse_object(file.read_all(LARGEST), ("questions",))
    answers = _answers(file, annotations)
    subset = str(content.get("data_subtype") or "")
    questions = objects(content, "questions")
    folder, name = _image_names(file, subset, questions)
    for entry in questions:
        number, image = entry.get("question_id"), entry.get("image_id")
        place = file.at(f"question {number}")
        question = words_of(entry.get("question"))
        of, answer = answers.pop(identity(number), (None, None))
        if question is None or not isinstance(image, int):
            yield BadInput(place, "has no question or no image_id")
        elif answer is None:
            what = (
                "has no answer among the annotations" if of is None else "has different answers among the annotations"
            )
            yield BadInput(place, what)
        elif of is not None and of != image:
            yield BadInput(place, f"is about the image {image}, and its answer about the image {of}")
        else:
            target = posixpath.join(folder, name.format(subset=subset, id=image))
            picture = Reference(target, None, "user", other_images == "leave_out")
            words = Text(prompt.replace("{question}", question), "user")
            yield Draft((picture, words, Text(answer, "assistant")), place)
    if answers:
        file.notes.skip("annotations", "of other questions", len(answers))


def _answers(file: File, name: str | None) -> dict[Any, tuple[Any, str | None]]:
    """Question -> its image and the answer that most people gave (none of different ones). Raises Malformed."""
    folder, _, own = file.uri.rpartition("/")
    if name is None:
        name = own.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace(QUESTIONS, ANNOTATIONS)
    try:
        data = storage.read_bytes(f"{folder}/{name}" if folder else name)
    except storage.NotFound as error:
        raise Malformed(
            f"its answers, {name}, are not beside it (the option `annotations` names them; test questions have none)"
        ) from error
    answers: dict[Any, tuple[Any, str | None]] = {}
    for entry in objects(parse_object(data, ("annotations",)), "annotations"):
        words = words_of(entry.get("multiple_choice_answer"))
        if words is None:
            given = [words_of(a.get("answer")) for a in entry.get("answers") or () if isinstance(a, dict)]
            words = next((answer for answer, _ in Counter(filter(None, given)).most_common(1)), None)
        number, found = identity(entry.get("question_id")), (entry.get("image_id"), words)
        if words is not None and number is not None:
            answers[number] = found if answers.get(number, found) == found else (number, None)
    return answers


def _image_names(file: File, subset: str, questions: list[dict[str, Any]]) -> tuple[str, str]:
    """The folder of the images and how they are named."""
    ids = [entry["image_id"] for entry in questions[:PROBES] if isinstance(entry.get("image_id"), int)]
    for name in NAMES:
        folders = ("", subset, f"images/{subset}", "images", "train2017", "val2017")
        folder = images_below(file, [name.format(subset=subset, id=number) for number in ids], folders)
        if folder is not None:
            return folder, name
    return "", NAMES[0]
