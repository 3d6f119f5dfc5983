"""Images with the official `openai` client, unchanged, under a real HTTP server."""

from __future__ import annotations

import base64
from typing import Any

import openai
import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from calumma.model.document import Text
from calumma.serve.http.app import create_app
from calumma.serve.protocol import ImageOutput
from calumma.serve.settings import ServeSettings

from ...conftest import IMAGE_SIZE, StubBackend, answered, listening, seen
from ..conftest import error_of
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


def test_an_edit_sees_the_images_before_the_prompt(settings: ServeSettings, png: bytes) -> None:
    backend = StubBackend(*answered(ImageOutput(png)))
    with listening(create_app(backend, settings)) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        one = client.images.edit(model="tiny", image=("a.png", png), prompt="bigger", n=2, size="auto")
        client.images.edit(image=[("a.png", png), ("b.png", png)], prompt="both", extra_body={"seed": 5})
    assert one.data
    assert [base64.b64decode(image.b64_json or "") for image in one.data] == [png, png]
    first, _, last = backend.requests
    assert (first.prompt.segments, first.params.mode) == ((seen(png, "user"), Text("bigger", "user")), "image")  # type: ignore[union-attr]
    assert len(last.prompt.images) == 2  # type: ignore[union-attr]
    assert last.params.seed == 5


def test_an_edit_over_a_real_engine(openai_client: OpenAI, png: bytes) -> None:
    fields: Any = {"model": "tiny", "image": ("a.png", png), "prompt": "a three", "extra_body": {"seed": 4}}
    whole = openai_client.images.edit(**fields)
    assert whole.data
    assert picture(whole.data[0].b64_json or "").size == (IMAGE_SIZE, IMAGE_SIZE)
    *partial, last = openai_client.images.edit(stream=True, partial_images=2, **fields)  # type: ignore[call-overload]
    assert [event.type for event in partial] == ["image_edit.partial_image"] * 2
    assert last.type == "image_edit.completed"
    assert last.b64_json == whole.data[0].b64_json


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"mask": ("m.png", b"x")}, "mask", "leave it out"),
        ({"image": ("a.png", b"no image")}, "image", "not a readable image"),
        ({"size": "1024x1024"}, "size", "this model draws 8x8"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 200}, "prompt", "more than the context"),
        ({"image": [("a.png", b"x")] * 17}, "image", "this server takes 16"),
        ({"extra_body": {"image_temperature": "warm"}}, "image_temperature", "valid number"),
    ],
)
def test_edits_that_cannot_be_made(
    openai_client: OpenAI, png: bytes, fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as error:
        openai_client.images.edit(**({"model": "tiny", "image": ("a.png", png), "prompt": "a three"} | fields))
    assert error.value.param == param


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"json": {"prompt": "x"}}, "multipart/form-data"),
        ({"data": {"prompt": "x"}}, "multipart/form-data"),
        ({"files": {"prompt": (None, "x")}}, "image: is required"),
        ({"files": {"prompt": (None, "x"), "image": (None, "x")}}, "must be a file"),
        ({"files": {"prompt": ("p", b"x"), "image": ("a", b"x")}}, "must not be a file"),
        ({"data": {"prompt": ["x", "y"]}, "files": {"image": ("a", b"x")}}, "given twice"),
        ({"content": b"--", "headers": {"content-type": "multipart/form-data"}}, "boundary"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "is required"),
        ({"content": b"nothing", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "Invalid multipart"),
    ],
)
def test_forms_that_are_none(client: TestClient, parts: dict[str, Any], says: str) -> None:
    response = client.post("/v1/images/edits", **parts)
    assert response.status_code == 400
    assert says in error_of(response)["message"]
