"""The HTTP application over any backends, assembled."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from calumma.serve.http.access.drain import Drain
from calumma.serve.http.access.middleware import AccessMiddleware
from calumma.serve.http.context import ServingContext
from calumma.serve.http.endpoints.batches import add_batches
from calumma.serve.http.endpoints.chat import add_chat
from calumma.serve.http.endpoints.completions import add_completions
from calumma.serve.http.endpoints.files import add_files
from calumma.serve.http.endpoints.images import add_images
from calumma.serve.http.endpoints.responses_api import add_responses
from calumma.serve.http.endpoints.status import add_status
from calumma.serve.http.endpoints.tokenizer import add_tokenizer
from calumma.serve.http.error_handlers import add_error_handlers
from calumma.serve.http.openapi import complete_openapi
from calumma.serve.protocol import Backend
from calumma.serve.settings import ServeSettings


def create_app(
    backends: Backend | Mapping[str, Backend], settings: ServeSettings, drain: Drain | None = None
) -> FastAPI:
    """The application over the backends, by the model's name; one alone is that of the settings' first model. drain:
    by which it is told to take no further requests.

    Raises ValueError when the settings name a safety policy that cannot be made.
    """
    by_name = backends if isinstance(backends, Mapping) else {settings.name: backends}
    context = ServingContext(by_name, settings, drain or Drain())
    app = FastAPI(title="calumma", docs_url=None, redoc_url=None, lifespan=lambda _: context.running())
    app.add_middleware(AccessMiddleware, metrics=context.metrics, settings=settings, drain=context.drain)
    if settings.allowed_origins:  # outside, so that pages can read refusals too; it answers preflights itself
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=600,
        )
    add_error_handlers(app)
    add_status(app, context)
    add_chat(app, context)
    add_completions(app, context)
    add_images(app, context)
    add_responses(app, context)
    add_tokenizer(app, context)
    add_files(app, context)
    add_batches(app, context)
    complete_openapi(app)
    return app
