"""Evaluation of a model in training: the tasks of the job `evaluate`, answered by all workers together from the weights
that they hold, graded by one of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

from calumma.platform.evaluation.evaluate import sampling_params
from calumma.platform.evaluation.judge import Judge
from calumma.platform.evaluation.tasks import grade, make_case, summary
from calumma.platform.shards.documents import read_documents
from calumma.platform.training.specification import TrainSpecification

if TYPE_CHECKING:
    from calumma.model import MixedModalModel
    from calumma.model.generation.passes.decoder import Decoder


def evaluate(
    model: MixedModalModel,
    spec: TrainSpecification,
    decoder: Decoder | None = None,
    beat: Callable[[], object] = lambda: None,
    graded: bool = True,
) -> dict[str, float]:
    """Shares of right answers, by task and measure, where they are `graded`. The weights are the model's, or those of a
    `decoder`: then every worker calls it. `beat` is called as it goes on. Raises JudgeDataError, InvalidCase,
    StorageError."""
    from calumma.model import generate

    asked = spec.evaluation
    assert asked is not None
    judge = _judge(spec.locate(asked.judge_training)) if asked.judge_training and graded else None
    found: dict[str, float] = {}
    for task in asked.tasks:
        documents = islice(read_documents(spec.locate(task.documents)), task.limit)
        cases = [make_case(task.kind, document) for document in documents]
        expected = model.encoder.encode_many([case.expected for case in cases])
        params = [
            sampling_params(case, spec.seed + number, model.image_length, len(each.ids))
            for number, (case, each) in enumerate(zip(cases, expected, strict=True))
        ]
        prompts = [case.prompt for case in cases]
        answers = generate(model, prompts, params, max_sequences=asked.batch, decoder=decoder, beat=beat)
        if not graded:
            continue
        classify = judge.classify if judge else lambda pictures: [""] * len(pictures)
        grades = [grade(case, answer, classify) for case, answer in zip(cases, answers, strict=True)]
        found |= {f"{task.name}_{key}": value for key, value in summary(task.kind, grades).items()}
    return found


def _judge(uri: str) -> Judge:
    return Judge.train(
        [(i.open(), i.caption) for document in read_documents(uri) for i in document.images if i.caption]
    )
