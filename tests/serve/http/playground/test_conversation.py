"""A conversation in the playground: answers, stopping, errors, asking again."""

from __future__ import annotations

from typing import Any

import pytest

from calumma.serve.http.access.api_keys import hash_key
from calumma.serve.http.app import create_app
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import APIKey, ServeSettings

from ...conftest import StubBackend, listening
from .conftest import copied, done, expect, opened, send


def test_an_answer_comes_as_text_and_pictures_in_their_order(page: Any, backend: StubBackend) -> None:
    turn = send(page, "Draw a seven.")
    done(page)
    expect(turn.locator(".text")).to_have_text(["Here is one: ", "a seven <b>& more</b>."])
    expect(turn.locator("img")).to_have_count(1)
    kinds = turn.evaluate("node => [...node.children].map(child => child.tagName)")
    assert kinds[:3] == ["DIV", "IMG", "DIV"]
    expect(turn.locator(".note")).to_contain_text("27 out")
    assert backend.requests[0].params.mode == "interleaved"
    assert backend.requests[0].params.seed is not None


def test_an_image_under_way_is_shown_until_it_is_there(page: Any) -> None:
    turn = send(page, "Draw one, slow.")
    expect(turn.locator(".drawing img")).to_be_visible()
    assert turn.locator("progress").evaluate("bar => [bar.value, bar.max]") == [8, 16]
    page.keyboard.press("Escape")
    expect(turn.locator(".drawing")).to_have_count(0)


@pytest.mark.parametrize("how", ["click", "escape"])
def test_stopping_ends_the_work_and_keeps_what_is_there(page: Any, backend: StubBackend, how: str) -> None:
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
    assert backend.endings[0] == "stopped"
    prompt = backend.requests[1].prompt
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


def test_regenerating_replaces_the_last_answer_by_another(page: Any, backend: StubBackend) -> None:
    send(page, "one")
    done(page)
    send(page, "two")
    done(page)
    assert page.get_by_role("button", name="Regenerate").count() == 1, "only the last answer can be had again"
    page.get_by_role("button", name="Regenerate").click()
    done(page)
    expect(page.locator(".turn.assistant")).to_have_count(2)
    expect(page.locator(".turn.user")).to_have_count(2)
    assert backend.requests[2].prompt == backend.requests[1].prompt
    assert backend.requests[2].params.seed != backend.requests[1].params.seed


def test_the_last_question_is_taken_back_with_the_arrow_key(page: Any, backend: StubBackend) -> None:
    send(page, "one")
    done(page)
    page.locator("#prompt").press("ArrowUp")
    expect(page.locator("#prompt")).to_have_value("one")
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("#prompt").press("Shift+Enter")
    page.locator("#prompt").type("more")
    page.locator("#prompt").press("Enter")
    done(page)
    prompt = backend.requests[1].prompt
    assert not isinstance(prompt, tuple)
    assert prompt.text == "one\nmore"


def test_a_new_chat_forgets_the_old_one(page: Any, backend: StubBackend) -> None:
    send(page, "one")
    done(page)
    page.locator("#clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#examples button").first).to_be_visible()
    send(page, "two")
    done(page)
    prompt = backend.requests[1].prompt
    assert not isinstance(prompt, tuple)
    assert prompt.text == "two"


def test_a_server_with_keys_asks_for_one(browser: Any, backend: StubBackend) -> None:
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
