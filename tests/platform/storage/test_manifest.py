"""Manifests: published last, read back as they were, and compared with the specification that made them."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from calumma.platform import storage
from calumma.platform.storage.manifest import MANIFEST, FileEntry, Manifest, ManifestError, file_entries
from calumma.platform.tokenizing.specification import TokenizeSpecification
from calumma.platform.tracking.fingerprints import fingerprints, unchanged_result
from calumma.platform.training.specification import TrainSpecification


def specification(**changes: Any) -> TokenizeSpecification:
    return TokenizeSpecification.model_validate({"storage": "s3://b/root", "documents": ["curated"], **changes})


@st.composite
def valid_entries(draw: st.DrawFn, path: str) -> FileEntry:
    groups = draw(st.integers(0, 5))
    size = draw(st.integers(1, 7))
    rows = (groups - 1) * size + draw(st.integers(1, size)) if groups else 0
    given_size = size if groups else None
    tokens = draw(st.fixed_dictionaries({"text": st.integers(0, 10**12), "image": st.integers(0, 10**12)}))
    data = draw(st.binary(max_size=20))
    digest = draw(st.binary(min_size=32, max_size=32)).hex()
    footer = draw(st.none() | st.fixed_dictionaries({"bytes": st.integers(12, 10**6), "sha256": st.just(digest)}))
    return FileEntry.from_bytes(
        path, data, rows=rows, row_groups=groups, tokens=tokens, sequences_per_row_group=given_size, footer=footer
    )


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    files=st.lists(st.integers(0, 99), unique=True, max_size=5).flatmap(
        lambda numbers: st.tuples(*(valid_entries(f"part/{n}.parquet") for n in numbers))
    ),
    report=st.dictionaries(st.text(), values, max_size=4),
)
def test_what_is_written_is_read(files: tuple[FileEntry, ...], report: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = str(tmp_path_factory.mktemp("manifest"))
    manifest = Manifest(kind="tokens", files=list(files), specification={"a": 1}, report=report)
    assert Manifest.find(folder) is None
    manifest.write(folder)
    assert Manifest.read(folder) == manifest
    assert manifest.rows == sum(file.rows for file in files)
    assert manifest.tokens["image"] == sum(file.tokens["image"] for file in files)
    for file in files:
        assert sum(file.sequences(group) for group in range(file.row_groups)) == file.rows


def test_an_entry_knows_its_content() -> None:
    entry = FileEntry.from_bytes("x", b"hello")
    assert (entry.bytes, entry.sha256) == (5, hashlib.sha256(b"hello").hexdigest())
    assert entry.tokens == {"text": 0, "image": 0}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "/etc/x"}, "must be relative"),
        ({"path": "a/../../x"}, "must be relative"),
        ({"rows": 2, "row_groups": 3}, "cannot hold"),
        ({"rows": 9, "row_groups": 2, "sequences_per_row_group": 4}, "are not 2 row groups of 4"),
        ({"sha256": "abc"}, "sha256"),
        ({"footer": {"bytes": 4, "sha256": "0" * 64}}, "footer.bytes"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_impossible_entries_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FileEntry.model_validate({"path": "x", "bytes": 0, "sha256": "0" * 64, **fields})


def test_row_groups_that_the_entry_does_not_describe() -> None:
    entry = FileEntry.from_bytes("x", b"", rows=9, row_groups=4)  # 3 3 3 0? 2 2 2 3? it does not say
    with pytest.raises(ManifestError, match="does not say"):
        entry.sequences(0)
    with pytest.raises(ManifestError, match="no number 4"):
        entry.sequences(4)


def test_a_manifest_names_a_file_once() -> None:
    with pytest.raises(ValidationError, match="named twice: x"):
        Manifest(kind="k", files=[FileEntry.from_bytes("x", b"a"), FileEntry.from_bytes("x", b"b")])


@pytest.mark.parametrize("content", [b"", b"{", b'{"kind": 3}', b'{"kind": "k", "surprise": 1}', b"\xff"])
def test_an_unreadable_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError, match=str(tmp_path / MANIFEST)):
        Manifest.find(str(tmp_path))


def test_reading_leaves_garbage_collection_as_it_was(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"{")
    assert gc.isenabled()
    with pytest.raises(ManifestError):
        Manifest.read(str(tmp_path))
    assert gc.isenabled()
    Manifest(kind="k").write(str(tmp_path))
    gc.disable()
    try:
        Manifest.read(str(tmp_path))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_files_are_verified(tmp_path: Path) -> None:
    for name, data in (("a", b"one"), ("below/b", b"two")):
        storage.write_bytes(str(tmp_path / name), data)
    manifest = Manifest(kind="k", files=file_entries(str(tmp_path)))
    manifest.write(str(tmp_path))
    assert [entry.path for entry in file_entries(str(tmp_path))] == ["a", "below/b"], "a manifest does not name itself"
    manifest.verify(str(tmp_path), content=True)
    (tmp_path / "a").write_bytes(b"onE")
    manifest.verify(str(tmp_path))
    with pytest.raises(ManifestError, match="content of a"):
        manifest.verify(str(tmp_path), content=True)
    (tmp_path / "a").write_bytes(b"longer")
    with pytest.raises(ManifestError, match="a has 6 bytes, where the manifest says 3"):
        manifest.verify(str(tmp_path))
    (tmp_path / "a").unlink()
    with pytest.raises(ManifestError, match="a is in the manifest and not in storage"):
        manifest.verify(str(tmp_path))


def test_a_finished_job_is_recognized_by_its_specification(tmp_path: Path) -> None:
    folder, made_by = str(tmp_path), specification(context=512)
    assert unchanged_result(folder, made_by) is None
    Manifest(kind="tokens", specification=made_by.model_dump(mode="json")).write(folder)
    assert unchanged_result(folder, made_by) is not None
    elsewhere = {
        "tracking": {"uri": "sqlite:///x"},
        "resources": {"workers": {"min": 1, "max": 9}},
        "run_name": "again",
    }
    assert unchanged_result(folder, specification(context=512, **elsewhere)) is not None
    assert unchanged_result(folder, specification(context=513)) is None
    assert unchanged_result(folder, specification(context=512, seed=1)) is None
    other = TrainSpecification.model_construct(job="pretrain")
    assert unchanged_result(folder, other) is None, "another kind of job made it"


def test_a_specification_of_before_a_field_was_added_still_counts(tmp_path: Path) -> None:
    old = specification().model_dump(mode="json")
    del old["micro_batches_per_shard"]
    Manifest(kind="tokens", specification=old).write(str(tmp_path))
    assert unchanged_result(str(tmp_path), specification()) is not None
    assert unchanged_result(str(tmp_path), specification(micro_batches_per_shard=7)) is None


def test_a_job_is_not_finished_when_its_inputs_changed(tmp_path: Path) -> None:
    raw, made = str(tmp_path / "raw"), str(tmp_path / "made")
    Manifest(kind="raw", report={"version": 1}).write(raw)
    dumped = specification().model_dump(mode="json")
    Manifest(kind="tokens", specification=dumped, inputs=fingerprints([raw])).write(made)
    assert unchanged_result(made, specification()) is not None
    Manifest(kind="raw", report={"version": 2}).write(raw)
    assert unchanged_result(made, specification()) is None
    Path(raw, MANIFEST).unlink()
    assert unchanged_result(made, specification()) is None


def test_a_relative_folder_is_the_same_as_its_absolute_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two jobs one may name it so, one otherwise: say an imported model, which has no manifest."""
    storage.write_bytes(str(tmp_path / "models" / "imported" / "config.json"), b"{}")
    monkeypatch.chdir(tmp_path)
    [relative] = fingerprints(["models/imported"]).values()
    [absolute] = fingerprints([str(tmp_path / "models" / "imported")]).values()
    assert relative == absolute != ""


def test_files_without_a_manifest_are_told_apart_by_their_listing(tmp_path: Path) -> None:
    def now(name: str = "") -> str:
        (found,) = fingerprints([str(tmp_path / "raw" / name)]).values()
        return found

    assert now() == "", "there is nothing"
    file = tmp_path / "raw" / "below" / "a.jsonl"
    storage.write_bytes(str(file), b"one")
    seen = [now()]
    assert now() == seen[0]
    assert now("below/a.jsonl") == now("below/a.jsonl") != ""
    storage.write_bytes(str(tmp_path / "raw" / "b.jsonl"), b"added")
    seen.append(now())
    file.write_bytes(b"longer")
    seen.append(now())
    file.write_bytes(b"LONGER")  # repaired, at its size
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    seen.append(now())
    file.unlink()
    seen.append(now())
    assert len(set(seen)) == 5
    Manifest(kind="raw").write(str(tmp_path / "raw"))
    published = now()
    storage.write_bytes(str(file), b"again")
    assert now() == published, "a manifest speaks for its files"


def test_a_registered_model_is_another_input_when_its_alias_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leads_to: dict[str | None, str] = {}
    monkeypatch.setattr("calumma.platform.tracking.registry.model_source", lambda uri, tracking: leads_to[tracking.uri])
    one, two, made, uri = str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "made"), "models:/m@champion"
    for place in (one, two):
        Manifest(kind="model").write(place)
    spec = specification(tracking={"uri": "http://registry"})
    leads_to["http://registry"] = one
    inputs = fingerprints([uri], spec.tracking)
    assert list(inputs) == [uri]
    Manifest(kind="evaluation", specification=spec.model_dump(mode="json"), inputs=inputs).write(made)
    assert unchanged_result(made, spec) is not None
    leads_to["http://registry"] = two
    assert unchanged_result(made, spec) is None, "equal files, but another directory"
    leads_to["http://other"] = one
    assert unchanged_result(made, specification(tracking={"uri": "http://other"})) is not None
    leads_to["http://registry"] = one
    Manifest(kind="model", report={"trained": "again"}).write(one)
    assert unchanged_result(made, spec) is None
    leads_to["http://registry"] = "mlflow-artifacts:/1/model"
    assert fingerprints([uri], spec.tracking) != inputs


def test_manifests_are_json_for_people(tmp_path: Path) -> None:
    Manifest(kind="tokens", files=[FileEntry.from_bytes("x", b"")]).write(str(tmp_path))
    text = (tmp_path / MANIFEST).read_text()
    assert json.loads(text)["files"][0]["path"] == "x"
    assert len(text.splitlines()) > 5
