"""Waiting for what other threads do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def wait_for() -> Callable[[Callable[[], bool]], None]:
    """wait_for(happened): until a condition holds."""

    def wait_for(happened: Callable[[], bool]) -> None:
        while not happened():
            threading.Event().wait(0.05)

    return wait_for
