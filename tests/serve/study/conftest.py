"""A study's page in a real Chromium, over a real server and a real database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calumma.model.document import Document, Text
from calumma.platform.study.folder import Study
from calumma.platform.study.store.tables import Database
from calumma.serve.http.access.hosts import HostSettings
from calumma.serve.study.app import create_app
from calumma.serve.study.server import pages_of

from ...platform.study.conftest import made
from ..conftest import listening
from ..http.playground.conftest import PATIENCE, browser, expect

__all__ = ["browser"]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return made(tmp_path)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'ratings.db'}")
    yield database
    database.close()


@pytest.fixture
def address(study: Study, database: Database) -> Iterator[str]:
    with listening(create_app(pages_of(study, database, HostSettings()))) as url:
        yield url


def opened(browser: Any, link: str, **options: Any) -> Any:
    """A page that collects the errors of its script."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if "Content Security" in message.text else None)
    page.on("dialog", lambda dialog: page.errors.append("a script of an answer has run"))
    page.goto(link)
    return page


@pytest.fixture
def visit(browser: Any, address: str, study: Study, database: Database) -> Iterator[Callable[..., Any]]:
    """Opens the page as somebody, by their own link."""
    pages: list[Any] = []

    def visit(name: str, role: Any = "annotator", **options: Any) -> Any:
        token = study.ratings(database).invite(name, role)
        pages.append(opened(browser, f"{address}/#{token}", **options))
        return pages[-1]

    yield visit
    errors = [error for page in pages for error in page.errors]
    for page in pages:
        page.context.close()
    assert errors == []


def to_go(page: Any, number: int) -> None:
    expect(page.locator("#facts")).to_contain_text(f", {number} to go", timeout=PATIENCE)


def judge(page: Any, preference: str = "1", first: str = "q", second: str = "o") -> None:
    """By keys alone."""
    for key in (first, second, preference):
        page.keyboard.press(key)
    page.keyboard.press("Control+Enter")


def echo(system: str, conversation: Document) -> Document:
    *_, said = conversation.turns()
    words = "".join(s.text for s in said.segments if isinstance(s, Text))
    return Document((Text(f"You said: {words}"),))
