"""Curations on a cluster make what they make in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import bytes_below, everything, raw, run


@pytest.mark.cluster
def test_the_cluster_makes_what_this_process_makes(ray_cluster: None, tmp_path: Path) -> None:
    made = []
    for name, workers in (("here", 0), ("cluster", 2)):
        raw(tmp_path / name)
        manifest, _ = run(everything(tmp_path / name, workers))
        reports = manifest.report["sources"].values()
        counts = [{k: v for k, v in r.items() if k != "fingerprint"} for r in reports]
        made.append((bytes_below(tmp_path / name / "curated"), counts))
    assert made[0] == made[1]
    assert len(made[0][0]) > 6
