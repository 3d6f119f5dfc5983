"""People talk with a model at the page and label what came of it; nothing said is lost, and nothing is asked twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calumma.model.document import Document
from calumma.platform.study.folder import Study
from calumma.platform.study.store.dialogues import Dialogues, OutOfTurn
from calumma.platform.study.store.tables import Database
from calumma.serve.http.access.hosts import HostSettings
from calumma.serve.study.app import create_app
from calumma.serve.study.server import pages_of
from calumma.serve.study.talks import SystemAway

from ..conftest import listening
from ..http.playground.conftest import PATIENCE, expect
from .conftest import echo


class Model:
    """Echoes; counts what it is asked; waits and fails when told to."""

    def __init__(self) -> None:
        self.asked: list[Document] = []
        self.away = False
        self.free = threading.Event()
        self.free.set()

    def __call__(self, system: str, conversation: Document) -> Document:
        self.asked.append(conversation)
        assert self.free.wait(60)
        if self.away:
            raise SystemAway("nobody there")
        return echo(system, conversation)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def address(study: Study, database: Database, model: Model) -> Iterator[str]:
    with listening(create_app(pages_of(study, database, HostSettings(), model))) as url:
        yield url


def said(database: Database, study: Study) -> list[Any]:
    return Dialogues(database, study.specification.name, study.specification.names).all()


def test_a_dialogue_of_several_turns_is_kept_and_labelled(
    visit: Callable[..., Any], study: Study, database: Database, model: Model
) -> None:
    page = visit("ann")
    page.locator("#words").fill("How do <i>you</i> do?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant")).to_have_text("You said: How do <i>you</i> do?", timeout=PATIENCE)
    page.locator("#words").fill("And now?")
    page.locator("#speak").dblclick()
    expect(page.locator(".turn.assistant")).to_have_count(2, timeout=PATIENCE)
    assert [len(list(asked.turns())) for asked in model.asked] == [1, 3]
    page.reload()
    expect(page.locator(".turn")).to_have_count(4, timeout=PATIENCE)
    page.get_by_label("unsafe").check()
    page.locator("[name=harm]").select_option("violence")
    page.locator("[name=remark]").fill("it repeats")
    page.locator("#close").dblclick()
    expect(page.locator("#facts")).to_contain_text("1 dialogue ended", timeout=PATIENCE)
    expect(page.locator(".turn")).to_have_count(0)
    labelled, still_open = said(database, study)
    assert (labelled.label, labelled.harm, labelled.note) == ("unsafe", "violence", "it repeats")
    assert [turn.role for turn in labelled.turns] == ["user", "assistant"] * 2
    assert (still_open.label, still_open.turns) == (None, [])
    assert still_open.system != labelled.system, "systems come in turn"


def test_a_model_that_is_away_keeps_what_was_said(
    visit: Callable[..., Any], study: Study, database: Database, model: Model
) -> None:
    model.away = True
    page = visit("ann")
    page.locator("#words").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#told")).to_contain_text("what you said is kept", timeout=PATIENCE)
    page.reload()
    expect(page.locator("#retry")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#finish")).to_be_hidden()
    model.away = False
    page.locator("#retry").click()
    expect(page.locator(".turn.assistant")).to_have_text("You said: Hello", timeout=PATIENCE)


def test_a_reload_while_the_model_answers_loses_nothing(
    visit: Callable[..., Any], study: Study, database: Database, model: Model
) -> None:
    model.free.clear()
    page = visit("ann")
    page.locator("#words").fill("Slowly")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user")).to_have_count(1)
    while not model.asked:
        page.wait_for_timeout(20)
    page.reload()
    expect(page.locator(".turn.user")).to_have_text("Slowly", timeout=PATIENCE)
    expect(page.locator(".turn.assistant")).to_have_count(0)
    page.locator("#retry").click()
    expect(page.locator("#told")).to_contain_text("answering already", timeout=PATIENCE)
    model.free.set()
    while not said(database, study)[0].turns[1:]:
        page.wait_for_timeout(20)
    page.reload()
    expect(page.locator(".turn.assistant")).to_have_text("You said: Slowly", timeout=PATIENCE)
    assert len(model.asked) == 1


def test_a_picture_may_be_said(visit: Callable[..., Any], model: Model, tmp_path: Path) -> None:
    page = visit("ann")
    page.locator("#file").set_input_files(str(tmp_path / "green.png"))
    expect(page.locator("#attached img")).to_have_count(1)
    page.locator("#speak").click()
    expect(page.locator(".turn.assistant")).to_have_count(1, timeout=PATIENCE)
    assert len(model.asked[0].images) == 1


def test_turns_are_kept_once_and_in_order(study: Study, database: Database) -> None:
    dialogues = Dialogues(database, "s", ["ours"])
    talk = dialogues.current("ann")
    assert dialogues.current("ann").id == talk.id
    parts = [{"type": "text", "text": "Hello"}]
    assert len(dialogues.say("ann", talk.id, 0, "user", parts).turns) == 1
    assert len(dialogues.say("ann", talk.id, 0, "user", parts).turns) == 1
    with pytest.raises(OutOfTurn, match="gone on meanwhile"):
        dialogues.say("ann", talk.id, 0, "user", [{"type": "text", "text": "Other"}])
    with pytest.raises(OutOfTurn, match="nothing to label"):
        dialogues.label("ann", talk.id, "safe", None, "")
    with pytest.raises(OutOfTurn, match="no such dialogue of yours"):
        dialogues.say("ben", talk.id, 1, "user", parts)
    dialogues.say("ann", talk.id, 1, "assistant", [{"type": "text", "text": "Good day"}])
    dialogues.label("ann", talk.id, "safe", None, "")
    with pytest.raises(OutOfTurn, match="has its label already"):
        dialogues.say("ann", talk.id, 2, "user", parts)
    assert dialogues.counts() == {"ann": (1, 0)}
