"""Images over a real engine with a tiny random model."""

from __future__ import annotations

import base64
import io

from PIL import Image as PILImage
from starlette.testclient import TestClient

from ...conftest import IMAGE_SIZE
from ..conftest import IMAGE_TOKENS


def test_image_generations(client: TestClient) -> None:
    body = {"prompt": "Draw a three.", "n": 3, "response_format": "b64_json", "seed": 2}
    answer = client.post("/v1/images/generations", json=body).json()
    images = [base64.b64decode(item["b64_json"]) for item in answer["data"]]
    assert [PILImage.open(io.BytesIO(i), formats=["PNG"]).size for i in images] == [(IMAGE_SIZE, IMAGE_SIZE)] * 3
    assert len(set(images)) == 3, "each of several images has a seed of its own"
    assert answer["usage"]["completion_tokens"] == 3 * IMAGE_TOKENS
    first = client.post("/v1/images/generations", json=body | {"n": 1}).json()
    assert first["data"] == answer["data"][:1]
