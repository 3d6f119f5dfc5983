"""Write the miniatures: a folder for each benchmark, its files named and formed as the publisher's are."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from calumma.platform import storage
from calumma.platform.evaluation.miniatures.facts import (
    COLOURS,
    DIALOGUES,
    FACTS,
    FOLLOWING,
    INTERLEAVED,
    LOOK_ALIKES,
    NAMES,
    SHAPES,
    THINGS,
    UNSAFE,
)

VERSION = "2"
SIDE = 64  # pixels of a picture
SUBJECTS = ("household", "nature")  # of the miniature of MMLU
MATH = ("algebra", "number_theory")
Files = dict[str, bytes]


def write_miniatures(location: str) -> list[str]:
    """Every benchmark's folder below a location; their names. Raises StorageError."""
    for name, make in MAKERS.items():
        for path, data in make().items():
            storage.write_bytes(storage.join(location, name, path), data)
    storage.write_bytes(storage.join(location, "VERSION"), VERSION.encode())
    return list(MAKERS)


def ensure_miniatures(location: str) -> None:
    """Write them where this version's are not there yet."""
    version = storage.join(location, "VERSION")
    if not storage.exists(version) or storage.read_bytes(version) != VERSION.encode():
        write_miniatures(location)


def _lines(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _choices(number: int, count: int) -> tuple[list[str], int]:
    """A fact's answers in some order, and which is right."""
    fact = FACTS[number]
    answers = [fact.right, *fact.wrong[: count - 1]]
    random.Random(number).shuffle(answers)
    return answers, answers.index(fact.right)


def _piqa() -> Files:
    rows, labels = [], []
    for number, fact in enumerate(FACTS):
        answers, right = _choices(number, 2)
        rows.append({"id": str(number), "goal": fact.question, "sol1": answers[0], "sol2": answers[1]})
        labels.append(str(right))
    return {"valid.jsonl": _lines(rows), "valid-labels.lst": ("\n".join(labels) + "\n").encode()}


def _siqa() -> Files:
    rows, labels = [], []
    for number, fact in enumerate(FACTS):
        answers, right = _choices(number, 3)
        names = dict(zip(("answerA", "answerB", "answerC"), answers, strict=True))
        context = f"{NAMES[number]} read about it: {fact.passage}"
        rows.append({"context": context, "question": fact.question, **names})
        labels.append(str(right + 1))
    return {"dev.jsonl": _lines(rows), "dev-labels.lst": ("\n".join(labels) + "\n").encode()}


def _hellaswag() -> Files:
    rows = []
    for number, fact in enumerate(FACTS):
        answers, right = _choices(number, 4)
        first, _, _ = fact.passage.partition(". ")
        rows.append(
            {
                "ind": number,
                "activity_label": fact.subject.title(),
                "ctx_a": f"{first}.",
                "ctx_b": "so",
                "ctx": f"{first}. so",
                "endings": answers,
                "label": right,
                "split": "val",
                "split_type": "indomain",
                "source_id": f"own~{number}",
            }
        )
    return {"hellaswag_val.jsonl": _lines(rows)}


def _winogrande() -> Files:
    rows = []
    for number, thing in enumerate(THINGS):
        one, other = NAMES[number], NAMES[(number + 5) % 12]
        giver = number % 2
        verb = "gave" if giver else "got"
        rows.append(
            {
                "qID": f"own-{number}",
                "option1": one,
                "option2": other,
                "answer": "1" if giver else "2",
                "sentence": f"{one} {verb} {thing} {'to' if giver else 'from'} {other}, so it was _ who gave {thing}.",
            }
        )
    return {"dev.jsonl": _lines(rows)}


def _arc(name: str) -> Callable[[], Files]:
    def make() -> Files:
        rows = []
        for number, fact in enumerate(FACTS):
            answers, right = _choices(number, 4)
            choices = [{"text": text.rstrip("."), "label": "ABCD"[n]} for n, text in enumerate(answers)]
            question = {"stem": fact.question, "choices": choices}
            rows.append({"id": f"own_{number}", "question": question, "answerKey": "ABCD"[right]})
        return {name: _lines(rows)}

    return make


def _boolq() -> Files:
    rows = [{"question": f.claim, "title": f.subject.title(), "answer": f.holds, "passage": f.passage} for f in FACTS]
    return {"dev.jsonl": _lines(rows)}


def _gsm8k() -> Files:
    def rows(start: int) -> list[dict[str, str]]:
        found = []
        for number in range(12):
            name, thing, first, more = NAMES[number], THINGS[(number + start) % 12], 3 + number + start, 2 + number % 5
            total = first + more
            answer = f"It is {first} + {more} = <<{first}+{more}={total}>>{total} {thing}.\n#### {total}"
            found.append(
                {
                    "question": f"{name} has {first} {thing} and finds {more} more. How many does {name} have now?",
                    "answer": answer,
                }
            )
        return found

    return {"train.jsonl": _lines(rows(1)), "test.jsonl": _lines(rows(20))}


def _math() -> Files:
    files: Files = {}
    for subject in MATH:
        for split, start, count in (("train", 2, 4), ("test", 20, 6)):
            for number in range(count):
                a, b = start + number, 3 + number
                if subject == "algebra":
                    problem, answer = f"What is $x$ if $x - {a} = {b}$?", a + b
                    solution = f"We add ${a}$ on both sides: $x = \\boxed{{{answer}}}$."
                else:
                    problem, answer = f"What is the remainder of ${a * b + 1}$ when it is divided by ${b}$?", 1
                    solution = f"${a * b + 1} = {a} \\cdot {b} + 1$, so the remainder is $\\boxed{{{answer}}}$."
                row = {
                    "problem": problem,
                    "level": "Level 1",
                    "type": subject.replace("_", " ").title(),
                    "solution": solution,
                }
                files[f"{split}/{subject}/{number + 1}.json"] = json.dumps(row).encode()
    return files


def _mmlu() -> Files:
    import csv

    files: Files = {}
    for half, subject in enumerate(SUBJECTS):
        for split, numbers in (("test", range(half * 6, half * 6 + 6)), ("dev", range(6 - half * 6, 11 - half * 6))):
            text = io.StringIO()
            for number in numbers:
                answers, right = _choices(number, 4)
                csv.writer(text, lineterminator="\n").writerow([FACTS[number].question, *answers, "ABCD"[right]])
            # MMLU's own subjects, so that its task is found
            name = {"household": "miscellaneous", "nature": "high_school_geography"}[subject]
            files[f"{split}/{name}_{split}.csv"] = text.getvalue().encode()
    return files


# -- pictures


def shapes(seed: int, count: int = 1) -> tuple[PILImage.Image, str, str, str]:
    """A picture of equal shapes on a ground, and its shape, colour and ground."""
    pick = random.Random(seed)
    shape, (colour, ground) = SHAPES[seed % 3], pick.sample(sorted(COLOURS), 2)
    picture = PILImage.new("RGB", (SIDE, SIDE), COLOURS[ground])
    draw = ImageDraw.Draw(picture)
    for number in range(count):
        size = 34 if count == 1 else 20
        x, y = (
            (pick.randint(4, SIDE - size - 4) if count == 1 else 6 + number % 2 * 30),
            (pick.randint(4, SIDE - size - 4) if count == 1 else 6 + number // 2 * 30),
        )
        box = (x, y, x + size, y + size)
        if shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        elif shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLOURS[colour])
    return picture, shape, colour, ground


def _jpeg(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _captions(dataset: str) -> Callable[[], Files]:
    def make() -> Files:
        files: Files = {}
        images = []
        for number in range(18):
            picture, shape, colour, ground = shapes(number + (100 if dataset == "flickr30k" else 0))
            name = f"COCO_val2014_{number + 1:012d}.jpg" if dataset == "coco" else f"{number + 1000}.jpg"
            folder = "val2014" if dataset == "coco" else "flickr30k-images"
            files[f"{folder}/{name}"] = _jpeg(picture)
            texts = [
                f"A {colour} {shape} on a {ground} ground.", f"A {shape} that is {colour} lies on {ground}.",
                f"On a {ground} surface there is one {colour} {shape}.", f"The picture shows a {colour} {shape}.",
                f"A simple drawing of a {colour} {shape}, {ground} all around it.",
            ]  # fmt: skip
            sentences = [
                {"raw": text, "imgid": number, "sentid": 5 * number + n, "tokens": text.lower().rstrip(".").split()}
                for n, text in enumerate(texts)
            ]
            entry = {
                "filename": name,
                "imgid": number,
                "split": "test" if number < 12 else "train",
                "sentences": sentences,
                "sentids": [s["sentid"] for s in sentences],
            }
            images.append(entry | ({"filepath": "val2014", "cocoid": number + 1} if dataset == "coco" else {}))
        files[f"dataset_{dataset}.json"] = json.dumps({"images": images, "dataset": dataset}).encode()
        return files

    return make


def _vqa(prefix: str) -> Callable[[], Files]:
    def make() -> Files:
        files: Files = {}
        for split, start, count in (("train2014", 40, 6), ("val2014", 0, 12)):
            asked, answered = [], []
            for number in range(start, start + count):
                many = number % 3 == 2
                picture, shape, colour, ground = shapes(number, 1 + number % 4 if many else 1)
                files[f"{split}/COCO_{split}_{number + 1:012d}.jpg"] = _jpeg(picture)
                question, answer = [
                    (f"What colour is the {shape}?", colour), ("What shape is it?", shape),
                    (f"How many {shape}s are there?", str(1 + number % 4)),
                ][number % 3]  # fmt: skip
                other = [colour, f"a {shape}", ground][number % 3]
                people = [answer] * 8 + [other, answer]
                key = 10 * number
                asked.append({"image_id": number + 1, "question": question, "question_id": key})
                answered.append(
                    {
                        "question_id": key,
                        "image_id": number + 1,
                        "multiple_choice_answer": answer,
                        "answer_type": "number" if many else "other",
                        "question_type": question.partition(" the")[0].lower(),
                        "answers": [
                            {"answer": each, "answer_confidence": "yes", "answer_id": n + 1}
                            for n, each in enumerate(people)
                        ],
                    }
                )
            head = {
                "info": {"description": "a miniature in its own words"},
                "data_type": "mscoco",
                "data_subtype": split,
            }
            files[f"{prefix}OpenEnded_mscoco_{split}_questions.json"] = json.dumps(head | {"questions": asked}).encode()
            files[f"{prefix}mscoco_{split}_annotations.json"] = json.dumps(head | {"annotations": answered}).encode()
        return files

    return make


def _squad() -> Files:
    paragraphs = []
    for number, fact in enumerate(FACTS):
        answer = fact.right.rstrip(".")
        start = fact.passage.lower().find(answer.lower())
        known = [{"text": fact.passage[start : start + len(answer)], "answer_start": start}] if start >= 0 else []
        qas = [{"id": f"own{number}", "question": fact.question, "answers": known, "is_impossible": not known}]
        paragraphs.append({"context": fact.passage, "qas": qas})
    data = [{"title": "Everyday", "paragraphs": paragraphs}]
    return {"dev-v2.0.json": json.dumps({"version": "v2.0", "data": data}).encode()}


def _mnist() -> Files:
    """Scans of UCI's digits, which come with scikit-learn, at MNIST's size."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.argsort(digits.target, kind="stable").reshape(-1)
    own = {digit: [n for n in order if digits.target[n] == digit] for digit in range(10)}
    files: Files = {}
    for prefix, chosen in (
        ("train", [n for digit in range(10) for n in own[digit][2:14]]),
        ("t10k", [own[n % 10][n // 10] for n in range(12)]),
    ):
        scans = [
            np.asarray(
                PILImage.fromarray((digits.images[n] * 15).astype(np.uint8)).resize(
                    (28, 28), PILImage.Resampling.BICUBIC
                )
            )
            for n in chosen
        ]
        pixels = struct.pack(">IIII", 2051, len(scans), 28, 28) + np.stack(scans).tobytes()
        labels = struct.pack(">II", 2049, len(scans)) + bytes(int(digits.target[n]) for n in chosen)
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(pixels, mtime=0)
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(labels, mtime=0)
    return files


def _following() -> Files:
    return {"evaluation_metadata.jsonl": _lines({"tag": tag, "include": [], "prompt": text} for tag, text in FOLLOWING)}


def _interleaved() -> Files:
    return {"prompts.jsonl": _lines({"prompt": text, "structure": structure} for text, structure in INTERLEAVED)}


def _safety() -> Files:
    dialogues = _lines({"turns": turns, "category": category} for category, turns in DIALOGUES)
    return {**_prompts(UNSAFE)(), "red_team.jsonl": dialogues}


def _prompts(rows: tuple[tuple[str, str], ...]) -> Callable[[], Files]:
    return lambda: {"prompts.jsonl": _lines({"prompt": text, "category": category} for category, text in rows)}


MAKERS: dict[str, Callable[[], Files]] = {
    "piqa": _piqa, "siqa": _siqa, "hellaswag": _hellaswag, "winogrande": _winogrande,
    "arc_easy": _arc("ARC-Easy-Test.jsonl"), "arc_challenge": _arc("ARC-Challenge-Test.jsonl"),
    "openbookqa": _arc("test.jsonl"), "boolq": _boolq, "gsm8k": _gsm8k, "math": _math, "mmlu": _mmlu,
    "coco": _captions("coco"), "flickr30k": _captions("flickr30k"), "vqav2": _vqa("v2_"), "okvqa": _vqa(""),
    "squad": _squad, "mnist": _mnist, "following": _following, "interleaved": _interleaved,
    "safety": _safety, "look_alikes": _prompts(LOOK_ALIKES),
}  # fmt: skip
