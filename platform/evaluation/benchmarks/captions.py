"""COCO and Flickr30k captions on Karpathy's splits: dataset_coco.json or dataset_flickr30k.json and the pictures.

Examples (0 to 32) stand before the question as pictures with their captions; the paper used two (section 4.2).
"""

from __future__ import annotations

import posixpath
import random
from collections.abc import Sequence
from typing import Any

from calumma.model.document import Image, Segment, Text
from calumma.platform import storage
from calumma.platform.evaluation.benchmarks.files import named, read, read_json
from calumma.platform.evaluation.benchmarks.items import (
    Answers,
    BenchmarkDataError,
    Graded,
    Item,
    Measured,
    few_shots,
    first_text,
    measured,
)
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.metrics import captions
from calumma.platform.evaluation.metrics.questions import first_line
from calumma.platform.evaluation.systems.prompts import Sampling

FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "Images")
PROMPT = "Describe the picture in one short sentence."
LONGEST = 32  # tokens of a caption


def read_captions(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """Items of the test split, or `split`. Raises BenchmarkDataError."""
    [annotations, *_] = named(location, r"(^|/)dataset_\w+\.json$", "dataset_coco.json or dataset_flickr30k.json")
    content = read_json(annotations)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise BenchmarkDataError(f"{annotations} has no list `images`: is it one of Karpathy's splits?")
    asked = [entry for entry in entries if entry.get("split") == (task.split or "test")]
    pool = [entry for entry in entries if entry.get("split") in ("train", "restval")]
    if not asked:
        raise BenchmarkDataError(f"{annotations} has no image of the split {task.split or 'test'}")
    if len(pool) < task.shots:
        raise BenchmarkDataError(f"{annotations} has {len(pool)} images to train on: too few for {task.shots} shots")
    asked = asked[: task.limit]
    present = set(storage.list_inputs(location).sizes)
    missing = [entry for entry in asked if _picture(location, entry, present) is None]
    if missing:
        raise BenchmarkDataError(
            f"{location}: {len(missing)} of {len(asked)} pictures are missing, {missing[0].get('filename')} first; put "
            f"them there or into {' or '.join(f'{folder}/' for folder in FOLDERS[1:])}"
        )
    pool = [entry for entry in pool if _picture(location, entry, present) is not None]
    items = []
    for number, entry in enumerate(asked):
        chosen = random.Random(f"{seed}/{number}").sample(pool, min(task.shots, len(pool)))
        examples: list[list[Segment]] = [  # the picture, then its caption
            [_image(location, one, present), Text(f" {_sentences(one)[0].strip()}\n")] for one in chosen
        ]
        question: list[Segment] = [_image(location, entry, present)]
        if not examples:
            question.append(Text(task.prompt or PROMPT))
        sampling = Sampling(max_tokens=LONGEST, stop=("\n",) if examples else (), seed=seed + number)
        sentences = _sentences(entry)
        items.append(
            Item(str(entry.get("filename")), few_shots(examples, question), sampling, sentences, " ".join(sentences))
        )
    return items


def _picture(location: str, entry: dict[str, Any], present: set[str]) -> str | None:
    name = posixpath.join(str(entry.get("filepath") or ""), str(entry.get("filename")))
    for folder in FOLDERS:
        for path in (name, str(entry.get("filename"))):
            if (uri := storage.join(location, folder, path)) in present:
                return uri
    return None


def _image(location: str, entry: dict[str, Any], present: set[str]) -> Image:
    uri = _picture(location, entry, present)
    assert uri is not None
    return Image(read(uri))


def _sentences(entry: dict[str, Any]) -> list[str]:
    found = [str(s["raw"]) for s in entry.get("sentences") or () if isinstance(s, dict) and s.get("raw")]
    if not found:
        raise BenchmarkDataError(f"the image {entry.get('filename')} has no sentences")
    return found


def grade_captions(items: Sequence[Item], answers: Answers) -> Measured:
    said = [first_line(first_text(each)) for each in answers]
    scores = captions.score(said, [item.expected for item in items])
    graded = [
        Graded({"cider": cider, "rouge_l": rouge}, caption, item.expected[0])
        for item, caption, cider, rouge in zip(items, said, scores.ciders, scores.rouges, strict=True)
    ]
    return measured(graded, {f"bleu_{size}": value for size, value in enumerate(scores.bleus, start=1)})
