"""VQAv2 and OK-VQA (questions about COCO's pictures, ten people's answers each), and SQuAD (a paragraph, a question).

VQA's files are those of visualqa.org and okvqa.allenai.org: …questions.json, …annotations.json, and the pictures. The
paper's VQAv2 figure is of test-dev, whose answers are not public: here it is the validation split.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from calumma.model.document import Image, Segment, Text
from calumma.platform import storage
from calumma.platform.evaluation.benchmarks.files import field, named, read, read_json, split_files
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
from calumma.platform.evaluation.metrics import questions
from calumma.platform.evaluation.systems.prompts import Sampling

PROMPT = "Answer with one word or a few."
LONGEST = 16  # tokens of a short answer
LONGEST_SPAN = 48
Asked = dict[str, Any]


def read_vqa(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """Raises BenchmarkDataError."""
    entries = _vqa(location, task.split or "validation")[: task.limit]
    pictures = {PurePosixPath(uri).stem: uri for uri in storage.list_inputs(location).sizes if _is_picture(uri)}
    missing = [one for one in entries if _picture(one, pictures) is None]
    if missing:
        raise BenchmarkDataError(
            f"{location}: {len(missing)} of {len(entries)} questions have no picture there; the first asks about image "
            f"{missing[0]['image_id']}, say COCO_val2014_{int(missing[0]['image_id']):012d}.jpg"
        )
    pool = [one for one in _vqa(location, "train") if _picture(one, pictures)] if task.shots else []
    if len(pool) < task.shots:
        raise BenchmarkDataError(f"{location} has {len(pool)} questions to train on: too few for {task.shots} shots")
    items = []
    for number, entry in enumerate(entries):
        chosen = random.Random(f"{seed}/{number}").sample(pool, task.shots)
        examples = [_vqa_question(one, pictures, f" {_most_said(one)}\n") for one in chosen]
        question = _vqa_question(entry, pictures)
        if not examples:
            question[1] = Text(f"{entry['question']} {task.prompt or PROMPT}")
        sampling = Sampling(max_tokens=LONGEST, stop=("\n",) if examples else (), seed=seed + number)
        people = [str(answer["answer"]) for answer in entry["answers"]]
        text = f"{entry['question']} {_most_said(entry)}"
        items.append(Item(str(entry["question_id"]), few_shots(examples, question), sampling, people, text))
    return items


def _vqa(location: str, split: str) -> list[Asked]:
    """Questions with their answers."""
    asked = split_files(named(location, r"questions\.json$", "…questions.json"), split)
    answered = split_files(named(location, r"annotations\.json$", "…annotations.json"), split)
    if not asked or not answered:
        raise BenchmarkDataError(f"{location} has no questions and annotations of the split {split}")
    people = {one["question_id"]: one for uri in answered for one in _list(uri, "annotations")}
    entries = [one for uri in asked for one in _list(uri, "questions")]
    if lacking := [one for one in entries if one.get("question_id") not in people]:
        raise BenchmarkDataError(
            f"{asked[0]}: {len(lacking)} of {len(entries)} questions have no answers in {answered[0]}, "
            f"{lacking[0].get('question_id')} first: are they of the same split?"
        )
    return [{**one, "answers": people[one["question_id"]]["answers"]} for one in entries]


def _list(uri: str, name: str) -> list[Asked]:
    content = read_json(uri)
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise BenchmarkDataError(f"{uri} has no list `{name}`")
    return found


def _is_picture(uri: str) -> bool:
    return uri.lower().endswith((".jpg", ".jpeg", ".png"))


def _picture(entry: Asked, pictures: dict[str, str]) -> str | None:
    number = entry.get("image_id")
    if not isinstance(number, int):
        return None
    names = (f"COCO_val2014_{number:012d}", f"COCO_train2014_{number:012d}", f"{number:012d}", str(number))
    return next((pictures[name] for name in names if name in pictures), None)


def _found(entry: Asked, pictures: dict[str, str]) -> str:
    uri = _picture(entry, pictures)
    assert uri is not None
    return uri


def _most_said(entry: Asked) -> str:
    answers = [str(answer["answer"]) for answer in entry["answers"]]
    return max(answers, key=answers.count)


def _vqa_question(entry: Asked, pictures: dict[str, str], answer: str = "") -> list[Segment]:
    return [Image(read(_found(entry, pictures))), Text(f"Question: {entry['question']} Answer:{answer}")]


def grade_vqa(items: Sequence[Item], answers: Answers) -> Measured:
    said = [questions.first_line(first_text(each)).rstrip(".") for each in answers]
    return measured([
        Graded({"accuracy": questions.vqa_accuracy(text, item.expected)}, text, ", ".join(dict.fromkeys(item.expected)))
        for item, text in zip(items, said, strict=True)
    ])  # fmt: skip


# -- SQuAD


def read_squad(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """dev-v1.1.json or dev-v2.0.json. Raises BenchmarkDataError."""
    files = split_files(named(location, r"\.json$", "dev-v1.1.json or dev-v2.0.json"), task.split or "validation")
    if not files:
        raise BenchmarkDataError(f"{location} has no file of the split {task.split or 'validation'}, say dev-v2.0.json")
    entries = _squad(files[0])
    training = split_files(named(location, r"\.json$", "a file"), "train") if task.shots else []
    pool = _squad(training[0]) if training else []
    if len(pool) < task.shots:
        raise BenchmarkDataError(f"{location} has {len(pool)} questions to train on: too few for {task.shots} shots")
    items = []
    for number, (key, paragraph, question, known) in enumerate(entries[: task.limit]):
        chosen = random.Random(f"{seed}/{number}").sample(pool, task.shots)
        examples = [[Text(f"{_squad_prompt(one[1], one[2])} {(one[3] or ['none'])[0]}\n\n")] for one in chosen]
        prompt = few_shots(examples, [Text(_squad_prompt(paragraph, question))])
        sampling = Sampling(max_tokens=LONGEST_SPAN, stop=("\n",) if examples else (), seed=seed + number)
        items.append(Item(key, prompt, sampling, known, f"{paragraph} {question}"))
    return items


def _squad(uri: str) -> list[tuple[str, str, str, list[str]]]:
    content = read_json(uri)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        raise BenchmarkDataError(f"{uri} has no list `data`: is it SQuAD's?")
    return [
        (str(qa["id"]), paragraph["context"], qa["question"], [answer["text"] for answer in qa.get("answers") or ()])
        for article in data
        for paragraph in field(article, ("paragraphs",), uri)
        for qa in field(paragraph, ("qas",), uri)
    ]


def _squad_prompt(paragraph: str, question: str) -> str:
    return f"{paragraph.strip()}\nQuestion: {question.strip()}\nAnswer:"


def grade_squad(items: Sequence[Item], answers: Answers) -> Measured:
    graded = []
    for item, each in zip(items, answers, strict=True):
        said = questions.first_line(first_text(each))
        text = "" if said.lower() in ("none", "no answer", "unanswerable") else said
        values = {
            "exact_match": questions.squad_exact(text, item.expected), "f1": questions.squad_f1(text, item.expected)
        }  # fmt: skip
        graded.append(Graded(values, said, ", ".join(dict.fromkeys(item.expected)) or "no answer"))
    return measured(graded)
