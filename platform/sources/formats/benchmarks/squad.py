"""SQuAD: questions about paragraphs, and their answers in the paragraphs' words.

https://rajpurkar.github.io/SQuAD-explorer
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from calumma.model.document import Text
from calumma.platform.sources.files import BadInput, Draft, File
from calumma.platform.sources.formats.benchmarks.annotations import LARGEST, objects, parse_object
from calumma.platform.sources.formats.records.containers import COLUMNAR, JSON, records, words_of
from calumma.platform.sources.registry import ReaderItem, reader

Question = tuple[str, Any, dict[str, Any], Any]  # place, context, the rest, the answers' texts


@reader("squad", (*JSON, *COLUMNAR))
def squad(
    file: File, *, prompt: str = "{context}\n\n{question}", unanswerable: str | None = None
) -> Iterator[ReaderItem]:
    """train-v1.1.json, train-v2.0.json, or Hugging Face's rows of them: conversations of a question with its paragraph
    (as `prompt` says them) and its answer. `unanswerable` is the answer to version 2's questions that have none; by
    default these are left out, and counted.
    """
    for item in _articles(file) if file.plain_name.endswith(".json") else _rows(file):
        if isinstance(item, BadInput):
            yield item
            continue
        place, context, entry, texts = item
        question = words_of(entry.get("question"))
        if not isinstance(context, str) or question is None or not isinstance(texts, list):
            yield BadInput(place, "has no question, no context or no list of answers")
            continue
        given = [words for text in texts if (words := words_of(text))]
        answer = Counter(given).most_common(1)[0][0] if given else unanswerable
        if not given and texts:
            yield BadInput(place, "its answers are no texts")
        elif answer is None:
            file.notes.skip("questions", "without an answer")
        else:
            parts = {"{context}": context.strip(), "{question}": question}
            words = re.sub("|".join(parts), lambda match, parts=parts: parts[match[0]], prompt)  # type: ignore[misc]
            yield Draft((Text(words, "user"), Text(answer, "assistant")), place)


def _articles(file: File) -> Iterator[Question | BadInput]:
    for number, article in enumerate(objects(parse_object(file.read_all(LARGEST), ("data",)), "data")):
        paragraphs = article.get("paragraphs")
        for index, paragraph in enumerate(paragraphs if isinstance(paragraphs, list) else [None]):
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            for entry in questions if isinstance(questions, list) else [None]:
                if not isinstance(entry, dict):
                    yield BadInput(file.at(f"article {number}, paragraph {index}"), "has no list `qas` of questions")
                    continue
                answers = entry.get("answers", [])
                texts = [a.get("text") for a in answers if isinstance(a, dict)] if isinstance(answers, list) else None
                yield file.at(f"question {entry.get('id')}"), paragraph.get("context"), entry, texts


def _rows(file: File) -> Iterator[Question | BadInput]:
    for row in records(file):
        if isinstance(row, BadInput):
            yield row
            continue
        place, record = row
        answers = record.get("answers")
        yield place, record.get("context"), record, answers.get("text") if isinstance(answers, dict) else None
