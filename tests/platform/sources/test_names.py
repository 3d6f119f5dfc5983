"""Names that are no UTF-8 are escaped once, and can be had back."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.sources.names import escaped, hidden_part, unescaped
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import list_source, name_of, read_file

ANY = st.text(st.one_of(st.characters(codec=None), st.sampled_from("\\xu0f\udc80\udcff\ud800")), max_size=12)


@given(ANY)
def test_escaping_is_valid_unicode_and_has_an_inverse(name: str) -> None:
    assert unescaped(escaped(name)) == name
    assert len(escaped(name).encode()) >= len(name)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\\"), max_size=12))
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert escaped(name) == name


def test_bytes_are_told_as_bytes() -> None:
    assert escaped(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"
    assert escaped(r"folder\caf.jpg") == r"folder\caf.jpg"
    assert escaped(r"caf\xe9.jpg") == r"caf\\xe9.jpg", "another name"


def test_files_and_members_with_such_names_are_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    with tarfile.open(os.fsdecode(folder + b"/caf\xe9.tar"), "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name in ("caf\udce9.jpg", "caf\udce9.txt", "bad\udce9.jpg", "other\udce9.\udce9"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, fileobj=io.BytesIO(b"none"))
    files, _ = list_source("webdataset", str(tmp_path))
    notes = Notes()
    items = [item for uri in files for item in read_file("webdataset", "s", uri, notes=notes)]
    told = [getattr(item, "reason", "") + (item.name if hasattr(item, "name") else name_of(item)) for item in items]
    assert any(r"caf\xe9.tar: caf\xe9" in words for words in told)
    assert json.dumps([told, notes.report()], ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("a.jpg", None),
        ("./a.jpg", None),
        ("a/b.c/d.jpg", None),
        ("", None),
        ("._a.jpg", "._*"),
        ("./x/._a.jpg", "._*"),
        ("__MACOSX/x/._a.jpg", "__MACOSX/"),
        ("x/.ipynb_checkpoints/a.jpg", ".ipynb_checkpoints/"),
        (".DS_Store", ".DS_Store"),
    ],
)
def test_hidden_parts(path: str, part: str | None) -> None:
    assert hidden_part(path) == part
