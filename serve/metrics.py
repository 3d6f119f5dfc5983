"""What `/metrics` tells Prometheus about an ingress process: requests, tokens, latencies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from calumma.serve.pieces import TokenCount

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "calumma_requests", "Finished HTTP requests", ["endpoint", "status"], registry=registry
        )
        self._tokens = Counter(
            "calumma_tokens", "Tokens of prompts and answers", ["direction", "modality"], registry=registry
        )
        self._images = Counter("calumma_images", "Images drawn", registry=registry)
        self._running = Gauge("calumma_requests_running", "Requests being answered", registry=registry)
        self._seconds = Histogram(
            "calumma_request_seconds", "From request to last byte", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "calumma_first_piece_seconds", "From request to the first text or image", buckets=SECONDS, registry=registry
        )

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def finished(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def prompt(self, count: TokenCount) -> None:
        self._count("prompt", count)

    def answer(self, count: TokenCount) -> None:
        self._count("answer", count)

    def image(self) -> None:
        self._images.inc()

    def first_piece(self, since: float) -> None:
        """`since`: time.monotonic() at the request."""
        self._first.observe(time.monotonic() - since)

    @contextmanager
    def answering(self) -> Iterator[None]:
        with self._running.track_inprogress():
            yield

    def _count(self, direction: str, count: TokenCount) -> None:
        self._tokens.labels(direction, "text").inc(count.text)
        self._tokens.labels(direction, "image").inc(count.image)
