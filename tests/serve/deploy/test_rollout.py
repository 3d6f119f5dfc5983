"""What happens when a model's version follows another; no cluster."""

from __future__ import annotations

from typing import Any

import pytest

from calumma.serve.deploy import rollout
from calumma.serve.deploy.applications import ModelApplication
from calumma.serve.deploy.rollout import RolloutController, await_last_stream
from calumma.serve.settings import ModelSettings


class Registry:
    """What the watcher works with, and what it did."""

    def __init__(self, *models: str) -> None:
        self.sources = dict.fromkeys(models, "1")
        self.did: list[Any] = []
        self.broken = False
        self.rollouts = RolloutController(
            tuple(
                ModelSettings(model=model, name=model.removeprefix("models:/").partition("@")[0]) for model in models
            ),
            {name: ModelApplication(f"{name}-1", "1") for name in ("a", "b")},
            locate=lambda model: self.sources[model.model],
            start=self.place,
            announce=lambda table: self.did.append(("announce", dict(table))),
            remove=lambda application: self.did.append(("remove", application)),
            settle=0,
        )

    def place(self, model: ModelSettings, source: str) -> ModelApplication:
        if self.broken:
            raise RuntimeError("out of memory")
        self.did.append(("place", model.name, source))
        return ModelApplication(f"{model.name}-{source}", source)


def test_a_new_version_is_up_before_it_is_told_and_the_old_one_ends_last() -> None:
    registry = Registry("models:/a@live", "models:/b@live")
    assert registry.rollouts.reconcile() == []
    registry.sources["models:/b@live"] = "2"
    assert registry.rollouts.reconcile() == ["b"]
    assert registry.did == [("place", "b", "2"), ("announce", {"a": "a-1", "b": "b-2"}), ("remove", "b-1")]
    assert registry.rollouts.reconcile() == []


def test_an_ingress_that_did_not_hear_of_a_new_version_is_told_again() -> None:
    registry = Registry("models:/a@live", "models:/b@live")
    told = registry.rollouts.announce
    failures = iter([ConnectionError("gone")])

    def announce(table: dict[str, str]) -> None:
        for failure in failures:
            raise failure
        told(table)

    registry.rollouts.announce = announce
    registry.sources["models:/b@live"] = "2"
    assert registry.rollouts.reconcile() == ["b"]
    assert registry.did[1:] == [("announce", {"a": "a-1", "b": "b-2"}), ("remove", "b-1")]


def test_a_version_that_does_not_come_up_changes_nothing_and_is_tried_again() -> None:
    registry = Registry("models:/a@live")
    registry.sources["models:/a@live"], registry.broken = "2", True
    assert registry.rollouts.reconcile() == []
    assert registry.did == []
    registry.broken = False
    assert registry.rollouts.reconcile() == ["a"]


def test_a_registry_that_does_not_answer_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("models:/a@live", "models:/b@live")
    registry.sources["models:/b@live"] = "2"
    del registry.sources["models:/a@live"]
    assert registry.rollouts.reconcile() == ["b"]


@pytest.mark.parametrize("model", ["/folder/a", "s3://bucket/a", "models:/a/3"])
def test_what_is_no_alias_is_not_followed(model: str) -> None:
    registry = Registry("models:/b@live")
    registry.rollouts.models = (ModelSettings(model=model, name="a"),)
    assert registry.rollouts.reconcile() == []


def test_an_old_version_stays_while_it_has_streams_though_an_ingress_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout, "STREAMS_SECONDS", 0.0)
    told = iter([2, ConnectionError("gone"), 1, 0])

    def streams() -> int:
        found = next(told)
        if isinstance(found, Exception):
            raise found
        return found

    await_last_stream(streams, 300)
    assert next(told, None) is None


def test_an_old_version_does_not_stay_beyond_the_longest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "STREAMS_SECONDS", 0.0)
    await_last_stream(lambda: 1, 0.05)
