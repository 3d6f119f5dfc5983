"""Images to codes and back, beside the engine: on a thread of the replica, or on replicas of their own.

An image's decoder is a third of the work of a small image, and needs none of the language model: kept off the engine's
thread it delays no text, and as a deployment of its own it scales by itself and may have other hardware.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from calumma.model.document import Document, Image
from calumma.model.encoding import DocumentEncoder
from calumma.model.images import to_image
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.serve.settings import ModelSettings

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

LARGEST_BATCH = 16  # images of one prompt coded together
BATCH_PIXELS = 2**18  # the same in pixels, or one image: each takes half a kilobyte at every layer of full size
ATTEMPTS = 3  # at a call, while replicas of the deployment are lost


class ImageCoder(Protocol):
    async def encode(self, images: Sequence[Image]) -> list[list[int]]:
        """The token ids of each image, without begin and end. Raises UnreadableImage."""
        ...

    async def decode(self, codes: Sequence[int]) -> bytes:
        """A PNG file. Of fewer codes than an image has: what is there, on grey."""
        ...


class PromptEncoder(DocumentEncoder):
    """A DocumentEncoder whose images may have been coded elsewhere."""

    @torch.inference_mode()
    def image_ids(self, images: Sequence[Image]) -> list[list[int]]:
        """The token ids of each image, without begin and end. Raises UnreadableImage."""
        ids: list[list[int]] = []
        size = max(1, min(LARGEST_BATCH, BATCH_PIXELS // self.image_tokenizer.config.resolution**2))
        for begin in range(0, len(images), size):
            ids += self.code([self.pixels(image) for image in images[begin : begin + size]]).tolist()
        return ids

    def ids(self, document: Document, images: Sequence[list[int]]) -> list[int]:
        """Token ids of a prompt, given those of its images."""
        given = (np.array(each, np.int32) for each in images)
        (tokens,) = self.assemble([document], self.text_ids([document], complete=False), given, complete=False)
        found: list[int] = tokens.ids.tolist()
        return found


@torch.inference_mode()
def warm_up(tokenizer: ImageTokenizer) -> None:
    """Code as much as is ever coded at once, so that the device's allocator has what that takes."""
    side = tokenizer.config.resolution
    count = max(1, min(LARGEST_BATCH, BATCH_PIXELS // side**2))
    codes_BN = tokenizer.encode(torch.zeros(count, 3, side, side, device=tokenizer.codebook.weight.device))
    if tokenizer.config.decoder:
        tokenizer.decode(codes_BN[:1])


class LocalImageCoder:
    """Codes on a thread of this process. Each image is decoded by itself: in a batch the last bits of a convolution,
    and with them some pixels, depend on who else is in it, and the same seed should give the same file."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._tokenizer: ImageTokenizer = encoder.image_tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._grey: list[int] | None = None

    async def encode(self, images: Sequence[Image]) -> list[list[int]]:
        if not images:
            return []
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encoder.image_ids, images)

    async def decode(self, codes: Sequence[int]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._png, list(codes))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def _png(self, codes: list[int]) -> bytes:
        device = self._tokenizer.codebook.weight.device
        missing = self._tokenizer.config.codes_per_image - len(codes)
        complete = codes + self._grey_from(len(codes)) if missing > 0 else codes
        buffer = io.BytesIO()
        to_image(self._tokenizer.decode(torch.tensor([complete], device=device))[0]).save(buffer, format="PNG")
        return buffer.getvalue()

    def _grey_from(self, drawn: int) -> list[int]:
        """Codes of a grey image from index `drawn` on."""
        if self._grey is None:
            weight, side = self._tokenizer.codebook.weight, self._tokenizer.config.resolution
            grey_13HW = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
            self._grey = [int(code) for code in self._tokenizer.encode(grey_13HW)[0].tolist()]
        return self._grey[drawn:]


class RemoteImageCoder:
    """Codes on the replicas of an image-coding deployment; where one is lost, on another."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def encode(self, images: Sequence[Image]) -> list[list[int]]:
        found: list[list[int]] = await self._call("encode", list(images)) if images else []
        return found

    async def decode(self, codes: Sequence[int]) -> bytes:
        png: bytes = await self._call("decode", list(codes))
        return png

    async def _call(self, method: str, argument: Any) -> Any:
        from ray.exceptions import RayActorError

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await getattr(self._handle, method).remote(argument)
            except RayActorError:
                if attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(attempt)


class ImageCoderDeployment(LocalImageCoder):
    """The image-coding deployment of Ray Serve: the image tokenizer of the model directory at `source` alone."""

    def __init__(self, settings: ModelSettings, source: str) -> None:
        from calumma.model.directory import IMAGE_TOKENIZER
        from calumma.model.tokenizers.text import TextTokenizer
        from calumma.model.vocabulary import Vocabulary
        from calumma.platform.tracking import registry

        device = "cuda" if settings.image_coder_gpus > 0 else "cpu"
        if settings.threads:
            torch.set_num_threads(settings.threads)
        with registry.resolve_model(source, settings.tracking) as directory:
            tokenizer = ImageTokenizer.read(f"{directory}/{IMAGE_TOKENIZER}", device).eval()
            encoder = PromptEncoder(Vocabulary.read(directory), TextTokenizer.read(directory), tokenizer)
        super().__init__(encoder)
