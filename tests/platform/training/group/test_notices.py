"""Notices to write a checkpoint or to stop: none is lost, whatever comes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.group import control, notice

WaitFor = Callable[[Callable[[], bool]], None]


def test_a_notice_that_nobody_can_read_is_no_notice(tmp_path: Path, wait_for: WaitFor) -> None:
    storage.write_bytes(notice.notice_file(str(tmp_path), "checkpoint"), b"{half")
    notices = notice.NoticeWatcher(str(tmp_path), poll=0.01)
    threading.Event().wait(0.1)
    assert notices.pending is None
    storage.write_bytes(notice.notice_file(str(tmp_path), "checkpoint"), b"{}")
    wait_for(lambda: notices.pending is not None)
    assert notices.pending == ("checkpoint", "")
    notices.acknowledge("checkpoint")
    assert notice.none_pending(str(tmp_path))
    notices.close()


@pytest.mark.parametrize("order", [("stop", "checkpoint"), ("checkpoint", "stop")])
def test_a_notice_to_stop_is_not_lost_beside_another(
    tmp_path: Path, order: tuple[notice.Action, ...], wait_for: WaitFor
) -> None:
    place = str(tmp_path)
    for action in order:
        notice.notify(place, "", action, action)
    notices = notice.NoticeWatcher(place, poll=0.01)
    wait_for(lambda: notices.pending is not None)
    assert notices.pending == ("stop", "stop")
    notices.acknowledge("stop")
    assert notice.none_pending(place)
    notices.close()


def test_a_notice_to_stop_that_comes_during_a_checkpoint_is_followed_after_it(
    tmp_path: Path, wait_for: WaitFor
) -> None:
    place = str(tmp_path)
    notices = notice.NoticeWatcher(place, poll=0.01)
    notice.notify(place, "", "checkpoint", "the group is resized")
    wait_for(lambda: notices.pending is not None)
    notice.notify(place, "", "stop", "SIGTERM")
    notices.acknowledge("checkpoint")
    assert not notice.none_pending(place)
    wait_for(lambda: notices.pending == ("stop", "SIGTERM"))
    notices.close()


def test_a_checkpoint_is_asked_for_while_no_folder_exists_yet(tmp_path: Path) -> None:
    line = control.worker_control(str(tmp_path / "stage"))
    assert line.newest_step() == -1
    assert line.acknowledged()
    line.notify("checkpoint", "by hand")
    assert Manifest.find(str(tmp_path / "stage/checkpoints")) is None
    assert not line.acknowledged()
