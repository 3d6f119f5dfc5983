"""The deployment that answers batches: beside the ingress, whose restart it does not notice, and one at a time.

Lost, it is replaced, and the next one goes on with what is in storage.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from calumma.serve.batches.runner import BatchRunner
from calumma.serve.batches.store import Store
from calumma.serve.deploy.ingress import Ingress
from calumma.serve.deploy.naming import BATCHES
from calumma.serve.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)


class Batches(Ingress):
    """Asks the models as an ingress does, and has an HTTP application in its own process. Whose requests they are was
    checked when the batch came."""

    def __init__(self, settings: ServeSettings, table: dict[str, str], watch: str | None = None) -> None:
        super().__init__(settings, table, watch)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        from calumma.serve.http.in_process import in_process

        batches = self._settings.batches
        assert batches.location is not None
        app = self.__serve_build_asgi_app__()
        async with app.router.lifespan_context(app):
            await BatchRunner(Store(batches.location), in_process(app), batches.running, batches.requests).run()

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if self._task.done():
            raise RuntimeError("batches are not answered any more") from self._task.exception()


def build_batches(settings: ServeSettings, table: dict[str, str], watch: str | None) -> Application:
    """The application, not yet deployed. table: the application of each model. watch: that of the watcher."""
    from ray import serve

    deployment = serve.deployment(
        name=BATCHES,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},  # it waits for others
        graceful_shutdown_timeout_s=1.0,  # what is under way is asked for again
        graceful_shutdown_wait_loop_s=0.2,
    )(Batches)
    return deployment.bind(settings, table, watch)
