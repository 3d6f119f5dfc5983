"""People judge at the page: at once, by keyboard, on a phone, through reloads and double clicks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from calumma.platform.study.folder import Study
from calumma.platform.study.store.tables import Database

from ..http.playground.conftest import PATIENCE, expect
from .conftest import judge, opened, to_go

Visit = Callable[..., Any]


def test_three_annotators_at_once_judge_everything_and_the_owner_sees_it_live(
    visit: Visit, study: Study, database: Database
) -> None:
    owner = visit("olga", "owner")
    pages = [visit(name) for name in ("ann", "ben", "cleo")]
    expect(owner.locator("#tiles")).to_contain_text("0 / 12", timeout=PATIENCE)
    for left in (4, 3, 2, 1):
        for page in pages:
            to_go(page, left)
        for page in pages:  # all send before any of them has the next
            for key in ("q", "o", "1"):
                page.keyboard.press(key)
        for page in pages:
            page.keyboard.press("Control+Enter")
    for page in pages:
        expect(page.locator("#headline")).to_have_text("Thank you, that was all.", timeout=PATIENCE)
    ratings = study.ratings(database).all()
    assert set(Counter(rating.item for rating in ratings).values()) == {3}
    assert set(Counter(rating.annotator for rating in ratings).values()) == {4}
    assert {rating.preferred for rating in ratings} == {"ours", "rival"}, "sides are dealt"
    assert all(
        r.systems == study.items[r.item].systems or r.systems == study.items[r.item].systems[::-1] for r in ratings
    )
    expect(owner.locator("#tiles")).to_contain_text("12 / 12", timeout=PATIENCE)
    expect(owner.locator("#people tr", has_text="cleo").locator("td").nth(1)).to_have_text("4")


def test_the_page_shows_prompt_and_answers_and_never_whose_they_are(visit: Visit, study: Study) -> None:
    page = visit("ann")
    to_go(page, 4)
    seen = []
    for left in (3, 2, 1, 0):
        seen.append(page.locator("#prompt").inner_text())
        expect(page.locator(".answer")).to_have_count(2)
        # an answer's markup is text, and runs nothing
        expect(page.locator(".answer .text").first).to_contain_text("<b onclick=alert(1)>bold</b>")
        assert page.locator(".answer b").count() == 0
        assert page.locator(".answer img").count() == 2
        assert not re.search(r"\b(ours|rival)\b", page.content())
        judge(page)
        if left:
            to_go(page, left)
    assert len(set(seen)) == 4
    assert any("What is this?" in prompt for prompt in seen)


def test_a_reload_in_the_middle_keeps_the_item_and_what_was_chosen(
    visit: Visit, study: Study, database: Database
) -> None:
    page = visit("ann")
    to_go(page, 4)
    prompt = page.locator("#prompt").inner_text()
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.press("w")
    page.locator("input[name=issue1]").nth(2).check()
    page.locator("textarea[name=note]").fill("both are short")
    page.reload()
    to_go(page, 4)
    assert page.locator("#prompt").inner_text() == prompt
    expect(page.locator("input[name=fulfils0][value=partly]")).to_be_checked()
    expect(page.locator("input[name=issue1]").nth(2)).to_be_checked()
    expect(page.locator("#missing")).to_contain_text("what answer B fulfils, which is better")
    page.keyboard.press("i")
    page.keyboard.press("2")
    page.locator("#send").click()
    to_go(page, 3)
    (rating,) = study.ratings(database).all()
    assert [answer.fulfils for answer in rating.judgement.answers] == ["partly", "partly"]
    assert rating.judgement.answers[1].issues == (study.specification.issues[2],)
    assert rating.judgement.note == "both are short"
    assert rating.preferred is None


def test_a_double_click_sends_one_judgement(visit: Visit, study: Study, database: Database) -> None:
    page = visit("ann")
    to_go(page, 4)
    for key in ("q", "u", "3"):
        page.keyboard.press(key)
    page.locator("#send").dblclick()
    to_go(page, 3)
    expect(page.locator("#send")).to_be_disabled()  # the second click has judged nothing of the next
    assert len(study.ratings(database).all()) == 1


@pytest.mark.parametrize(
    ("fragment", "said"),
    [("#wrong" * 4, "This link does not open the study."), ("", "This is a study by invitation.")],
)
def test_a_wrong_link_opens_nothing_and_says_so(browser: Any, address: str, fragment: str, said: str) -> None:
    page = opened(browser, f"{address}/{fragment}")
    expect(page.locator("#headline")).to_have_text(said, timeout=PATIENCE)
    assert page.locator("#prompt").inner_text() == ""
    page.context.close()


def test_an_item_that_went_to_somebody_else_is_told_and_another_shown(
    visit: Visit, study: Study, database: Database
) -> None:
    page = visit("ann")
    to_go(page, 4)
    with database.transaction() as db:
        db.exec_driver_sql("UPDATE calumma_seats SET state='free', annotator=NULL, since=NULL, until=NULL")
    judge(page)
    expect(page.locator("#told")).to_contain_text("went to somebody else", timeout=PATIENCE)
    to_go(page, 4)
    assert study.ratings(database).all() == []


def test_what_was_chosen_stays_while_the_server_is_away(visit: Visit, study: Study, database: Database) -> None:
    page = visit("ann")
    to_go(page, 4)
    page.context.set_offline(True)
    judge(page)
    expect(page.locator("#told")).to_contain_text("cannot be reached", timeout=PATIENCE)
    expect(page.locator("input[name=preference][value=left]")).to_be_checked()
    page.context.set_offline(False)
    page.locator("#send").click()
    to_go(page, 3)
    assert len(study.ratings(database).all()) == 1


def test_keyboard_alone_is_enough(visit: Visit, study: Study, database: Database) -> None:
    """Tab, arrows, space and Enter, without knowing any shortcut."""
    page = visit("ann")
    to_go(page, 4)
    page.keyboard.press("Space")  # the first choice has the focus
    for _ in range(60):
        if page.evaluate("document.activeElement.id") == "send":
            break
        if page.evaluate("document.activeElement.type === 'radio'"):
            page.keyboard.press("Space")
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    to_go(page, 3)
    assert len(study.ratings(database).all()) == 1


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_everything_fits(visit: Visit, width: int) -> None:
    page = visit("ann", viewport={"width": width, "height": 800})
    to_go(page, 4)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = [page.locator(".answer").nth(n).bounding_box() for n in range(2)]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 1000), "side by side where there is room"
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(visit: Visit, scheme: str) -> None:
    page = visit("ann", color_scheme=scheme)
    to_go(page, 4)

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for locator in ("#facts", "#prompt .text", ".answer .text", "#missing", "kbd", "legend"):
        ink, ground = page.locator(locator).first.evaluate(
            """node => {
                const ink = getComputedStyle(node).color;
                while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
                return [ink, getComputedStyle(node).backgroundColor];
            }"""
        )
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{locator}: WCAG AA"
