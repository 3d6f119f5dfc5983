"""A request is copied as a command and as a program, and an answer as text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from ...conftest import StubBackend
from .conftest import copied, done, dropped, expect, send


def test_a_request_is_copied_as_a_command_that_works(page: Any, backend: StubBackend, png: bytes) -> None:
    dropped(page, "drop", "main", png)
    expect(page.locator("#attached img")).to_have_count(1)
    send(page, 'it\'s "quoted" $HOME `x` \\')
    done(page)
    command = copied(page, "curl")
    reply = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert "a seven <b>& more</b>." in reply
    assert backend.requests[1].prompt == backend.requests[0].prompt
    assert backend.requests[1].params == backend.requests[0].params


def test_a_request_is_copied_as_a_program_that_works(
    page: Any, backend: StubBackend, tmp_path: Path, png: bytes
) -> None:
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
    assert backend.requests[1].prompt == backend.requests[0].prompt
    assert backend.requests[1].params == backend.requests[0].params
    assert backend.requests[1].stop == backend.requests[0].stop == ("x",)


def test_the_text_of_an_answer_is_copied(page: Any) -> None:
    send(page, "hi")
    done(page)
    assert copied(page, "Copy") == "Here is one: a seven <b>& more</b>."
