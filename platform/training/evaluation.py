"""Evaluation of a model in training: the tasks of the job `evaluate`, answered by the worker that has all weights."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from calumma.platform.evaluation.evaluate import sampling_params
from calumma.platform.evaluation.judge import Judge
from calumma.platform.evaluation.tasks import grade, make_case, summary
from calumma.platform.shards.documents import read_documents
from calumma.platform.training.specification import TrainSpecification

if TYPE_CHECKING:
    from calumma.model import MixedModalModel


def evaluate(model: MixedModalModel, spec: TrainSpecification) -> dict[str, float]:
    """Shares of right answers, by task and measure. Raises JudgeDataError, InvalidCase, StorageError."""
    from calumma.model import generate

    asked = spec.evaluation
    assert asked is not None
    judge = _judge(spec.locate(asked.judge_training)) if asked.judge_training else None
    found: dict[str, float] = {}
    for task in asked.tasks:
        documents = islice(read_documents(spec.locate(task.documents)), task.limit)
        cases = [make_case(task.kind, document) for document in documents]
        expected = model.encoder.encode_many([case.expected for case in cases])
        params = [
            sampling_params(case, spec.seed + number, model.image_length, len(each.ids))
            for number, (case, each) in enumerate(zip(cases, expected, strict=True))
        ]
        answers = generate(model, [case.prompt for case in cases], params, max_sequences=asked.batch)
        classify = judge.classify if judge else lambda pictures: [""] * len(pictures)
        grades = [grade(case, answer, classify) for case, answer in zip(cases, answers, strict=True)]
        found |= {f"{task.name}_{key}": value for key, value in summary(task.kind, grades).items()}
    return found


def _judge(uri: str) -> Judge:
    return Judge.train(
        [(i.open(), i.caption) for document in read_documents(uri) for i in document.images if i.caption]
    )
