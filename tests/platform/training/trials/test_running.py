"""Many trials: what is finished stays, what is stopped goes on, and what fails is told."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.specification import Resources
from calumma.platform.training.trials.running import SHARE, Case, Event, Notebook, run_cases

HERE = Resources(workers=0)


def count(first: int, last: int, folder: str, notebook: Notebook) -> Iterator[Event]:
    """Numbers, each a step; a file a step says that it was taken."""
    known = notebook.read() or {"at": first, "events": []}
    events = list(known["events"])
    yield from events
    for number in range(known["at"], last):
        storage.write_bytes(f"{folder}/{first}-{number}-{storage.exists(f'{folder}/{first}-{number}-False')}", b"")
        events.append({"number": number, SHARE: (number + 1 - first) / (last - first)})
        yield events[-1]
        notebook.turn(lambda: {"at": number + 1, "events": events})  # noqa: B023


def failing(notebook: Notebook) -> Iterator[Event]:
    yield {"number": 0}
    raise ValueError("it broke")


def case(first: int, last: int, folder: str, **decides: Any) -> Case:
    return Case(f"from {first}", count, (first, last, folder), {"first": first, "last": last, **decides}, last - first)


def numbers(events: list[Event]) -> list[int]:
    return [event["number"] for event in events]


def taken(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_is_finished_is_not_made_again_unless_what_decides_it_has_changed(tmp_path: Path) -> None:
    kept, folder = str(tmp_path / "kept"), tmp_path / "taken"
    cases = [case(0, 3, str(folder)), case(10, 12, str(folder))]
    heard: list[int] = []
    found = run_cases(cases, kept, HERE, no_progress, lambda name, event: heard.append(event["number"]))
    assert {name: numbers(events) for name, events in found.items()} == {"from 0": [0, 1, 2], "from 10": [10, 11]}
    once = taken(folder)
    assert run_cases(cases, kept, HERE, no_progress, lambda name, event: heard.append(event["number"])) == found
    assert taken(folder) == once
    assert sorted(heard) == sorted([0, 1, 2, 10, 11] * 2)
    run_cases([case(0, 3, str(folder), rate=0.1), cases[1]], kept, HERE, no_progress)
    assert set(taken(folder)) - set(once) == {"0-0-True", "0-1-True", "0-2-True"}


def test_an_interruption_costs_no_step(tmp_path: Path) -> None:
    kept, folder = str(tmp_path / "kept"), tmp_path / "taken"
    cases = [case(0, 4, str(folder)), case(10, 12, str(folder))]

    def stop(name: str, event: Event) -> None:
        if event["number"] == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_cases(cases, kept, HERE, no_progress, stop)
    assert taken(folder) == ["0-0-False", "0-1-False"]
    found = run_cases(cases, kept, HERE, no_progress)
    assert numbers(found["from 0"]) == [0, 1, 2, 3]
    assert [name for name in taken(folder) if name.endswith("True")] == []
    assert not list(Path(kept).glob("*.pt"))


def test_what_fails_is_told_and_what_was_finished_stays(tmp_path: Path) -> None:
    kept, folder = str(tmp_path / "kept"), tmp_path / "taken"
    good = case(0, 2, str(folder))
    with pytest.raises(ValueError, match="it broke"):
        run_cases([good, Case("bad", failing, (), {}, cost=0.5)], kept, HERE, no_progress)
    assert numbers(run_cases([good], kept, HERE, no_progress)["from 0"]) == [0, 1]
    assert taken(folder) == ["0-0-False", "0-1-False"]


def test_progress_counts_by_cost(tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []
    cases = [case(0, 3, str(tmp_path / "taken")), case(10, 11, str(tmp_path / "taken"))]
    run_cases(cases, str(tmp_path / "kept"), HERE, lambda done, total, note="": told.append((done, total)))
    assert {total for _, total in told} == {4}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == 4


def test_a_state_is_tensors_and_plain_values(tmp_path: Path) -> None:
    notebook = Notebook(str(tmp_path / "a.pt"), minutes=0)
    assert notebook.read() is None
    notebook.turn(lambda: {"weights": {"a": torch.arange(3)}, "events": [{"loss": 1.5}]})
    found = notebook.read()
    assert found is not None
    assert found["events"] == [{"loss": 1.5}]
    assert found["weights"]["a"].tolist() == [0, 1, 2]


def waiting(first: int, last: int, folder: str, go: str, notebook: Notebook) -> Iterator[Event]:
    """As `count`, but its third step waits for `go`."""
    events = count(first, last, folder, notebook)
    yield from (next(events), next(events))
    while not storage.exists(go):
        notebook.turn(lambda: {"at": first + 2, "events": [{"number": first}, {"number": first + 1}]})
        time.sleep(0.02)
    yield from events


@pytest.mark.cluster
def test_on_a_cluster_an_interruption_stops_every_trial_between_two_steps(ray_cluster: None, tmp_path: Path) -> None:
    kept, folder, go = str(tmp_path / "kept"), str(tmp_path / "taken"), str(tmp_path / "go")
    cases = [
        Case("short", count, (50, 53, folder), {}),
        *(Case(f"{at}", waiting, (at, at + 5, folder, go), {"at": at}) for at in (0, 1000)),
    ]
    seen = set[int]()

    def stop(name: str, event: Event) -> None:
        seen.add(event["number"])
        if {1, 1001, 52} <= seen:
            raise KeyboardInterrupt

    resources = Resources(workers=3, cpus_per_worker=0.5)
    with pytest.raises(KeyboardInterrupt):
        run_cases(cases, kept, resources, no_progress, stop)
    assert len(list(Path(kept).glob("*.pt"))) == 2
    assert len(list(Path(kept).glob("*.json"))) == 1  # it had ended, though nobody asked it for more
    storage.write_bytes(go, b"")
    found = run_cases(cases, kept, resources, no_progress)
    assert [numbers(events) for events in found.values()] == [
        [50, 51, 52],
        [0, 1, 2, 3, 4],
        [1000, 1001, 1002, 1003, 1004],
    ]
    assert [name for name in taken(Path(folder)) if name.endswith("True")] == []  # no step was taken twice
