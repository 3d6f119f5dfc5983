"""The HTTP application over any backends, assembled."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI

from calumma.serve.http.access import middleware
from calumma.serve.http.context import ServingContext
from calumma.serve.http.endpoints.chat import add_chat
from calumma.serve.http.endpoints.completions import add_completions
from calumma.serve.http.endpoints.images import add_images
from calumma.serve.http.endpoints.status import add_status
from calumma.serve.http.endpoints.tokenizer import add_tokenizer
from calumma.serve.http.error_handlers import add_error_handlers
from calumma.serve.protocol import Backend
from calumma.serve.settings import ServeSettings


def create_app(backends: Backend | Mapping[str, Backend], settings: ServeSettings) -> FastAPI:
    """The application that answers over HTTP with what the backends generate; one alone is the settings' first model.

    Raises ValueError when the settings name a safety policy that cannot be made.
    """
    served = ServingContext(backends if isinstance(backends, Mapping) else {settings.name: backends}, settings)
    app = FastAPI(title="calumma", docs_url=None, redoc_url=None)
    app.add_middleware(middleware.Gate, metrics=served.metrics, settings=settings)
    add_error_handlers(app)
    add_status(app, served)
    add_chat(app, served)
    add_completions(app, served)
    add_images(app, served)
    add_tokenizer(app, served)
    return app
