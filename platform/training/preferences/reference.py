"""What the reference model, that which training starts from, says of every answer: computed once, by all workers each
on its share, and kept in the output, so that training holds no second model and a resumed run computes nothing anew.

An answer is found by its document's tokens, whatever micro-batch they come in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from calumma.platform import storage
from calumma.platform.shards.row_groups import RowGroupReader, all_micro_batches, context_of
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.preferences.losses import AnswerScores
from calumma.platform.training.steps.engine import Batch
from calumma.platform.training.steps.held_out import read_row_group

FOLDER = "reference"


class ReferenceScores:
    """By the digest of a document's tokens: sums of its answer's log-probabilities, of text and of image codes."""

    def __init__(self, values: dict[int, tuple[float, float]]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def of(self, batch: Batch, like: AnswerScores) -> AnswerScores:
        """As `like`, which is of this micro-batch. Raises TrainingFailed on a document that was never scored."""
        text_BK, image_BK = torch.zeros_like(like.text_BK), torch.zeros_like(like.image_BK)
        for row, number, key in documents(batch):
            if key not in self._values:
                raise TrainingFailed(
                    "a pair has no score of the reference model: the token shards have changed since they were scored; "
                    "run with --force"
                )
            text_BK[row, number], image_BK[row, number] = self._values[key]
        return replace(like, text_BK=text_BK, image_BK=image_BK)


def documents(batch: Batch) -> Iterable[tuple[int, int, int]]:
    """(row, number in the row, key) of every document."""
    tokens_BT, segments_BT = batch.tokens.cpu(), batch.segments.cpu()
    for row, (tokens_T, segments_T) in enumerate(zip(tokens_BT, segments_BT, strict=True)):
        for number in range(int(segments_T.max()) + 1 if segments_T.numel() else 0):
            content = tokens_T[segments_T == number].numpy().astype("<i4").tobytes()
            yield row, number, int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


def reference_scores(
    engine: Any,
    score: Any,
    output: str,
    uris: list[str],
    inputs: dict[str, str],
    rank: int,
    world: int,
    reader: RowGroupReader,
    resumed: bool,
) -> ReferenceScores:
    """Those that are kept, or computed now by the weights as they are. Every worker calls it. score(engine, batch):
    `AnswerScores`. resumed: the weights are no longer those of the start. Raises TrainingFailed, StorageError."""
    place = storage.join(output, FOLDER, f"{_name(uris, inputs)}.safetensors")
    if storage.exists(place):
        return _read(place)
    if resumed:
        raise TrainingFailed(f"{place} is not there any more, and the model has gone on: run with --force")
    found: dict[int, tuple[float, float]] = {}
    engine.eval()
    with torch.no_grad():
        for uri in uris:
            manifest = Manifest.read(uri)
            micro_batches, own = all_micro_batches(uri, manifest), replace(reader, context=context_of(manifest))
            for turn in range(-(-len(micro_batches) // world)):
                index = turn * world + rank
                batch = read_row_group(own, micro_batches[min(index, len(micro_batches) - 1)])
                scores: AnswerScores = score(engine, batch)
                text_BK, image_BK = scores.text_BK.tolist(), scores.image_BK.tolist()
                for row, number, key in documents(batch):
                    found[key] = (text_BK[row][number], image_BK[row][number])
    engine.train()
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, found)
        found = {key: value for part in parts for key, value in part.items()}
    if rank == 0:
        keys = torch.tensor(list(found), dtype=torch.int64)
        values = torch.tensor(list(found.values()), dtype=torch.float64).reshape(-1, 2)
        storage.write_bytes(place, save({"keys": keys, "values": values}))
    return ReferenceScores(found)


def _read(place: str) -> ReferenceScores:
    stored: dict[str, Tensor] = load(storage.read_bytes(place))
    pairs = zip(stored["keys"].tolist(), stored["values"].tolist(), strict=True)
    return ReferenceScores({key: (text, image) for key, (text, image) in pairs})


def _name(uris: list[str], inputs: dict[str, str]) -> str:
    """Of the pairs and the model."""
    return hashlib.sha256(json.dumps([uris, inputs], sort_keys=True).encode()).hexdigest()[:16]
