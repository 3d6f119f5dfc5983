"""The playground's settings reach the model."""

from __future__ import annotations

from typing import Any

import pytest

from ...conftest import StubBackend
from .conftest import done, expect, send


def test_settings_of_both_modalities_reach_the_model(page: Any, backend: StubBackend) -> None:
    page.keyboard.press("Control+,")
    values = {
        "max_tokens": 99, "max_images": 2, "seed": 7, "temperature": 0.5, "top_p": 0.8, "top_k": 40, "min_p": 0.05,
        "repetition_penalty": 1.1, "image_temperature": 1.2, "image_top_p": 0.7, "image_top_k": 9, "image_min_p": 0.01,
        "guidance_text": 2.5, "guidance_image": 1.5, "stop": r"\nEnd", "system": "Be brief.",
    }  # fmt: skip
    for name, value in values.items():
        page.locator(f"aside [name={name}]").fill(str(value))
    page.locator("aside [name=begin_with]").check()
    send(page, "hi")
    done(page)
    [request] = backend.requests
    params = request.params
    assert (request.max_tokens, request.stop, request.begin_with_image) == (99, ("\nEnd",), True)
    assert (params.max_images, params.seed) == (2, 7)
    text, image = params.text, params.image
    assert (text.temperature, text.top_p, text.top_k, text.min_p, text.repetition_penalty) == (0.5, 0.8, 40, 0.05, 1.1)
    assert (image.temperature, image.top_p, image.top_k, image.min_p) == (1.2, 0.7, 9, 0.01)
    assert (params.guidance_text, params.guidance_image) == (2.5, 1.5)
    assert not isinstance(request.prompt, tuple)
    assert request.prompt.text == "Be brief.\nhi"
    page.keyboard.press("Escape")
    expect(page.locator("aside")).to_be_hidden()


def test_a_setting_out_of_range_is_told_before_anything_is_sent(page: Any, backend: StubBackend) -> None:
    page.keyboard.press("Control+,")
    field = page.locator("[name=image_temperature]")
    assert field.get_attribute("placeholder") == "0.7", "what the server takes when nothing is given"
    field.fill("9")
    page.locator("#close").click()
    page.locator("#prompt").fill("hi")
    page.locator("#prompt").press("Enter")
    expect(field).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)
    field.fill("0.33")
    page.locator("#prompt").press("Enter")
    done(page)
    assert [request.params.image.temperature for request in backend.requests] == [0.33]


@pytest.mark.parametrize(("choice", "mode"), [("text", "text"), ("image", "image"), ("text,image", "interleaved")])
def test_what_an_answer_may_hold_is_a_setting(page: Any, backend: StubBackend, choice: str, mode: str) -> None:
    page.locator("#adjust").click()
    page.locator("[name=modalities]").select_option(choice)
    send(page, "hi")
    done(page)
    assert backend.requests[0].params.mode == mode
