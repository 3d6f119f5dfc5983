"""Data from a mirror: copied, known by checksums, and what changed or is missing told."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from calumma.platform.evaluation.data import fetching, published
from calumma.platform.evaluation.miniatures.write import write_miniatures
from calumma.platform.specification import SpecificationError


def fetched(target: Path, mirror: Path, *names: str) -> fetching.Fetched:
    return list(fetching.fetch(str(target), list(names), str(mirror)))[-1][1]


def test_a_mirror_is_copied_and_what_changes_is_told(tmp_path: Path) -> None:
    mirror, target = tmp_path / "mirror", tmp_path / "data"
    write_miniatures(str(mirror))
    done = fetched(target, mirror, "squad", "coco", "piqa")
    assert done.files == {"squad": 1, "coco": 19, "piqa": 2}
    assert (done.changed, done.missing) == ([], {})
    assert fetching.check(str(target)) == []
    assert done.verdicts["squad/dev-v2.0.json"] == "other"  # ours, under the publisher's name
    assert done.verdicts["piqa/valid.jsonl"] == "unknown"
    assert (done.told("squad"), done.told("piqa")) == ("1 not as published", "2 of unknown publication")
    assert fetched(target, mirror, "squad").changed == []
    (target / "squad" / "dev-v2.0.json").write_text("{}")
    (target / "piqa" / "valid-labels.lst").unlink()
    wrong = fetching.check(str(target))
    assert len(wrong) == 2
    assert any("is another file" in line for line in wrong)
    (mirror / "squad" / "dev-v2.0.json").write_text('{"version": "v3"}')
    assert fetched(target, mirror, "squad").changed == ["squad/dev-v2.0.json"]


def test_what_cannot_be_had_is_told_and_the_rest_is_copied(tmp_path: Path) -> None:
    (tmp_path / "mirror" / "squad").mkdir(parents=True)
    (tmp_path / "mirror" / "squad" / "dev-v1.1.json").write_text("{}")
    done = fetched(tmp_path / "data", tmp_path / "mirror", "squad", "vqav2")
    assert done.files == {"squad": 1}
    assert "visualqa.org" in done.missing["vqav2"]
    [(_, hub)] = fetching.fetch(str(tmp_path / "data"), ["okvqa"])
    assert "okvqa.allenai.org" in hub.missing["okvqa"]


def test_unknown_names_and_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecificationError, match="no benchmark imagenet"):
        list(fetching.fetch(str(tmp_path), ["imagenet"]))
    with pytest.raises(SpecificationError, match="no list of checksums"):
        fetching.check(str(tmp_path))


def test_checksums_are_taken_by_their_own_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked against the command line's md5sum and sha256sum."""
    (tmp_path / "file.gz").write_bytes(b"some bytes")
    sums = {
        name: subprocess.run([name, str(tmp_path / "file.gz")], capture_output=True, text=True, check=True).stdout
        for name in ("md5sum", "sha256sum")
    }
    for line in sums.values():
        monkeypatch.setattr(published, "PUBLISHED", {"mnist": {"file.gz": line.split()[0]}})
        assert published.verdict("mnist", "inner/file.gz", str(tmp_path / "file.gz")) == "published"
        monkeypatch.setattr(published, "PUBLISHED", {"mnist": {"file.gz": line.split()[0][::-1]}})
        assert published.verdict("mnist", "file.gz", str(tmp_path / "file.gz")) == "other"
        assert published.verdict("mnist", "afile.gz", str(tmp_path / "file.gz")) == "unknown"


def test_the_list_has_whole_checksums_of_benchmarks_that_are_fetched() -> None:
    digests = [digest for own in published.PUBLISHED.values() for digest in own.values()]
    assert all(re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(digests)
    assert set(published.PUBLISHED) <= set(fetching.SOURCES)
