"""What Ray prints to the terminal by itself."""

from __future__ import annotations

import os
from typing import Any

import pytest

from calumma.platform.cluster.restart_notice import NOTICE, STDERR, without_lines
from calumma.platform.cluster.tasks import map_in_order
from calumma.platform.specification import Resources


class Doubling:
    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        return {"number": 2 * task["number"]}


def test_lines_with_certain_words_are_left_out_and_no_others(capfd: pytest.CaptureFixture[str]) -> None:
    with without_lines(NOTICE):
        os.write(STDERR, b"one\nActor x " + NOTICE + b". See there.\ntwo ")
    with pytest.raises(ZeroDivisionError), without_lines(NOTICE):
        os.write(STDERR, NOTICE + b"\n" * (1 // 0))
    os.write(STDERR, b"three " + NOTICE)
    assert capfd.readouterr().err == f"one\ntwo three {NOTICE.decode()}"


@pytest.mark.cluster
def test_a_pool_of_actors_starts_without_a_word(ray_cluster: None, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = [{"number": number} for number in range(3)]
    assert list(map_in_order(tasks, Doubling, Resources(workers=1))) == [{"number": n} for n in (0, 2, 4)]
    assert NOTICE.decode() not in capfd.readouterr().err
