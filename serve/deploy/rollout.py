"""New versions behind aliases: models:/name@alias is looked up again and again, and a new version takes over when it
answers. The old one finishes what it has begun, so no request is dropped; both need room for that time."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calumma.serve.deploy.applications import ModelApplication, start_model
from calumma.serve.deploy.naming import INGRESS
from calumma.serve.deploy.preparation import locate_servable
from calumma.serve.settings import ModelSettings, ServeSettings

if TYPE_CHECKING:
    from collections.abc import Callable


log = logging.getLogger(__name__)
SETTLE_SECONDS = 2.0  # seconds in which requests that were on their way to the old version still reach it


@dataclass
class RolloutController:
    """The decisions, apart from Ray: what is placed where, and what a look at the registry changes.

    locate(model) is its present source; place(model, source) starts a version and waits until it answers, and leaves
    nothing behind when it does not; announce(table) tells every ingress; remove(application) ends a version when it has
    nothing left to do.
    """

    models: tuple[ModelSettings, ...]
    placed: dict[str, ModelApplication]
    locate: Callable[[ModelSettings], str]
    start_model: Callable[[ModelSettings, str], ModelApplication]
    announce: Callable[[dict[str, str]], None]
    remove: Callable[[str], None]
    settle: float = SETTLE_SECONDS

    @property
    def table(self) -> dict[str, str]:
        return {name: placed.application for name, placed in self.placed.items()}

    def look(self) -> list[str]:
        """Roll out what has a new version; the names of those models. A version that does not come up changes nothing
        and is tried again at the next look."""
        changed = []
        for model in self.models:
            if not follows_alias(model.model):
                continue
            old = self.placed[model.name]
            try:
                source = self.locate(model)
                if source == old.source:
                    continue
                log.info("%s is now at %s, was at %s: rolling out", model.model, source, old.source)
                new = self.place(model, source)
            except Exception:
                log.exception("%s stays at %s: its new version did not come up", model.model, old.source)
                continue
            self.placed[model.name] = new
            self._announce()
            time.sleep(self.settle)
            self.remove(old.application)
            changed.append(model.name)
        return changed

    def _announce(self) -> None:
        """Until all have heard it: a lost ingress is replaced by one that asks by itself."""
        while True:
            try:
                self.announce(self.table)
            except Exception:
                log.exception("an ingress did not hear of the new versions; telling it again")
                time.sleep(self.settle)
            else:
                return


def follows_alias(model: str) -> bool:
    return model.startswith("models:/") and "@" in model


class AliasWatcher:
    """The deployment that looks."""

    def __init__(
        self, settings: ServeSettings, placed: dict[str, ModelApplication], ingress: str, seconds: float
    ) -> None:
        from ray import serve

        def announce(table: dict[str, str]) -> None:
            serve.get_deployment_handle(INGRESS, ingress).broadcast("switch", table).results(timeout_s=60)

        self._rollouts = RolloutController(
            settings.models,
            placed,
            locate_servable,
            lambda model, source: start_model(model, source, settings.name),
            announce,
            lambda application: serve.delete(application, _blocking=False),
        )
        self._seconds = seconds
        threading.Thread(target=self._run, name="watcher", daemon=True).start()

    def table(self) -> dict[str, str]:
        """The application of each model, for an ingress that starts later."""
        return self._rollouts.table

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds)
            try:
                self._rollouts.look()
            except Exception:
                log.exception("looking for new versions failed; it goes on")
