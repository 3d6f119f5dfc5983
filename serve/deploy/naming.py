"""Names of deployments and applications on Ray Serve."""

from __future__ import annotations

ENGINE, INGRESS, WATCHER, CODER = "Engine", "Ingress", "Watcher", "ImageCoder"


APPLICATION_PREFIX = "calumma-"


def watcher_application(name: str) -> str:
    return f"{APPLICATION_PREFIX}{name}:watch"
