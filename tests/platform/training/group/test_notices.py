"""Notices to write a checkpoint or to stop: none is lost, whatever comes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.group import lifeline, watchdog

WaitFor = Callable[[Callable[[], bool]], None]


def test_a_notice_that_nobody_can_read_is_no_notice(tmp_path: Path, wait_for: WaitFor) -> None:
    storage.write_bytes(watchdog.notice_file(str(tmp_path), "checkpoint"), b"{half")
    notices = watchdog.Notices(str(tmp_path), poll=0.01)
    threading.Event().wait(0.1)
    assert notices.found is None
    storage.write_bytes(watchdog.notice_file(str(tmp_path), "checkpoint"), b"{}")
    wait_for(lambda: notices.found is not None)
    assert notices.found == ("checkpoint", "")
    notices.done("checkpoint")
    assert watchdog.followed(str(tmp_path))
    notices.close()


@pytest.mark.parametrize("order", [("stop", "checkpoint"), ("checkpoint", "stop")])
def test_a_notice_to_stop_is_not_lost_beside_another(
    tmp_path: Path, order: tuple[watchdog.Action, ...], wait_for: WaitFor
) -> None:
    place = str(tmp_path)
    for action in order:
        watchdog.notify(place, action, action)
    notices = watchdog.Notices(place, poll=0.01)
    wait_for(lambda: notices.found is not None)
    assert notices.found == ("stop", "stop")
    notices.done("stop")
    assert watchdog.followed(place)
    notices.close()


def test_a_notice_to_stop_that_comes_during_a_checkpoint_is_followed_after_it(
    tmp_path: Path, wait_for: WaitFor
) -> None:
    place = str(tmp_path)
    notices = watchdog.Notices(place, poll=0.01)
    watchdog.notify(place, "checkpoint", "the group is resized")
    wait_for(lambda: notices.found is not None)
    watchdog.notify(place, "stop", "SIGTERM")
    notices.done("checkpoint")
    assert not watchdog.followed(place)
    wait_for(lambda: notices.found == ("stop", "SIGTERM"))
    notices.close()


def test_a_checkpoint_is_asked_for_while_no_folder_exists_yet(tmp_path: Path) -> None:
    line = lifeline.lifeline(str(tmp_path / "stage"))
    assert line.newest_step() == -1
    assert line.followed()
    line.notify("checkpoint", "by hand")
    assert Manifest.find(str(tmp_path / "stage/checkpoints")) is None
    assert not line.followed()
