"""What a model answers to held-out examples, and how well it foretells them: before a fine-tuning, and after it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from calumma.jobs.tuning.settings import Machine
from calumma.jobs.tuning.split import HELD_OUT
from calumma.model.document import Document, Turn
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.training.specification import FinetuneSpecification

if TYPE_CHECKING:
    from calumma.model import MixedModalModel

FILE = "samples.json"
MOST_TOKENS = 256  # of an answer's text


@dataclass(frozen=True)
class Sample:
    """A question as it was held out, the answer that stood there, and the model's; documents as rows."""

    prompt: dict[str, Any]
    expected: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any] | None = None

    def with_after(self, other: Sample) -> Sample:
        """other: the same question, asked after training."""
        return replace(self, after=other.before)


@dataclass(frozen=True)
class Answers:
    """`losses`: name -> nats a token."""

    samples: list[Sample]
    losses: dict[str, float]


@dataclass(frozen=True)
class Kept:
    samples: list[Sample]
    before: dict[str, float]
    after: dict[str, float]


def questions(documents: Iterator[Document]) -> Iterator[tuple[Document, Document]]:
    """(question, the answer that is expected) of each document that has both: the last turn is the answer; of a plain
    document all but its first segment is."""
    for document in documents:
        turns = list(document.turns()) if document.is_conversation else [
            Turn(None, document.segments[:1]), Turn(None, document.segments[1:])
        ]  # fmt: skip
        if len(turns) < 2 or not turns[-1].segments or (document.is_conversation and turns[-1].role != "assistant"):
            continue
        asked = tuple(segment for turn in turns[:-1] for segment in turn.segments)
        yield replace(document, segments=asked), replace(document, segments=turns[-1].segments)


def answers_of(model: str, spec: FinetuneSpecification, count: int, machine: Machine, progress: Progress) -> Answers:
    """In a worker of the cluster, which is gone with its memory when it has answered."""
    import ray

    progress(0, 1, "loading the model")
    work: Any = ray.remote(num_cpus=1, num_gpus=min(1, machine.gpus), max_calls=1)(_work)
    found: Answers = ray.get(work.remote(model, spec, count, machine.device, machine.cores))
    return found


def _work(model: str, spec: FinetuneSpecification, count: int, device: str, threads: int) -> Answers:
    import torch

    from calumma.model import load
    from calumma.platform.shards.documents import read_documents

    torch.set_num_threads(threads)
    if not spec.held_out or spec.preference is not None:  # of pairs the training itself measures what there is
        return Answers([], {})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with storage.local_copy(model) as folder:
        loaded = load(folder, device, dtype)
    losses = _losses(loaded, spec)
    asked: list[tuple[Document, Document]] = []
    for question, expected in questions(read_documents(spec.locate(f"data/{HELD_OUT}"))):
        if len(asked) == count:
            break
        if len(loaded.encode(question, complete=False)) < loaded.config.context - 1:
            asked.append((question, expected))
    return Answers(_answers(loaded, asked, spec.seed), losses)


def _answers(model: MixedModalModel, asked: list[tuple[Document, Document]], seed: int) -> list[Sample]:
    from calumma.model import generate
    from calumma.model.generation import PhaseSampling, SamplingParams

    if not asked:
        return []
    drawn = max((len(expected.images) for _, expected in asked), default=0)
    params = SamplingParams(
        max_tokens=min(model.config.context, MOST_TOKENS + drawn * (model.image_length + 2)),
        mode="interleaved" if drawn else "text",
        text=PhaseSampling(temperature=0.0),
        seed=seed,
    )
    found = generate(model, [question for question, _ in asked], params)
    return [
        Sample(question.to_row(), expected.to_row(), answer.to_row())
        for (question, expected), answer in zip(asked, found, strict=True)
    ]


class _Measured:
    """A Transformer as what `held_out.measure` takes."""

    def __init__(self, model: MixedModalModel, documents_apart: bool | None) -> None:
        self.device, self._transformer = model.device, model.transformer
        if documents_apart is not None:
            config = model.config.model_copy(update={"mask_documents": documents_apart})
            self._transformer.config = config

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._transformer(*given, **named)

    def eval(self) -> None:
        self._transformer.eval()

    def train(self) -> None:
        """It is never trained here."""


def _losses(model: MixedModalModel, spec: FinetuneSpecification) -> dict[str, float]:
    from calumma.platform.training.steps import held_out

    image_mask_V = model.vocabulary.mask(model.vocabulary.image_ids).to(model.device)
    measured = _Measured(model, spec.mask_documents)
    [uri] = [spec.locate(uri) for uri in spec.held_out.values()]
    return held_out.measure(measured, uri, image_mask_V, rank=0, world=1, reader=spec.data.reader())


# -- kept beside the model --------------------------------------------------------------------------------------------


def write(root: str, kept: Kept) -> None:
    storage.write_bytes(storage.join(root, FILE), json.dumps(asdict(kept), default=_encoded).encode())


def read(root: str) -> Kept | None:
    """What a finished fine-tuning has kept."""
    try:
        values = json.loads(storage.read_bytes(storage.join(root, FILE)), object_hook=_decoded)
    except storage.NotFound:
        return None
    return Kept([Sample(**sample) for sample in values["samples"]], values["before"], values["after"])


def _encoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(type(value).__name__)


def _decoded(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value
