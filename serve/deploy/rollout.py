"""Rollout of new model versions: models:/name@alias is resolved again and again, and a new version takes over when it
answers. The old one ends when its last stream has, so no request is dropped; both need room for that time."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calumma.serve.deploy.applications import ModelApplication, start_model
from calumma.serve.deploy.naming import BATCHES, INGRESS, batches_application
from calumma.serve.deploy.preparation import locate_servable
from calumma.serve.settings import ModelSettings, ServeSettings

if TYPE_CHECKING:
    from collections.abc import Callable


log = logging.getLogger(__name__)
STREAMS_SECONDS = 1.0  # between looks at an old version's streams
SETTLE_SECONDS = 2.0  # requests that were sent to the old version reach it within so long


@dataclass
class RolloutController:
    """Which application serves each model, and how a new version replaces it; without Ray, by what it is given.

    locate(model) is its present source; start(model, source) starts a version and waits until it answers, and leaves
    nothing behind when it does not; announce(table) tells every ingress; remove(application) ends a version when it has
    nothing left to do.
    """

    models: tuple[ModelSettings, ...]
    applications: dict[str, ModelApplication]
    locate: Callable[[ModelSettings], str]
    start: Callable[[ModelSettings, str], ModelApplication]
    announce: Callable[[dict[str, str]], None]
    remove: Callable[[str], None]
    settle: float = SETTLE_SECONDS

    @property
    def table(self) -> dict[str, str]:
        return {name: one.application for name, one in self.applications.items()}

    def reconcile(self) -> list[str]:
        """Roll out what has a new version; the names of those models. A version that does not come up changes nothing
        and is tried again the next time."""
        changed = []
        for model in self.models:
            if not follows_alias(model.model):
                continue
            old = self.applications[model.name]
            try:
                source = self.locate(model)
                if source == old.source:
                    continue
                log.info("%s is now at %s, was at %s: rolling out", model.model, source, old.source)
                new = self.start(model, source)
            except Exception:
                log.exception("%s stays at %s: its new version did not come up", model.model, old.source)
                continue
            self.applications[model.name] = new
            self._announce()
            time.sleep(self.settle)
            self.remove(old.application)
            changed.append(model.name)
        return changed

    def _announce(self) -> None:
        """Again until every ingress has confirmed: a lost one is replaced by one that asks by itself."""
        while True:
            try:
                self.announce(self.table)
            except Exception:
                log.exception("an ingress did not hear of the new versions; telling it again")
                time.sleep(self.settle)
            else:
                return


def await_last_stream(streams: Callable[[], int], seconds: float) -> None:
    """Wait until an old version has no streams, which go on there even when one of its replicas is lost; at most for
    so many seconds, after which no answer is under way."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if not streams():
                return
        except Exception as error:
            log.warning("an ingress does not tell its streams: %s", error)
        time.sleep(STREAMS_SECONDS)


def follows_alias(model: str) -> bool:
    return model.startswith("models:/") and "@" in model


class AliasWatcher:
    """The deployment that runs a `RolloutController` every `seconds`."""

    def __init__(
        self, settings: ServeSettings, applications: dict[str, ModelApplication], ingress: str, seconds: float
    ) -> None:
        from ray import serve

        asking = [(INGRESS, ingress)]  # who sends requests to the models
        if settings.batches.location is not None:
            asking.append((BATCHES, batches_application(settings.name)))

        def announce(table: dict[str, str]) -> None:
            for one in asking:
                serve.get_deployment_handle(*one).broadcast("switch", table).results(timeout_s=60)

        def streams(application: str) -> int:
            found = [serve.get_deployment_handle(*one).broadcast("streams", application) for one in asking]
            return sum(count for each in found for count in each.results(timeout_s=60))

        def remove(application: str) -> None:
            await_last_stream(lambda: streams(application), settings.limits.seconds)
            serve.delete(application, _blocking=False)

        self._controller = RolloutController(
            settings.models,
            applications,
            locate_servable,
            lambda model, source: start_model(model, source, settings.name),
            announce,
            remove,
        )
        self._seconds = seconds
        threading.Thread(target=self._run, name="watcher", daemon=True).start()

    def table(self) -> dict[str, str]:
        """The application of each model, for an ingress that starts later."""
        return self._controller.table

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds)
            try:
                self._controller.reconcile()
            except Exception:
                log.exception("looking for new versions failed; it goes on")
