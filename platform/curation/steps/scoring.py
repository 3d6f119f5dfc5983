"""Scores of documents by models or measures of one's own: actors that make their scorer once and call it in batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.curation.specification import CurateSpecification, Scorer
from calumma.platform.curation.steps import staging
from calumma.platform.curation.steps.signatures import content_hash
from calumma.platform.curation.steps.words import hash_fraction
from calumma.platform.specification import import_function

REDUCE = {"mean": lambda values: sum(values) / len(values), "min": min, "max": max}


class ScorerFailed(RuntimeError):
    """A scorer did not give a number for each of what it was given."""


class ScoringActor:
    """An actor: scores the documents of one staged file at a time."""

    def __init__(self, specification: dict[str, Any], name: str) -> None:
        """Raises SpecificationError when there is no such factory, and what that raises."""
        self._spec = CurateSpecification.model_validate(specification).scorers[name]
        self._name = name
        self._scorer = import_function(self._spec.factory, f"scorers.{name}.factory")(**self._spec.arguments)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """`task`: "file" (staged), "scores" (where to write).

        Returns {"scored": how many documents, "seconds"}. Raises StorageError and ScorerFailed."""
        begin = time.perf_counter()
        documents = staging.read_documents(task["file"])
        scores = self._of_images(documents) if self._spec.of == "images" else self._of_documents(documents)
        rows = list(scores)
        staging.write_table(task["scores"], {"id": [n for n, _ in rows], "score": [score for _, score in rows]})
        return {"scored": len(rows), "seconds": time.perf_counter() - begin}

    def _of_documents(self, documents: Iterable[tuple[int, Document]]) -> Iterator[tuple[int, float]]:
        for batch in _batches(documents, self._spec.batch):
            scores = self._call([document for _, document in batch])
            yield from zip((number for number, _ in batch), scores, strict=True)

    def _of_images(self, documents: Iterable[tuple[int, Document]]) -> Iterator[tuple[int, float]]:
        """Documents without images have no score."""
        reduce: Any = REDUCE[self._spec.reduce]
        current = -1
        values: list[float] = []
        for batch in _batches(((n, image) for n, d in documents for image in d.images), self._spec.batch):
            for (number, _), score in zip(batch, self._call([image.open() for _, image in batch]), strict=True):
                if number != current and values:
                    yield current, reduce(values)
                    values = []
                current = number
                values.append(score)
        if values:
            yield current, reduce(values)

    def _call(self, batch: list[Any]) -> list[float]:
        results = list(self._scorer(batch))
        if len(results) != len(batch):
            raise ScorerFailed(
                f"scorers.{self._name}: {self._spec.factory} gave {len(results)} scores for {len(batch)} "
                f"{self._spec.of}"
            )
        scores = [float(score) for score in results]
        if bad := [score for score in scores if not math.isfinite(score)]:
            raise ScorerFailed(f"scorers.{self._name}: {self._spec.factory} gave the score {bad[0]}; it must be finite")
        return scores


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    from calumma.platform.cluster.tasks import batched

    return batched(items, size)


def scores_uri(root: str, name: str, stem: str) -> str:
    """Where the scores of a staged file are."""
    return storage.join(root, staging.SCORES, name, f"{stem}.parquet")


def read_scores(uri: str) -> dict[int, float]:
    """Identity -> score. Raises StorageError."""
    table = staging.read_tables([uri])
    return dict(zip(table["id"].tolist(), table["score"].tolist(), strict=True)) if table else {}


def rejection(scorers: dict[str, Scorer], scores: dict[str, float]) -> str | None:
    """Why a document with these scores is dropped; None where it stays."""
    for name, score in scores.items():
        low, high = scorers[name].minimum, scorers[name].maximum
        if low is not None and score < low:
            return f"{name} below {low:g}"
        if high is not None and score > high:
            return f"{name} above {high:g}"
    return None


def copies(document: Document, seed: int, scorers: dict[str, Scorer], scores: dict[str, float]) -> int:
    """How often a document stands in the output. A fraction decides by the document's content: at 1.5 times, half of
    the documents stand twice."""
    times = 1.0
    for name, score in scores.items():
        rule = scorers[name].upsample
        if rule is not None and score > rule.above:
            times *= rule.times
    whole = math.floor(times)
    if times == whole:
        return whole
    key = b"".join(part.to_bytes(8) for part in content_hash(document))
    return whole + (hash_fraction(seed, [b"copies", key]) < times - whole)
