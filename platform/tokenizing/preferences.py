"""Tokenization of preferences: pairs -> token shards whose rows stand in twos, chosen answers and rejected ones.

Row 2i holds prompts with chosen answers and row 2i + 1 the same prompts with the rejected ones, document k of the one
belonging to document k of the other. So a pair never takes more than the context a row, and always is in one
micro-batch. Prompts go to one side, training or held out, by what they say.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calumma.model.encoding import DocumentEncoder, EncodedArrays, EncodedDocument
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.cluster.tasks import batched
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.preferences import Pair, read_pairs
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing.packing import best_fit, packed_row
from calumma.platform.tokenizing.specification import PREFERENCES, PreferenceTokensSpecification
from calumma.platform.tracking.fingerprints import fingerprints

if TYPE_CHECKING:
    from calumma.platform.tracking.run import Run

TRAIN, HELD_OUT = "train", "held_out"
ENCODED_TOGETHER = 32  # pairs
GROUPS_A_SHARD = 256


class WrongPairs(ValueError):
    """Too many pairs are wrong, or none is left; the message names the first of each kind."""


@dataclass(frozen=True)
class EncodedPair:
    chosen: EncodedArrays
    rejected: EncodedArrays

    @property
    def size(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


def run(spec: PreferenceTokensSpecification, run: Run, progress: Progress) -> Manifest:
    """Write both parts, then the manifest over them. Raises WrongPairs, SpecificationError, StorageError."""
    inputs = fingerprints([spec.locate(place) for place in (spec.location, spec.text_tokenizer, spec.image_tokenizer)])
    encoder = _encoder(spec)
    writers = {part: _Writer(spec, part, inputs, encoder.vocabulary) for part in (TRAIN, HELD_OUT)}
    faults: dict[str, tuple[int, str]] = {}
    good = 0

    def wrong(reason: str, place: str) -> None:
        count, first = faults.get(reason, (0, place))
        faults[reason] = (count + 1, first)

    pairs = read_pairs(spec.locate(spec.location), spec.images and spec.locate(spec.images), spec.mark)
    for encoded, name, key in _encoded(pairs, encoder, wrong):
        if encoded.size > spec.context + 1:
            wrong(f"longer than the context of {spec.context} tokens", name)
            continue
        good += 1
        writers[HELD_OUT if key < spec.held_out else TRAIN].add(encoded, name)
        progress(good, 0, f"{good:,} pairs")
    _judge(spec, good, faults)
    manifests = {part: writer.finish() for part, writer in writers.items() if writer.pairs}
    if TRAIN not in manifests:
        raise WrongPairs(f"{spec.location}: all {good} pairs are held out; set a smaller held_out")
    manifest = publishing.combined_manifest(PREFERENCES, spec, manifests)
    manifest.report |= {
        "pairs": good,
        "wrong": {reason: {"pairs": count, "first": place} for reason, (count, place) in faults.items()},
    }
    manifest.write(spec.locate(spec.output))
    run.log_metrics({"pairs": float(good), "wrong": float(sum(count for count, _ in faults.values()))})
    return manifest


def _judge(spec: PreferenceTokensSpecification, good: int, faults: dict[str, tuple[int, str]]) -> None:
    bad = sum(count for count, _ in faults.values())
    if good and bad <= spec.max_bad_share * (good + bad):
        return
    told = "\n".join(
        f"  {count:,} {'is' if count == 1 else 'are'} wrong: {reason}; the first: {place}"
        for reason, (count, place) in sorted(faults.items(), key=lambda fault: -fault[1][0])
    )
    allowed = f"more than max_bad_share {spec.max_bad_share:g} allows" if good else "and none is left"
    raise WrongPairs(f"{spec.location}: {bad:,} of {good + bad:,} pairs are wrong, {allowed}:\n{told}")


def _encoder(spec: PreferenceTokensSpecification) -> DocumentEncoder:
    device = "cuda" if spec.resources.gpus_per_worker else "cpu"
    text, image = spec.locate(spec.text_tokenizer), spec.locate(spec.image_tokenizer)
    with storage.local_copy(text) as text_path, storage.local_copy(image) as image_path:
        return DocumentEncoder(
            Vocabulary.read(text_path), TextTokenizer.read(text_path), ImageTokenizer.read(image_path, device)
        )


def _encoded(
    pairs: Iterator[Pair | BadInput], encoder: DocumentEncoder, wrong: Callable[[str, str], None]
) -> Iterator[tuple[EncodedPair, str, float]]:
    """(tokens, name, where in 0..1 its prompt stands) of every pair; `wrong(reason, place)` hears of the others."""

    def found() -> Iterator[Pair]:
        for pair in pairs:
            if isinstance(pair, BadInput):
                wrong(pair.reason, pair.name)
            else:
                yield pair

    for several in batched(found(), ENCODED_TOGETHER):
        encoded = encoder.encode_many([document for pair in several for document in (pair.chosen, pair.rejected)])
        for pair, chosen, rejected in zip(several, encoded[::2], encoded[1::2], strict=True):
            yield EncodedPair(_arrays(chosen), _arrays(rejected)), pair.name, _place(chosen)


def _arrays(encoded: EncodedDocument) -> EncodedArrays:
    return EncodedArrays(np.array(encoded.ids, np.int32), np.array(encoded.trained, np.bool_))


def _place(encoded: EncodedDocument) -> float:
    prompt = encoded.ids[: encoded.trained.index(True)] if True in encoded.trained else encoded.ids
    return int.from_bytes(hashlib.blake2b(np.array(prompt, np.int32).tobytes(), digest_size=6).digest()) / 2**48


class _Writer:
    """One part: windows of pairs, each shuffled, packed and written when it is full."""

    def __init__(
        self, spec: PreferenceTokensSpecification, part: str, inputs: dict[str, str], vocabulary: Vocabulary
    ) -> None:
        self.spec, self.inputs, self.vocabulary = spec, inputs, vocabulary
        self.uri = storage.join(spec.locate(spec.output), part)
        self.prefix = publishing.shard_prefix("tokens", publishing.fingerprint(spec, inputs), 0)
        self.random = np.random.default_rng([spec.seed, part == HELD_OUT])
        self.files: list[FileEntry] = []
        self.waiting: list[EncodedPair] = []
        self.pairs, self.counts, self.first = 0, Counter[str](), ""

    def add(self, pair: EncodedPair, name: str) -> None:
        self.first = self.first or name
        self.pairs += 1
        self.waiting.append(pair)
        if len(self.waiting) >= self.spec.window:
            self._write()

    def finish(self) -> Manifest:
        self._write()
        manifest = Manifest(
            kind=PREFERENCES,
            files=self.files,
            specification=self.spec.model_dump(mode="json"),
            report={"pairs": self.pairs, "first": self.first, **self.counts},
            inputs=self.inputs,
        )
        publishing.publish(self.uri, manifest)
        return manifest

    def _write(self) -> None:
        if not self.waiting:
            return
        shuffled = [self.waiting[i] for i in self.random.permutation(len(self.waiting))]
        self.waiting = []
        rows = pack_pairs(shuffled, self.spec.context + 1, self.vocabulary.pad)
        image_ids = np.array(self.vocabulary.image_ids)
        for shard in batched(iter(rows), GROUPS_A_SHARD * self.spec.micro_batch):
            data = token_shards.to_parquet(shard, self.spec.micro_batch)
            name = publishing.shard_name(self.prefix, len(self.files))
            storage.write_bytes(storage.join(self.uri, name), data)
            image = sum(int(np.isin(row.tokens, image_ids).sum()) for row in shard)
            for row in shard:
                assert row.loss_mask is not None
                drawn = int(np.isin(row.tokens[row.loss_mask], image_ids).sum())
                self.counts["trained_image"] += drawn
                self.counts["trained_text"] += row.trained - drawn
            self.files.append(
                FileEntry.from_bytes(
                    name,
                    data,
                    rows=len(shard),
                    row_groups=-(-len(shard) // self.spec.micro_batch),
                    tokens={"text": sum(len(row.tokens) - row.padding for row in shard) - image, "image": image},
                    sequences_per_row_group=self.spec.micro_batch,
                    footer=token_shards.footer_digest(data),
                )
            )


def pack_pairs(pairs: Sequence[EncodedPair], length: int, pad: int) -> list[PackedRow]:
    """Rows in twos, as this module's head says."""
    sizes = [pair.size for pair in pairs]
    rows = []
    for numbers in best_fit(sizes, range(len(sizes)), length):
        for side in ("chosen", "rejected"):
            row = packed_row([getattr(pairs[number], side) for number in numbers], length, pad)
            mask = row.loss_mask if row.loss_mask is not None else row.segments >= 0
            rows.append(PackedRow(row.tokens, mask, row.segments))
    return rows
