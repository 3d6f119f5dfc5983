"""The driver's signals: workers get time for a checkpoint, and end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from calumma.platform.training.group import fit
from calumma.platform.training.group.control import WorkerControl

WaitFor = Callable[[Callable[[], bool]], None]


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_asks_the_workers_for_a_checkpoint_and_a_second_ends_them(
    number: signal.Signals, ends_with: type[BaseException], wait_for: WaitFor
) -> None:
    asked, aborted, signals = list[str](), list[bool](), fit.Signals()
    line = WorkerControl(lambda: 0, lambda action, why: asked.append(f"{action}: {why}"), lambda: bool(asked))
    before = signal.getsignal(number)

    def twice() -> None:
        with fit._interruptible(signals):
            fit._stop_on_signals(line, 60, lambda: aborted.append(True), signals)
            os.kill(os.getpid(), number)
            wait_for(lambda: bool(asked))
            assert not aborted
            os.kill(os.getpid(), number)

    with pytest.raises(ends_with):
        twice()
    assert asked == [f"stop: {number.name}"]
    assert aborted == [True]
    assert signal.getsignal(number) is before


def test_workers_that_do_not_answer_are_ended_after_the_grace_period() -> None:
    aborted = threading.Event()
    signals = fit.Signals()
    line = WorkerControl(lambda: 0, lambda action, why: None, lambda: False)

    def once() -> None:
        with fit._interruptible(signals):
            fit._stop_on_signals(line, 0.1, aborted.set, signals)
            os.kill(os.getpid(), signal.SIGINT)
            aborted.wait()
            raise ConnectionError("the controller is gone")  # what Ray says in the driver then

    with pytest.raises(KeyboardInterrupt):
        once()
