"""Codes of images that prompts have had, by what the images are: a picture that is asked about again is not coded
again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from calumma.model.document import Image

KNOWN_IMAGES = 1024  # codes of an image are some kilobytes


class ImageCodeCache:
    """Known to requests of the same salt alone, as what is computed for them is. coded, known: images since it was
    made."""

    def __init__(self, most: int = KNOWN_IMAGES) -> None:
        self.most, self.coded, self.known = most, 0, 0
        self._codes: OrderedDict[bytes, list[int]] = OrderedDict()

    async def encode(
        self, images: Sequence[Image], salt: bytes, code: Callable[[Sequence[Image]], Awaitable[list[list[int]]]]
    ) -> list[list[int]]:
        """The token ids of each image, those that are not known by `code`, each once."""
        if not images:
            return []
        keys = [image.key(salt) for image in images]
        found = {key: self._codes[key] for key in keys if key in self._codes}
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        if new:
            found |= dict(zip(new, await code(list(new.values())), strict=True))
        self.coded += len(new)
        self.known += len(images) - len(new)
        for key in keys:
            self._codes[key] = found[key]
            self._codes.move_to_end(key)
        while len(self._codes) > self.most:
            self._codes.popitem(last=False)
        return [found[key] for key in keys]
