"""The page can be read in light and dark, on a phone, and used by keyboard alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .conftest import done, expect, opened, send


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_can_be_read(browser: Any, address: str, scheme: str) -> None:
    page = opened(browser, address, color_scheme=scheme)
    turn = send(page, "hi")
    done(page)
    for locator in (turn.locator(".text").first, turn.locator(".note"), page.locator("#facts"), page.locator("#send")):
        ink, ground = locator.evaluate(
            """node => {
                const ink = getComputedStyle(node).color;
                while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
                return [ink, getComputedStyle(node).backgroundColor];
            }"""
        )
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, "WCAG AA"
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.5) == (scheme == "light")
    page.locator("#theme").click()
    page.reload()
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.5) == (scheme == "dark")
    assert page.errors == []
    page.context.close()


@pytest.mark.parametrize("width", [320, 390])
def test_everything_fits_on_a_phone(browser: Any, address: str, width: int) -> None:
    page = opened(browser, address, viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    send(page, "Draw a seven.")
    done(page)
    page.locator("#adjust").click()
    expect(page.locator("aside")).to_be_in_viewport()
    assert page.evaluate("document.querySelector('aside').scrollWidth <= innerWidth")
    page.locator("#close").click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for name in ("#send", "#prompt", "#attach", "#clear", "#adjust"):
        expect(page.locator(name)).to_be_in_viewport(ratio=0.99)
    tops = [page.locator(name).bounding_box()["y"] for name in ("#clear", "#theme", "#adjust")]
    assert max(tops) - min(tops) < 5, "the buttons share a line"
    assert page.errors == []
    page.context.close()


def test_keyboard_alone_is_enough(page: Any) -> None:
    expect(page.locator("#prompt")).to_be_focused()
    seen = []
    for _ in range(8):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"attach", "clear", "theme", "adjust"} <= set(seen)
    page.locator("#adjust").focus()
    page.keyboard.press("Enter")
    expect(page.locator("[name=modalities]")).to_be_focused()
