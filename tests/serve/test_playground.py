"""The playground in a real Chromium: what a person does with it, on a desk and on a phone."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calumma.model.document import Document
from calumma.serve.http.access.api_keys import hash_key
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
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import APIKey, ServeSettings

from .conftest import listening
from .test_protection import Stub

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt install chromium")
expect = playwright.expect if CHROMIUM else None
PATIENCE = 60_000  # milliseconds


class Scripted(Stub):
    """A backend whose answers are known: an image in two steps between words, or what the question asks for."""

    def __init__(self, png: bytes) -> None:
        super().__init__()
        self.png = png
        self.jobs: list[GenerationRequest] = []
        self.ended: list[str] = []

    async def describe(self) -> dict[str, Any]:
        return {"context": 128, "parameters": 1_200_000, "image_size": 8, "image_tokens": 16, "device": "cpu"}

    async def generate(self, job: GenerationRequest) -> Any:
        self.jobs.append(job)
        assert not isinstance(job.prompt, tuple)
        *_, question = job.prompt.turns()
        asked = Document(question.segments).text
        how = "stopped"
        try:
            yield Started(TokenCount(7))
            if "fail" in asked:
                yield TextDelta("sev")
                yield RequestFailed(503, "the replica was lost while answering", code="unavailable")
                return
            yield TextDelta("Here is one: ")
            yield ImageProgress(8, 16, self.png)
            if "slow" in asked:
                await asyncio.Event().wait()
            yield ImageOutput(self.png)
            yield TextDelta("a seven <b>& more</b>.")
            yield Finished("stop", TokenCount(9, 18))
            how = "whole"
        finally:
            self.ended.append(how)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def backend(png: bytes) -> Scripted:
    return Scripted(png)


@pytest.fixture
def address(backend: Scripted) -> Iterator[str]:
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


def test_an_answer_comes_as_text_and_pictures_in_their_order(page: Any, backend: Scripted) -> None:
    turn = send(page, "Draw a seven.")
    done(page)
    expect(turn.locator(".text")).to_have_text(["Here is one: ", "a seven <b>& more</b>."])
    expect(turn.locator("img")).to_have_count(1)
    kinds = turn.evaluate("node => [...node.children].map(child => child.tagName)")
    assert kinds[:3] == ["DIV", "IMG", "DIV"]
    expect(turn.locator(".note")).to_contain_text("27 out")
    assert backend.jobs[0].params.mode == "interleaved"
    assert backend.jobs[0].params.seed is not None


def test_an_image_under_way_is_shown_until_it_is_there(page: Any) -> None:
    turn = send(page, "Draw one, slow.")
    expect(turn.locator(".drawing img")).to_be_visible()
    assert turn.locator("progress").evaluate("bar => [bar.value, bar.max]") == [8, 16]
    page.keyboard.press("Escape")
    expect(turn.locator(".drawing")).to_have_count(0)


@pytest.mark.parametrize("how", ["click", "escape"])
def test_stopping_ends_the_work_and_keeps_what_is_there(page: Any, backend: Scripted, how: str) -> None:
    turn = send(page, "slow")
    expect(page.locator("#send")).to_have_text("Stop")
    expect(turn.locator(".text")).to_have_text("Here is one: ")
    if how == "click":
        page.locator("#send").click()
    else:
        page.keyboard.press("Escape")
    done(page)
    expect(turn.locator(".note").first).to_have_text("stopped")
    turn = send(page, "And now?")
    done(page)
    assert backend.ended[0] == "stopped"
    prompt = backend.jobs[1].prompt
    assert not isinstance(prompt, tuple)
    assert [turn.role for turn in prompt.turns()] == ["user", "assistant", "user"]


def test_an_error_is_shown_with_what_there_was(page: Any) -> None:
    turn = send(page, "fail")
    done(page)
    expect(turn.locator(".text")).to_have_text("sev")
    expect(turn.get_by_role("alert")).to_contain_text("the replica was lost while answering")


def test_a_server_that_cannot_be_reached_gives_the_question_back(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    turn = send(page, "Are you there?")
    done(page)
    expect(turn.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.locator("#prompt")).to_have_value("Are you there?")


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


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_images_are_chosen_dropped_and_pasted(
    page: Any, backend: Scripted, png: bytes, tmp_path: Path, way: str
) -> None:
    if way == "choose":
        (tmp_path / "digit.png").write_bytes(png)
        page.locator("#file").set_input_files(tmp_path / "digit.png")
    else:
        dropped(page, way, "main" if way == "drop" else "#prompt", png)
    expect(page.locator("#attached img")).to_have_count(1)
    send(page, "Which digit is this?")
    done(page)
    expect(page.locator("#attached img")).to_have_count(0)
    expect(page.locator(".turn.user img")).to_have_count(1)
    prompt = backend.jobs[0].prompt
    assert not isinstance(prompt, tuple)
    assert [image.data for image in prompt.images] == [png]


def test_one_of_two_equal_images_is_taken_away_again(page: Any, backend: Scripted, png: bytes) -> None:
    for number in (1, 2):
        dropped(page, "drop", "main", png)
        expect(page.locator("#attached img")).to_have_count(number)
    page.get_by_label("remove image").first.click()
    expect(page.locator("#attached img")).to_have_count(1)
    send(page, "Which digit?")
    done(page)
    prompt = backend.jobs[0].prompt
    assert not isinstance(prompt, tuple)
    assert len(prompt.images) == 1


def test_a_file_that_is_no_image_is_told(page: Any, tmp_path: Path, png: bytes) -> None:
    (tmp_path / "notes.txt").write_text("seven")
    (tmp_path / "digit.png").write_bytes(png)
    page.locator("#file").set_input_files([tmp_path / "notes.txt", tmp_path / "digit.png"])
    expect(page.locator("#told")).to_contain_text("notes.txt is not an image")
    expect(page.locator("#attached img")).to_have_count(1)


def test_settings_of_both_modalities_reach_the_model(page: Any, backend: Scripted) -> None:
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
    [job] = backend.jobs
    params = job.params
    assert (job.max_tokens, job.stop, job.begin_with_image) == (99, ("\nEnd",), True)
    assert (params.max_images, params.seed) == (2, 7)
    text, image = params.text, params.image
    assert (text.temperature, text.top_p, text.top_k, text.min_p, text.repetition_penalty) == (0.5, 0.8, 40, 0.05, 1.1)
    assert (image.temperature, image.top_p, image.top_k, image.min_p) == (1.2, 0.7, 9, 0.01)
    assert (params.guidance_text, params.guidance_image) == (2.5, 1.5)
    assert not isinstance(job.prompt, tuple)
    assert job.prompt.text == "Be brief.\nhi"
    page.keyboard.press("Escape")
    expect(page.locator("aside")).to_be_hidden()


def test_a_setting_out_of_range_is_told_before_anything_is_sent(page: Any, backend: Scripted) -> None:
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
    assert [job.params.image.temperature for job in backend.jobs] == [0.33]


@pytest.mark.parametrize(("choice", "mode"), [("text", "text"), ("image", "image"), ("text,image", "interleaved")])
def test_what_an_answer_may_hold_is_a_setting(page: Any, backend: Scripted, choice: str, mode: str) -> None:
    page.locator("#adjust").click()
    page.locator("[name=modalities]").select_option(choice)
    send(page, "hi")
    done(page)
    assert backend.jobs[0].params.mode == mode


def test_regenerating_replaces_the_last_answer_by_another(page: Any, backend: Scripted) -> None:
    send(page, "one")
    done(page)
    send(page, "two")
    done(page)
    assert page.get_by_role("button", name="Regenerate").count() == 1, "only the last answer can be had again"
    page.get_by_role("button", name="Regenerate").click()
    done(page)
    expect(page.locator(".turn.assistant")).to_have_count(2)
    expect(page.locator(".turn.user")).to_have_count(2)
    assert backend.jobs[2].prompt == backend.jobs[1].prompt
    assert backend.jobs[2].params.seed != backend.jobs[1].params.seed


def test_the_last_question_is_taken_back_with_the_arrow_key(page: Any, backend: Scripted) -> None:
    send(page, "one")
    done(page)
    page.locator("#prompt").press("ArrowUp")
    expect(page.locator("#prompt")).to_have_value("one")
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("#prompt").press("Shift+Enter")
    page.locator("#prompt").type("more")
    page.locator("#prompt").press("Enter")
    done(page)
    prompt = backend.jobs[1].prompt
    assert not isinstance(prompt, tuple)
    assert prompt.text == "one\nmore"


def copied(page: Any, name: str) -> str:
    page.locator(".turn.assistant").last.get_by_role("button", name=name, exact=True).click()
    expect(page.get_by_role("button", name="copied")).to_be_visible()
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def test_a_request_is_copied_as_a_command_that_works(page: Any, backend: Scripted, png: bytes) -> None:
    dropped(page, "drop", "main", png)
    expect(page.locator("#attached img")).to_have_count(1)
    send(page, 'it\'s "quoted" $HOME `x` \\')
    done(page)
    command = copied(page, "curl")
    reply = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert "a seven <b>& more</b>." in reply
    assert backend.jobs[1].prompt == backend.jobs[0].prompt
    assert backend.jobs[1].params == backend.jobs[0].params


def test_a_request_is_copied_as_a_program_that_works(page: Any, backend: Scripted, tmp_path: Path, png: bytes) -> None:
    page.keyboard.press("Control+,")
    page.locator("aside [name=image_temperature]").fill("0.9")
    page.locator("aside [name=stop]").fill("x")
    send(page, 'it\'s "quoted" \u00fc \\')
    done(page)
    done_ = subprocess.run(
        [sys.executable, "-c", copied(page, "Python")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "a seven <b>& more</b>." in done_.stdout
    assert (tmp_path / "0.png").read_bytes() == png
    assert backend.jobs[1].prompt == backend.jobs[0].prompt
    assert backend.jobs[1].params == backend.jobs[0].params
    assert backend.jobs[1].stop == backend.jobs[0].stop == ("x",)


def test_the_text_of_an_answer_is_copied(page: Any) -> None:
    send(page, "hi")
    done(page)
    assert copied(page, "Copy") == "Here is one: a seven <b>& more</b>."


def test_a_new_chat_forgets_the_old_one(page: Any, backend: Scripted) -> None:
    send(page, "one")
    done(page)
    page.locator("#clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#examples button").first).to_be_visible()
    send(page, "two")
    done(page)
    prompt = backend.jobs[1].prompt
    assert not isinstance(prompt, tuple)
    assert prompt.text == "two"


def test_a_server_with_keys_asks_for_one(browser: Any, backend: Scripted) -> None:
    settings = ServeSettings(model="m", name="tiny", keys=(APIKey(name="a", sha256=hash_key("sk-right")),))
    with listening(create_app(backend, settings)) as url:
        page = opened(browser, url)
        send(page, "hi")
        expect(page.get_by_role("alert")).to_contain_text("needs an API key")
        expect(page.locator("[name=key]")).to_be_focused()
        page.locator("[name=key]").fill("sk-right")
        send(page, "hi")
        done(page)
        expect(page.locator(".turn.assistant").last.locator(".text").first).to_have_text("Here is one: ")
        assert "sk-right" not in copied(page, "curl")
        page.context.close()


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


def test_a_real_model_draws_into_the_page(browser: Any, replica: EngineReplica, settings: ServeSettings) -> None:
    with listening(create_app(replica, settings)) as url:
        page = opened(browser, url)
        page.locator("#adjust").click()
        page.locator("[name=modalities]").select_option("image")
        turn = send(page, "Draw a three.")
        done(page)
        assert turn.locator("img").evaluate("image => image.naturalWidth") == 8
        assert page.errors == []
        page.context.close()
