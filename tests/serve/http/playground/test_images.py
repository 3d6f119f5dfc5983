"""Images are attached to a question and taken away again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ...conftest import StubBackend, seen
from .conftest import done, dropped, expect, send


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_images_are_chosen_dropped_and_pasted(
    page: Any, backend: StubBackend, png: bytes, tmp_path: Path, way: str
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
    prompt = backend.requests[0].prompt
    assert not isinstance(prompt, tuple)
    assert prompt.images == [seen(png, "user")]


def test_one_of_two_equal_images_is_taken_away_again(page: Any, backend: StubBackend, png: bytes) -> None:
    for number in (1, 2):
        dropped(page, "drop", "main", png)
        expect(page.locator("#attached img")).to_have_count(number)
    page.get_by_label("remove image").first.click()
    expect(page.locator("#attached img")).to_have_count(1)
    send(page, "Which digit?")
    done(page)
    prompt = backend.requests[0].prompt
    assert not isinstance(prompt, tuple)
    assert len(prompt.images) == 1


def test_a_file_that_is_no_image_is_told(page: Any, tmp_path: Path, png: bytes) -> None:
    (tmp_path / "notes.txt").write_text("seven")
    (tmp_path / "digit.png").write_bytes(png)
    page.locator("#file").set_input_files([tmp_path / "notes.txt", tmp_path / "digit.png"])
    expect(page.locator("#told")).to_contain_text("notes.txt is not an image")
    expect(page.locator("#attached img")).to_have_count(1)
