"""The images that workers read, and the errors of their reconstructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image, Text
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.platform.training.images import data, measure


def test_each_worker_reads_its_share_of_the_images_and_a_sample_of_too_many(
    picture: Callable[..., PILImage.Image],
) -> None:
    documents = [Document((Text("x"), Image(picture(i)), Image(picture(i + 50)))) for i in range(10)]
    everything = data.read_images(documents, 8)
    assert everything.shape == (20, 3, 8, 8)
    assert torch.equal(everything[0], torch.from_numpy(np.asarray(picture(0)).transpose(2, 0, 1).copy()))
    parts = [data.read_images(documents, 8, (rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [7, 7, 6]
    assert torch.equal(parts[1], everything[1::3])
    few = data.read_images(documents, 8, memory=5 * 3 * 64)
    assert len(few) == 5
    assert all(any(torch.equal(kept, image) for image in everything) for kept in few)


class Exact(ImageTokenizer):
    """Reconstructs every value as 0, whatever the codes."""

    def decode(self, codes_BN: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(codes_BN), 3, 8, 8)


def test_reconstruction_errors_are_in_their_units() -> None:
    tokenizer = Exact(
        ImageTokenizerConfig(resolution=8, codebook_size=4, embedding=4, base_channels=4, multipliers=[1])
    )
    white = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    found = measure.measure_reconstruction(tokenizer, white, batch=2)
    assert (found.squared, found.absolute) == pytest.approx((1.0, 127.5))
    assert 1 <= int(found.used_K.sum()) <= 4
