"""Images with the official `openai` client, unchanged, under a real HTTP server."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from ...conftest import IMAGE_SIZE
from .conftest import picture


def test_images(openai_client: OpenAI) -> None:
    answer = openai_client.images.generate(model="tiny", prompt="Draw a three.", n=2, response_format="b64_json")
    assert answer.data
    assert [picture(item.b64_json or "").size for item in answer.data] == [(IMAGE_SIZE, IMAGE_SIZE)] * 2


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_images_have_the_format_that_is_asked_for(openai_client: OpenAI, form: Any) -> None:
    answer = openai_client.images.generate(model="tiny", prompt="a three", output_format=form, output_compression=80)
    assert answer.data
    assert answer.output_format == form
    assert picture(answer.data[0].b64_json or "").format == form.upper()


def test_images_as_urls_are_data_urls(openai_client: OpenAI) -> None:
    answer = openai_client.images.generate(model="tiny", prompt="a three", response_format="url", size="8x8")  # type: ignore[call-overload]
    assert answer.data[0].url.startswith("data:image/png;base64,")
    with pytest.raises(openai.BadRequestError, match="this model draws 8x8"):
        openai_client.images.generate(model="tiny", prompt="a three", size="1024x1024")


def test_an_image_streams_with_partial_ones(openai_client: OpenAI) -> None:
    events = list(openai_client.images.generate(model="tiny", prompt="a three", stream=True, partial_images=3))  # type: ignore[call-overload]
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert last.type == "image_generation.completed"
    assert last.usage.output_tokens == 18
    whole = [picture(event.b64_json).tobytes() for event in events]
    assert len(set(whole)) == 4, "each shows more than the one before"
