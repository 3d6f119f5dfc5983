"""The official `openai` client, unchanged, against the application under a real HTTP server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import pytest
from openai import OpenAI
from PIL import Image as PILImage

FREE = {"temperature": 1.5, "top_p": 1.0}  # answers of the random model that differ by their seed


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def picture(encoded: str) -> PILImage.Image:
    """Of base64, or of a data URL."""
    return PILImage.open(io.BytesIO(base64.b64decode(encoded.removeprefix("data:image/png;base64,"))))
