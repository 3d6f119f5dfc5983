"""The images an image tokenizer is trained on: a pool that all workers hold together, and the batches drawn from it.

The pool, and which of its images a step is given, depend on the seed and the steps before, not on the number of
workers: any takes the same steps. Worker r of W holds images r, r+W, ... of the pool, and sends them to whoever needs
them in a step.

Shape suffixes: N images, B a batch of them, C channels, H height, W width.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image as PILImage
from torch import Tensor

from calumma.model.document import Document
from calumma.model.images import preprocess, to_image
from calumma.platform.shards.documents import read_documents
from calumma.platform.specification import SpecificationError, import_function
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.specification import ImageTokenizerSpecification

logger = logging.getLogger(__name__)
_MEMORY = 2 << 30  # bytes


def read_images(
    documents: Iterable[Document],
    resolution: int,
    share: tuple[int, int] = (0, 1),
    seed: int = 0,
    memory: int = _MEMORY,
) -> Tensor:
    """ByteTensor [N, 3, H, W]: of the pool the images whose number is `rank` modulo `world`. The pool are all images
    or, if these take more than `memory` bytes, a random sample of as many as fit (reservoir sampling)."""
    rank, world = share
    most = max(1, memory // (3 * resolution**2))
    chance = random.Random(f"{seed} 0")
    kept: dict[int, Tensor] = {}
    seen = 0
    for seen, image in enumerate(_images(documents), start=1):
        place = seen - 1 if seen <= most else chance.randrange(seen)
        if place < most and place % world == rank:
            kept[place] = ((preprocess(image.open(), resolution) + 1) * 127.5).round().byte()
    if seen > most and rank == 0:
        logger.warning("%d images are more than memory_gib has room for; training on a random %d of them", seen, most)
    if not kept:
        return torch.zeros(0, 3, resolution, resolution, dtype=torch.uint8)
    return torch.stack([kept[place] for place in sorted(kept)])


def _images(documents: Iterable[Document]) -> Iterator[Any]:
    for document in documents:
        yield from document.images


def read_pool(spec: ImageTokenizerSpecification, uris: list[str], worker: Worker) -> Tensor:
    """This worker's part of the images in curated documents. Raises SpecificationError when they have none at all."""
    documents = (document for uri in uris for document in read_documents(spec.locate(uri)))
    share = (worker.rank, worker.world)
    images = read_images(documents, spec.model.resolution, share, spec.seed, int(spec.memory_gib * (1 << 30)))
    if not sum_over_workers(len(images), worker):
        raise SpecificationError(f"there are no images in {', '.join(spec.locate(uri) for uri in uris)}")
    return images


def as_floats(pixels_BCHW: Tensor) -> Tensor:
    """ByteTensor -> FloatTensor in [-1, 1], same shape."""
    return pixels_BCHW.float() / 127.5 - 1


def sum_over_workers(number: int, worker: Worker) -> int:
    """The sum over all workers."""
    if worker.world == 1:
        return number
    total = torch.tensor(number, device=worker.device)
    dist.all_reduce(total)
    return int(total)


def load_weight_function(spec: ImageTokenizerSpecification) -> Callable[[PILImage.Image], float] | None:
    """The function of `sampling_weight`. Raises SpecificationError."""
    return None if spec.sampling_weight is None else import_function(spec.sampling_weight, "sampling_weight")


def sampling_weights(
    images_NCHW: Tensor, weigh: Callable[[PILImage.Image], float], share: tuple[int, int] = (0, 1)
) -> Tensor:
    """DoubleTensor [N]: how often each image (ByteTensor [N, 3, H, W]) is drawn, relative to the others.

    Raises SpecificationError when a weight is below 0 or not finite.
    """
    rank, world = share
    weights_N = torch.empty(len(images_NCHW), dtype=torch.double)
    for i, pixels in enumerate(images_NCHW):
        weight = float(weigh(to_image(as_floats(pixels))))
        if not 0 <= weight < math.inf:
            number = i * world + rank
            raise SpecificationError(f"sampling_weight: image {number} got the weight {weight}; it must be 0 or more")
        weights_N[i] = weight
    return weights_N


def batch_shares(batch: int, world: int) -> list[int]:
    """How many images of a batch each worker takes, one after the other."""
    return [batch // world + (rank < batch % world) for rank in range(world)]


class Pool:
    """Images (each worker gives its part of them, ByteTensor [N, 3, H, W]) and how they are drawn."""

    def __init__(
        self, images_NCHW: Tensor, worker: Worker, weigh: Callable[[PILImage.Image], float] | None = None
    ) -> None:
        """Raises SpecificationError when no image can be drawn."""
        self.images, self._worker = images_NCHW, worker
        self.size = sum_over_workers(len(images_NCHW), worker)
        self._weights_N: Tensor | None = None
        if weigh is None:
            return
        rank, world = worker.rank, worker.world
        weights_N = torch.zeros(self.size, dtype=torch.double)
        weights_N[rank::world] = sampling_weights(images_NCHW, weigh, (rank, world))
        if world > 1:
            summed_N = weights_N.to(worker.device)
            dist.all_reduce(summed_N)
            weights_N = summed_N.cpu()
        if not weights_N.any():
            raise SpecificationError("sampling_weight: every image got the weight 0, so none can be drawn")
        self._weights_N = weights_N

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """LongTensor [B]: the images of the next step, the same on every worker whose generator is in the same state"""
        if self._weights_N is None:
            return torch.randint(self.size, (batch,), generator=generator)
        return torch.multinomial(self._weights_N, batch, replacement=True, generator=generator)

    def take(self, drawn_B: Tensor) -> Tensor:
        """ByteTensor [b, 3, H, W] on the device: this worker's share of what was drawn. Every worker calls it."""
        rank, world, device = self._worker.rank, self._worker.world, self._worker.device
        if world == 1:
            return self.images[drawn_B].to(device)
        parts = drawn_B.split(batch_shares(len(drawn_B), world))
        sent = [part[part % world == rank] // world for part in parts]
        holders = parts[rank] % world
        received = torch.empty(len(holders), *self.images.shape[1:], dtype=torch.uint8, device=device)
        dist.all_to_all_single(
            received,
            self.images[torch.cat(sent)].to(device),
            [int((holders == other).sum()) for other in range(world)],
            [len(numbers) for numbers in sent],
        )
        taken = torch.empty_like(received)
        taken[holders.argsort(stable=True).to(device)] = received  # they came by holder
        return taken
