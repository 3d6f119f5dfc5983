"""Which processes a training ends and which it hands on, with actors that only note what they are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from calumma.platform.training.standby import handed_on
from calumma.platform.training.standby.handed_on import ended_by_failure, group_of, handing_on


@dataclass
class Ended:
    """What was ended: actors by Ray, groups by Ray Train."""

    actors: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    found = Ended()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "kill", found.actors.append)
    return found


def test_processes_end_where_their_training_does_not_end_well(ended: Ended) -> None:
    with ended_by_failure(["a"]):
        pass
    assert ended.actors == []
    with pytest.raises(KeyboardInterrupt), ended_by_failure(["a", "b"]):
        raise KeyboardInterrupt
    assert ended.actors == ["a", "b"]


def test_one_that_cannot_be_ended_keeps_none_of_the_others_alive(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(actor: str) -> None:
        if actor == "a":
            raise RuntimeError("no")
        ended.actors.append(actor)

    monkeypatch.setattr(ray, "kill", kill)
    with handing_on() as processes:
        processes.actors = ["a", "b"]
    assert ended.actors == ["b"]


@dataclass(frozen=True)
class State:
    """A group's, as Ray Train has it."""

    ended: Ended
    workers: list[Any]
    sync_actor: str = "barrier"
    placement_group_handle: Any = field(default_factory=lambda: SimpleNamespace(shutdown=lambda: None))

    def shutdown(self) -> None:
        self.ended.groups.append([worker.actor.name for worker in self.workers])


def worker(name: str, answer: object) -> Any:
    """Of which `leave_finished` gives this."""
    actor = SimpleNamespace(
        name=name,
        _actor_id=name,
        shutdown=SimpleNamespace(remote=lambda: None),
        execute=SimpleNamespace(remote=lambda work: (name, answer)),
    )
    return SimpleNamespace(actor=actor)


@pytest.mark.parametrize(
    ("answers", "ends"),
    [
        ({"a": True, "b": True}, []),
        ({"a": True, "b": False}, [["b"]]),
        ({"a": True, "b": None}, [["b"]]),  # no answer in time
        ({"a": True, "other": True}, [["other"]]),  # which Ray Train has started
    ],
)
def test_a_group_that_finishes_ends_all_but_those_that_have_left_it(
    ended: Ended, monkeypatch: pytest.MonkeyPatch, answers: dict[str, object], ends: list[list[str]]
) -> None:
    monkeypatch.setattr(ray, "wait", lambda asked, **named: (asked, []))
    monkeypatch.setattr(handed_on, "value_of", lambda asked: asked[1])
    workers = [worker(name, answer) for name, answer in answers.items()]
    group = object.__new__(group_of([each.actor for each in workers if each.actor.name != "other"], 1.0))
    monkeypatch.setattr(
        group, "get_latest_poll_status", lambda: SimpleNamespace(errors={}, finished=True), raising=False
    )
    monkeypatch.setattr(handed_on, "shut_down", lambda group, end: end(State(ended, workers)))
    group.shutdown()
    assert ended.groups == ends
    assert ended.actors == ([] if ends else ["barrier"])


def test_a_group_whose_processes_do_not_answer_in_time_starts_its_own(
    ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(asked: list[Any], timeout: float) -> list[Any]:
        raise ray.exceptions.GetTimeoutError(f"after {timeout}")

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(WorkerGroup, "_create_workers", lambda group, number: [f"new {i}" for i in range(number)])
    actor = SimpleNamespace(_actor_id="a", get_metadata=SimpleNamespace(remote=lambda: "asked"))
    group = object.__new__(group_of([actor], 0.1))
    assert group._create_workers(1) == ["new 0"]
    assert ended.actors == [actor]
    assert group._create_workers(1) == ["new 0"]  # after a failure
    assert ended.actors == [actor]
