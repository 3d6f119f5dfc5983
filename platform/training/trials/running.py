"""Many trials side by side on the cluster, each a task of one process.

Invariants: a finished trial is never trained again, for its events are in storage under a digest of all that decides
them. Ctrl-C, SIGTERM and the failure of another end each running trial between two steps, after it has written down
where it is; the same command goes on from there. Events of a trial that goes on come again from its beginning.
"""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.specification import Resources
from calumma.platform.storage.manifest import json_digest

Event = dict[str, Any]  # plain values, as JSON has them
SHARE = "share"  # of an event: how much of its trial is done, 0 to 1


class Interrupted(RuntimeError):
    """A trial was told to stop; where it is has been written down."""


STOP = "stop"  # of the folder: while it is there, trials on a cluster end
LOOKS = 2.0  # seconds between two looks for it


@dataclass
class Notebook:
    """Where an unfinished trial writes down how far it is. It stops when it is `stopping`, or `told` is there."""

    place: str
    minutes: float = 5.0
    told: str | None = None
    stopping: bool = False
    _written: float = field(default_factory=time.monotonic)
    _looked: float = field(default_factory=time.monotonic)

    def read(self) -> dict[str, Any] | None:
        """What was written last. Raises StorageError."""
        try:
            return dict(torch.load(io.BytesIO(storage.read_bytes(self.place)), weights_only=True))
        except storage.NotFound:
            return None

    def turn(self, state: Callable[[], dict[str, Any]]) -> None:
        """Called between two steps: writes the state when it is time to. Raises Interrupted after that when the trial
        is to stop, and StorageError."""
        if self.told is not None and time.monotonic() - self._looked > LOOKS:
            self._looked = time.monotonic()
            if storage.exists(self.told):
                self.stopping = True
        if self.stopping or time.monotonic() - self._written > 60 * self.minutes:
            content = io.BytesIO()
            torch.save(state(), content)
            storage.write_bytes(self.place, content.getvalue())
            self._written = time.monotonic()
        if self.stopping:
            raise Interrupted(f"stopped; it goes on from {self.place}")


@dataclass(frozen=True)
class Case:
    """A trial to be made. `work(*arguments, notebook)` yields its events, which `decides` alone determines."""

    name: str
    work: Callable[..., Iterator[Event]]
    arguments: tuple[Any, ...]
    decides: Mapping[str, Any]
    cost: float = 1.0
    """In any unit, beside the others': what progress counts, and the dearest begin first."""

    def place(self, folder: str) -> str:
        """Where in a folder it is kept, without its ending."""
        readable = "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in self.name)
        return storage.join(folder, f"{readable}-{json_digest(dict(self.decides))[:12]}")


def run_cases(
    cases: Sequence[Case],
    folder: str,
    resources: Resources,
    progress: Progress,
    heard: Callable[[str, Event], None] = lambda name, event: None,
    minutes: float = 5.0,
) -> dict[str, list[Event]]:
    """All events of all cases, by name in their order. `heard` is told each event as it comes, of finished cases too.

    At most `resources.max_workers` run at a time, and with none all in turn in this process. Raises what a trial
    raises, once the others have stopped.
    """
    kept = {case.name: _kept(case, folder) for case in cases}
    events = {name: known or [] for name, known in kept.items()}
    for name, already in events.items():
        for one in already:
            heard(name, one)
    left = sorted((case for case in cases if kept[case.name] is None), key=lambda case: -case.cost)
    done = {case.name: 0.0 if kept[case.name] is None else 1.0 for case in cases}
    total = sum(case.cost for case in cases)

    def tell() -> None:
        share = sum(case.cost * done[case.name] for case in cases)
        progress(share, total, f"{sum(value >= 1 for value in done.values())} of {len(cases)} trainings done")

    tell()
    with closing(_streamed(left, folder, resources, minutes)) as streamed:
        for case, event in streamed:
            if event is None:
                done[case.name] = 1.0
            else:
                events[case.name].append(event)
                done[case.name] = min(float(event.get(SHARE, done[case.name])), 0.999)
                heard(case.name, event)
            tell()
    return events


def _kept(case: Case, folder: str) -> list[Event] | None:
    try:
        return list(json.loads(storage.read_bytes(f"{case.place(folder)}.json")))
    except storage.NotFound:
        return None


def _streamed(
    cases: Sequence[Case], folder: str, resources: Resources, minutes: float
) -> Generator[tuple[Case, Event | None], None, None]:
    """(case, event) as they come, and (case, None) when a case has ended."""
    if resources.max_workers == 0:
        yield from _in_this_process(cases, folder, minutes)
        return
    import ray

    told = storage.join(folder, STOP)
    storage.delete(told)

    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(perform)
    waiting, running = list(cases), dict[Any, Case]()
    try:
        while waiting or running:
            while waiting and len(running) < resources.max_workers:
                case = waiting.pop(0)
                running[task.remote(case, folder, minutes, told)] = case
            ready: list[Any] = ray.wait(list(running), num_returns=1)[0]
            for stream in ready:
                try:
                    yield running[stream], ray.get(next(stream))
                except StopIteration:
                    yield running.pop(stream), None
    finally:
        if running:  # after a failure or an interruption: the rest writes down where it is
            storage.write_bytes(told, b"")
            until = time.monotonic() + resources.recovery.stop_seconds
            for stream in running:
                _drain(stream, until)
            storage.delete(told)


def _drain(stream: Any, until: float) -> None:
    """Wait for a task that was told to stop; one that does not in time is ended."""
    import ray

    while ray.wait([stream], timeout=max(0.0, until - time.monotonic()))[0]:
        try:
            ray.get(next(stream))
        except StopIteration:
            return
        except Exception:  # it was stopped, or is the one whose error is told
            return
    ray.cancel(stream)


def perform(case: Case, folder: str, minutes: float, told: str) -> Iterator[Event]:
    """A trial as a task of a cluster."""
    # Ray sends values into a task's generator, which a list of events behind `yield from` does not take.
    for event in _kept_when_done(case, folder, Notebook(f"{case.place(folder)}.pt", minutes, told)):  # noqa: UP028
        yield event


def _kept_when_done(case: Case, folder: str, notebook: Notebook) -> Iterator[Event]:
    """The events of a trial; when it ends they are in storage before anybody is told that it has."""
    events = list[Event]()
    for event in case.work(*case.arguments, notebook):
        events.append(event)
        yield event
    storage.write_bytes(f"{case.place(folder)}.json", json.dumps(events).encode())
    storage.delete(notebook.place)


def _in_this_process(
    cases: Sequence[Case], folder: str, minutes: float
) -> Generator[tuple[Case, Event | None], None, None]:
    """Ctrl-C ends the trial between two steps, in place of an exception in the middle of one."""
    for case in cases:
        notebook = Notebook(f"{case.place(folder)}.pt", minutes)
        try:
            with _interrupting(notebook):
                yield from ((case, event) for event in _kept_when_done(case, folder, notebook))
        except Interrupted as error:
            raise KeyboardInterrupt(str(error)) from error
        yield case, None


@contextmanager
def _interrupting(notebook: Notebook) -> Iterator[None]:
    """SIGINT tells the trial to stop; the second one is an exception at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: object) -> None:
        notebook.stopping = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
