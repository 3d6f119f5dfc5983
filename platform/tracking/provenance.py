"""Which code ran, where, and on what: commit, environment and lineage that MLflow records."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("calumma", "torch", "ray", "deepspeed", "mlflow", "numpy", "pyarrow", "sentencepiece", "pydantic")


@cache
def commit() -> dict[str, str]:
    """Tags with the git commit of this code, and whether files differ from it; $CALUMMA_COMMIT says it in images that
    carry no repository. Empty when nothing is known."""
    if configured := os.environ.get("CALUMMA_COMMIT"):
        return {"mlflow.source.git.commit": configured}
    here = Path(__file__).resolve().parents[2]
    commit_hash = _git(here, "rev-parse", "HEAD")
    # Installed into a repository that is not ours, site-packages would report that one's commit.
    if commit_hash is None or _git(here, "ls-files", "--error-unmatch", "platform/tracking/provenance.py") is None:
        return {}
    changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    return {"mlflow.source.git.commit": commit_hash, "calumma.git.dirty": str(bool(changed)).lower()}


def environment() -> dict[str, Any]:
    """Versions, machine and devices of this process."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "devices": devices,
        "cuda": torch.version.cuda if devices else None,
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def lineage(model_directory: str) -> dict[str, str]:
    """Where a model comes from, for the registry: `calumma.input.N` (directory and fingerprint of data, tokenizers,
    the parent), `calumma.parent`, `calumma.step`. From its manifest; empty when it has none."""
    from calumma.platform.storage.manifest import Manifest

    try:
        manifest = Manifest.find(model_directory)
    except (OSError, ValueError):  # not ours to read: an artifact of MLflow's, or imported
        return {}
    if manifest is None:
        return {}
    tags = {
        f"calumma.input.{i}": f"{uri} {fingerprint}"
        for i, (uri, fingerprint) in enumerate(sorted(manifest.inputs.items()))
    }
    parent = manifest.specification.get("initial")
    step = manifest.report.get("schedule_step")
    tags |= {"calumma.parent": str(parent)} if parent else {}
    return tags | ({"calumma.step": str(step)} if step is not None else {})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *command: str) -> str | None:
    """What git says; None when there is no git, no repository, or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
