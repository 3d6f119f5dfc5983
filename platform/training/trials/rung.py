"""One size of a ladder: trained once at a constant rate, and measured where copies of it have cooled down.

At each of `ends` a copy of the training, taken before it, goes on to it with a rate that falls linearly to 0 ("Scaling
laws and compute-optimal training beyond fixed training durations", arXiv 2405.18392): several lengths for little more
than the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.shards.row_groups import MicroBatch, RowGroupReader, all_micro_batches, context_of
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.steps import held_out
from calumma.platform.training.trials import width
from calumma.platform.training.trials.running import SHARE, Event, Notebook
from calumma.platform.training.trials.specification import LadderSpecification
from calumma.platform.training.trials.trial import Corpus, Trial, divided, fresh


def train_size(
    spec: LadderSpecification,
    number: int,
    rate: float,
    seed: int,
    ends: Sequence[int],
    notebook: Notebook | None = None,
) -> Iterator[Event]:
    """Events of size `number` at the first size's `rate`: `step` and `loss` every `log_every` steps; and after each of
    `ends`, steps that rise, what its copy came to: `loss` while it cooled down, `tokens` trained on, and of each
    held-out document `nll` and `counts`. Raises ShardError and StorageError."""
    corpus = Corpus.open(spec, seed, spec.hold_back)
    base, shape = (spec.shape(one, len(corpus.image_mask_V)) for one in (0, number))
    documents = held_out_batches(spec)
    trunk = _trial(spec, corpus, shape, base, seed)
    known = (notebook.read() if notebook else None) or {"events": [], "tokens": 0}
    events, tokens = list(known["events"]), int(known["tokens"])
    if "trunk" in known:
        trunk.load(known["trunk"])
    yield from events
    total = sum(_lengths(spec, ends))
    done = sum(_lengths(spec, ends)[: sum("nll" in event for event in events)])

    def turn(copy: Trial | None = None, copied: tuple[int, float] = (0, 0.0)) -> None:
        if notebook:
            state = {"events": events, "tokens": tokens, "trunk": trunk.state()}
            notebook.turn(lambda: state | ({"copy": copy.state(), "copied": copied} if copy else {}))

    for end in ends[sum("nll" in event for event in events) :]:
        start, began = spec.cooldown_start(end), _before(spec, ends, end)
        while trunk.taken < start:
            found = trunk.step(rate * min(1.0, (trunk.taken + 1) / max(1, spec.warmup_steps)))
            tokens += found.tokens
            if trunk.taken % spec.log_every == 0:
                share = (done + trunk.taken - began) / total
                events.append({"step": trunk.taken, "loss": found.nll / max(found.tokens, 1), SHARE: share})
                yield events[-1]
            turn()
        copy = _trial(spec, corpus, shape, base, seed)
        copy.load(known.get("copy") or trunk.state())
        copied, nats = known.get("copied") or (tokens, 0.0)
        known = {}
        while copy.taken < end:
            found = copy.step(rate * (end - copy.taken) / (end - start + 1))
            copied, nats = copied + found.tokens, nats + found.nll
            turn(copy, (copied, nats))
        done += end - began
        nll, counts = document_losses(copy.transformer, documents, corpus.image_mask_V)
        fell = nats / max(copied - tokens, 1)
        events.append({"step": end, "loss": fell, "tokens": copied, "nll": nll, "counts": counts, SHARE: done / total})
        yield events[-1]


def _trial(spec: LadderSpecification, corpus: Corpus, shape: ModelConfig, base: ModelConfig, seed: int) -> Trial:
    transformer = fresh(shape, shape.vocabulary_size, seed, corpus.device)
    width.scale_weights(transformer, base)
    groups = width.parameter_groups(transformer, base, spec.optimizer.weight_decay)
    return Trial(corpus, transformer, groups, spec, spec.z_loss, seed)


def _before(spec: LadderSpecification, ends: Sequence[int], end: int) -> int:
    """The step that the training stands at before it goes to `end`."""
    earlier = [spec.cooldown_start(one) for one in ends if one < end]
    return max(earlier, default=0)


def _lengths(spec: LadderSpecification, ends: Sequence[int]) -> list[int]:
    """Steps that are taken for each of `ends`: from where the one before branched off."""
    return [end - start for start, end in zip([0, *map(spec.cooldown_start, ends[:-1])], ends, strict=True)]


def steps_taken(spec: LadderSpecification, ends: Sequence[int]) -> int:
    """Steps of the training and its copies."""
    return sum(_lengths(spec, ends))


# -- held-out documents ------------------------------------------------------------------------------------------------


def held_out_batches(spec: LadderSpecification) -> list[held_out.HeldOutBatch]:
    """What is measured, evenly spread over what is held out. Raises StorageError, ManifestError, ShardError."""
    parts: list[tuple[str, Manifest]] = [(uri, Manifest.read(uri)) for uri in map(spec.locate, spec.held_out)]
    if spec.hold_back:
        parts += [(uri, divided(uri, spec.hold_back)[1]) for uri in map(spec.locate, spec.mixture)]
    found: list[MicroBatch] = [one for uri, manifest in parts for one in all_micro_batches(uri, manifest)]
    number = min(spec.held_out_micro_batches, len(found))
    chosen = [found[at * len(found) // number] for at in range(number)]
    reader = RowGroupReader(context_of(parts[0][1]))
    return [held_out.read_row_group(reader, one) for one in chosen]


@torch.no_grad()
def document_losses(
    transformer: Transformer, batches: Sequence[held_out.HeldOutBatch], image_mask_V: torch.Tensor
) -> tuple[list[float], list[int]]:
    """Nats and trained tokens of each document that has some, in order; one that goes on in the next row is two."""
    device, nll, counts = image_mask_V.device, list[float](), list[int]()
    transformer.eval()
    for batch in batches:
        tokens, mask, segments = batch.tokens.to(device), batch.mask.to(device), batch.segments.to(device)
        settings: dict[str, Any] = {"targets": tokens[:, 1:], "mask": mask[:, 1:], "image_mask": image_mask_V}
        scores_BT = transformer(tokens[:, :-1], segments[:, :-1], scores=True, **settings)
        for row in range(len(tokens)):
            of_T, trained_T = segments[row, 1:].clamp(min=0), mask[row, 1:]
            documents = int(of_T.max()) + 1
            sums = torch.zeros(documents, dtype=torch.float64, device=device)
            sums.index_add_(0, of_T, torch.where(trained_T, -scores_BT[row], 0.0).double())
            numbers = torch.bincount(of_T[trained_T], minlength=documents)
            nll += [round(value, 5) for value in sums[numbers > 0].tolist()]
            counts += numbers[numbers > 0].tolist()
    transformer.train()
    return nll, counts
