"""Names of deployments and applications on Ray Serve."""

from __future__ import annotations

ENGINE, INGRESS, WATCHER, CODER, BATCHES = "Engine", "Ingress", "Watcher", "ImageCoder", "Batches"


APPLICATION_PREFIX = "calumma-"


def watcher_application(name: str) -> str:
    return f"{APPLICATION_PREFIX}{name}:watch"


def batches_application(name: str) -> str:
    return f"{APPLICATION_PREFIX}{name}:batches"
