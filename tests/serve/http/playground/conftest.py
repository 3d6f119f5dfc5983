"""The playground in a real Chromium, over a backend whose answers are known."""

from __future__ import annotations

import asyncio
import base64
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from calumma.model.document import Document
from calumma.serve.http.app import create_app
from calumma.serve.protocol import (
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)
from calumma.serve.settings import ServeSettings

from ...conftest import Step, StubBackend, listening

try:
    from playwright import sync_api as playwright
except ImportError:
    playwright = None
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
expect = playwright.expect if playwright else None
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if playwright is None or not CHROMIUM:
        pytest.skip("no Chromium on this machine: apt install chromium, and the Python package playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def backend(png: bytes) -> StubBackend:
    """It answers with an image in two steps between words, or with what the question asks for."""

    def script(request: GenerationRequest) -> list[Step]:
        assert not isinstance(request.prompt, tuple)
        *_, question = request.prompt.turns()
        asked = Document(question.segments).text
        if "fail" in asked:
            lost = RequestFailed(503, "the replica was lost while answering", code="unavailable")
            return [Started(TokenCount(7)), TextDelta("sev"), lost]
        return [
            Started(TokenCount(7)),
            TextDelta("Here is one: "),
            ImageProgress(8, 16, png),
            *([asyncio.Event().wait] if "slow" in asked else []),
            ImageOutput(png),
            TextDelta("a seven <b>& more</b>."),
            Finished("stop", TokenCount(9, 18)),
        ]

    facts = {"context": 128, "parameters": 1_200_000, "image_size": 8, "image_tokens": 16, "device": "cpu"}
    return StubBackend(script=script, facts=facts)


@pytest.fixture
def address(backend: StubBackend) -> Iterator[str]:
    with listening(create_app(backend, ServeSettings(model="/models/tiny", name="tiny"))) as url:
        yield url


def opened(browser: Any, url: str, **options: Any) -> Any:
    """A page that fails the test on any error of its script, and has found the model."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    page.errors = errors
    page.goto(url)
    expect(page.locator("#facts")).to_contain_text("tiny", timeout=PATIENCE)
    return page


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = opened(browser, address)
    yield page
    assert page.errors == []
    page.context.close()


def send(page: Any, text: str) -> Any:
    """Ask, and the answer's turn."""
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    return page.locator(".turn.assistant").last


def done(page: Any) -> None:
    expect(page.locator("#send")).to_have_text("Send", timeout=PATIENCE)


def dropped(page: Any, event: str, target: str, png: bytes) -> None:
    """A file arrives by drag and drop, or from the clipboard."""
    page.evaluate(
        """([event, target, data]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "digit.png", { type: "image/png" }));
            const how = event === "paste" ? new ClipboardEvent(event, { clipboardData: carried, bubbles: true })
                : new DragEvent(event, { dataTransfer: carried, bubbles: true, cancelable: true });
            document.querySelector(target).dispatchEvent(how);
        }""",
        [event, target, base64.b64encode(png).decode()],
    )


def copied(page: Any, name: str) -> str:
    page.locator(".turn.assistant").last.get_by_role("button", name=name, exact=True).click()
    expect(page.get_by_role("button", name="copied")).to_be_visible()
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text
