"""Tokenizing on a cluster makes what it makes in this process, and goes on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from calumma.model.document import Document, Image, Text
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing import tokenize
from calumma.platform.tokenizing.actor import UnusableDocuments

from .conftest import Recorder, curated, files_below, publish, rows_of, run, tokenization


@pytest.mark.cluster
def test_the_cluster_makes_what_this_process_makes(ray_cluster: None, tmp_path: Path, tokenizers: Path) -> None:
    curated(tmp_path)
    notes: list[tuple[float, float]] = []
    spec = tokenization(
        tmp_path, tokenizers, output="remote", window=15, resources={"workers": 2, "cpus_per_worker": 0.5}
    )

    def progress(done: float, total: float, note: str = "") -> None:
        notes.append((done, total))
        if done and len(notes) == 3:
            raise KeyboardInterrupt

    # Stopped in the middle, it goes on from there.
    with pytest.raises(KeyboardInterrupt):
        tokenize.run(spec, Recorder(), progress)  # type: ignore[arg-type]
    tokenize.run(spec, Recorder(), progress)  # type: ignore[arg-type]
    assert notes[:3] == [(0, 90), (15, 90), (30, 90)]
    assert notes[3] >= (30, 90)
    assert notes[3:] == sorted(notes[3:])
    assert notes[-1] == (90, 90)
    manifest = Manifest.read(f"{tmp_path}/remote")
    manifests = {"manifest.json", "pairs/manifest.json", "text/manifest.json"}
    assert set(files_below(tmp_path / "remote")) == manifests | {entry.path for entry in manifest.files}

    # What an actor raises reaches the caller as it was raised.
    broken = Document((Image(b"no image", "x"), Text("x")))
    publish(f"{tmp_path}/curated/broken", [broken])
    with pytest.raises(
        UnusableDocuments, match=r"curated/broken/documents-0000\.parquet: a document cannot be encoded"
    ):
        run(tokenization(tmp_path, tokenizers, documents=["curated/broken"], resources={"workers": 1}))

    run(tokenization(tmp_path, tokenizers, output="local", window=15))
    for name in ("pairs", "text"):
        assert rows_of(f"{tmp_path}/remote/{name}") == rows_of(f"{tmp_path}/local/{name}")
