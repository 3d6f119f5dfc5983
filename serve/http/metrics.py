"""What `/metrics` shows Prometheus: requests, tokens and latencies of this ingress, and statistics of its engines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from calumma.serve.protocol import TokenCount

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)

EngineStatistics = dict[tuple[str, str], dict[str, float]]  # (model, replica) -> statistics by name

# Statistics of an engine that only grow; all others go up and down.
COUNTERS = {
    "text_tokens": "Text tokens sampled",
    "image_tokens": "Image tokens sampled",
    "prompt_tokens": "Prompt tokens taken in",
    "computed_tokens": "Tokens that went through the model",
    "images": "Images drawn",
    "steps": "Forward passes",
    "step_seconds": "Seconds of engine steps",
    "finished": "Requests answered",
    "aborted": "Requests given up",
    "preemptions": "Requests that gave their room back to others",
    "prefix_hit_tokens": "Context tokens found in the cache",
    "prefix_tokens": "Context tokens looked up in the cache",
    "prefix_restored_tokens": "Context tokens found in the host's memory or on a disk, of those found",
    "prefix_disk_tokens": "Context tokens found on a disk, of those",
    "disk_cache_damaged": "Files of the disk cache that were damaged",
    "images_coded": "Images of prompts coded",
    "images_known": "Images of prompts whose codes were known from an earlier prompt",
    "evictions": "Cached blocks given up for others",
    "drafted": "Image codes proposed by speculative decoding",
    "accepted": "Proposed image codes that were kept",
}
GAUGES = {
    "requests_running": "Requests the engine works on",
    "requests_waiting": "Requests in line for the engine",
    "queued_tokens": "Prompt tokens in line",
    "running_text": "Requests in a text phase",
    "running_image": "Requests in an image phase",
    "cache_used_ratio": "Share of the KV cache that requests hold",
    "host_cache_bytes": "Bytes of the cache held in the host's memory",
    "disk_cache_bytes": "Bytes of the cache held on the disk",
    "cache_kept_ratio": "Share of the KV cache that is kept for its content",
}


class Metrics:
    """engines: the last known statistics; the /metrics endpoint refreshes them before it shows the page."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.engines: EngineStatistics = {}
        self._requests = Counter(
            "calumma_requests", "Finished HTTP requests", ["endpoint", "status"], registry=registry
        )
        self._tokens = Counter(
            "calumma_tokens", "Tokens of prompts and answers", ["model", "direction", "modality"], registry=registry
        )
        self._images = Counter("calumma_images", "Images drawn", ["model"], registry=registry)
        self._running = Gauge("calumma_requests_running", "Requests being answered", ["model"], registry=registry)
        self._ended = Counter("calumma_answers", "Ended answers by how they ended", ["model", "end"], registry=registry)
        self._seconds = Histogram(
            "calumma_request_seconds", "From request to last byte", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "calumma_first_token_seconds",
            "From request to the first text, or code of an image",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self._token = Histogram(
            "calumma_token_seconds",
            "Mean time between the tokens of an answer",
            ["model"],
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self._image = Histogram(
            "calumma_image_seconds",
            "From an image's first token to its last pixel",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        registry.register(_EngineCollector(self))

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def observe_request(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def time_generation(self, model: str) -> GenerationTimer:
        return GenerationTimer(self, model)

    def _count(self, model: str, direction: str, count: TokenCount) -> None:
        self._tokens.labels(model, direction, "text").inc(count.text)
        self._tokens.labels(model, direction, "image").inc(count.image)


class GenerationTimer:
    """Measures one generation from its request to its end."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._begin = time.monotonic()
        self._first: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._metrics._running.labels(self._model).track_inprogress():
            yield

    def prompt(self, count: TokenCount) -> None:
        self._metrics._count(self._model, "prompt", count)

    def token(self) -> None:
        """Some of the output is there."""
        if self._first is None:
            self._first = time.monotonic()
            self._metrics._first.labels(self._model).observe(self._first - self._begin)

    def image(self, seconds: float) -> None:
        self._metrics._images.labels(self._model).inc()
        self._metrics._image.labels(self._model).observe(seconds)

    def completion(self, count: TokenCount) -> None:
        self._metrics._count(self._model, "answer", count)
        if self._first is not None and count.total > 1:
            self._metrics._token.labels(self._model).observe((time.monotonic() - self._first) / (count.total - 1))

    def ended(self, end: str) -> None:
        self._metrics._ended.labels(self._model, end).inc()


class _EngineCollector(Collector):
    """Each statistic of each engine as `calumma_engine_…`, by model and replica."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        engines = self._metrics.engines
        for names, kind in ((COUNTERS, CounterMetricFamily), (GAUGES, GaugeMetricFamily)):
            for name, text in names.items():
                having = {key: numbers[name] for key, numbers in engines.items() if name in numbers}
                if not having:
                    continue
                family = kind(f"calumma_engine_{name}", text, labels=["model", "replica"])
                for key, value in having.items():
                    family.add_metric(list(key), value)
                yield family
