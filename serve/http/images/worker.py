"""The process that decodes clients' images: `python -m calumma.serve.http.images.worker SOCKET MEMORY`, a descriptor
and the most bytes of memory it may take. Started by pool.py.

Whatever a file does to a decoder happens here, at a low priority and with little memory, and never to the ingress. It
sends pixels and texts back, never objects.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from multiprocessing.connection import Connection
from typing import Any, Literal

from PIL import Image as PILImage

from calumma.model.images import UnreadableImage, decode, from_base64, open_header, to_square

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # of the 43 that Pillow has
NICENESS = 10
Fit = Literal["crop", "pad"]


class Refused(Exception):
    """An image that is not taken: its index, the error's code, and why."""

    def __init__(self, index: int, code: str, why: str) -> None:
        super().__init__(why)
        self.index, self.code = index, code


def of_data_url(index: int, payload: bytes) -> bytes:
    try:
        return from_base64(payload)
    except ValueError as error:
        raise Refused(index, "invalid_base64", f"the data URL is not valid base64: {error}") from error


def squares(
    files: list[bytes], fits: list[Fit], pixels: int, pixels_in_all: int, resolution: int | None
) -> list[PILImage.Image]:
    """The images of one request, each fitted in its way into the model's square; without a `resolution`, only seen to
    be images. Sizes are told from all headers before anything is decoded. Raises Refused."""
    total = 0
    for index, data in enumerate(files):
        try:
            with open_header(data, FORMATS) as opened:
                width, height = opened.size
        except UnreadableImage as error:
            raise Refused(index, "invalid_image", f"the image part is {error}") from error
        if width * height > pixels:
            why = f"the image has {width}x{height} pixels; this server takes {pixels} in all"
            raise Refused(index, "image_too_large", why)
        total += width * height
        if total > pixels_in_all:
            why = f"the images have more than {pixels_in_all} pixels together, the most that this server takes"
            raise Refused(index, "image_too_large", why)
    found = []
    for index, (data, fit) in enumerate(zip(files, fits, strict=True)):
        try:
            image = decode(data, formats=FORMATS).image
            found.append(to_square(image, resolution, fit) if resolution else image.resize((1, 1)))
        except (UnreadableImage, MemoryError) as error:
            if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
                why = "the image needs more memory to be decoded than this server gives one"
                raise Refused(index, "image_too_large", why) from error
            raise Refused(index, "invalid_image", f"the image part is {error}") from error
    return found


def serve(connection: Connection) -> None:
    connection.send_bytes(b"ready")
    while True:
        job: dict[str, Any] = json.loads(connection.recv_bytes())
        payloads = [connection.recv_bytes() for _ in job["base64"]]
        answer: dict[str, Any]
        images: list[PILImage.Image] = []
        try:
            files = [
                of_data_url(index, payload) if encoded else payload
                for index, (payload, encoded) in enumerate(zip(payloads, job["base64"], strict=True))
            ]
            del payloads
            images = squares(files, job["fits"], job["pixels"], job["pixels_in_all"], job["resolution"])
            answer = {"sizes": [image.size for image in images]}
        except Refused as error:
            answer = {"refused": error.index, "code": error.code, "why": str(error)}
        connection.send_bytes(json.dumps(answer).encode())
        for image in images:
            connection.send_bytes(image.tobytes())
        del images


def main(descriptor: int, memory: int) -> None:
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    PILImage.MAX_IMAGE_PIXELS = None  # the header's sizes are looked at here
    try:
        serve(Connection(descriptor))
    except (EOFError, OSError):  # the ingress has gone
        return


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
