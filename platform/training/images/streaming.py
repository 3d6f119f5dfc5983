"""Images that are read while training goes on, in place of a pool in memory: for more than memory has room for.

All images of the documents come once a pass, in an order that depends on the seed alone: the documents' shards are
shuffled for each pass, and images within windows of so many. A step takes the next `batch` of them, whatever the number
of workers; each worker reads the shards and decodes its share of the images. Reading and decoding go on beside the
steps, two batches ahead.

Shape suffixes: B a worker's share of a batch, H height, W width.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from calumma.model.document import Image
from calumma.model.images import preprocess
from calumma.platform import storage
from calumma.platform.shards.documents import read_shard
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.images.data import batch_shares
from calumma.platform.training.specification import ImageTokenizerSpecification

_AHEAD = 2  # batches
_MEASURED = 256  # images, at most, of which errors are measured where nothing is held out
_THREADS = 4


def image_order(shards: Sequence[tuple[str, str]], seed: int, window: int) -> Iterator[Image]:
    """All images, pass after pass; `shards`: URI and sha256 of each. Raises SpecificationError where there are none."""
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        order = chance.sample(list(shards), len(shards))
        held: list[Image] = []
        found = False
        for shard in order:
            for document in read_shard(*shard):
                held += document.images
                while len(held) >= window:
                    found, part, held = True, held[:window], held[window:]
                    yield from chance.sample(part, window)
        yield from chance.sample(held, len(held))
        if not (found or held):
            raise SpecificationError("there are no images in the documents")


class ImageStream:
    """`take` gives this worker's share of batch after batch; `images` are some for pictures and measurements."""

    def __init__(self, spec: ImageTokenizerSpecification, worker: Worker, first_step: int) -> None:
        """Raises SpecificationError when the documents have no images."""
        shards = [
            (storage.join(spec.locate(uri), entry.path), entry.sha256)
            for uri in spec.documents
            for entry in Manifest.read(spec.locate(uri)).files
        ]
        self._spec, self._worker = spec, worker
        self._resolution = spec.model.resolution
        self._order = image_order(shards, spec.seed, spec.stream_window)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
        sample = image_order(shards, spec.seed, 1)
        own = [*itertools.islice(sample, worker.rank, min(_MEASURED, 4 * spec.batch), worker.world)]
        self.images = torch.stack([self._bytes(image) for image in own]) if own else self._none()
        self.size = first_step * spec.batch
        """Images seen so far, of all workers."""
        self._skip = first_step * spec.batch
        self._ahead: deque[Future[Tensor]] = deque(self._reader.submit(self._read) for _ in range(_AHEAD))

    def take(self) -> Tensor:
        """ByteTensor [B, 3, H, W] on the device: this worker's share of the next batch."""
        batch = self._ahead.popleft().result()
        self._ahead.append(self._reader.submit(self._read))
        self.size += self._spec.batch
        return batch.to(self._worker.device)

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def _read(self) -> Tensor:
        """On the reader's thread: the next batch; the first time, behind those of the steps that were done before."""
        skipped, self._skip = self._skip, 0
        for _ in itertools.islice(self._order, skipped):
            pass
        batch = list(itertools.islice(self._order, self._spec.batch))
        shares = batch_shares(len(batch), self._worker.world)
        begin = sum(shares[: self._worker.rank])
        own = batch[begin : begin + shares[self._worker.rank]]
        return torch.stack(list(self._pool.map(self._bytes, own))) if own else self._none()

    def _bytes(self, image: Image) -> Tensor:
        return ((preprocess(image.open(), self._resolution) + 1) * 127.5).round().byte()

    def _none(self) -> Tensor:
        return torch.zeros(0, 3, self._resolution, self._resolution, dtype=torch.uint8)
