"""Locations that are read: links, patterns, and an object beside the prefix of its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform import storage
from calumma.platform.storage.client import s3_client
from calumma.platform.storage.inputs import expand_braces
from calumma.platform.storage.manifest import directory_fingerprint


def fill(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(f"{root}/{name}", name.encode())


def names(location: str, root: str) -> list[str]:
    return [uri.removeprefix(f"{root}/") for uri in storage.list_inputs(location).sizes]


# -- links --


def test_folders_behind_links_are_read_once_and_circles_end(tmp_path: Path) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    fill(str(tmp_path), "data/own/1.txt", "outside/2.txt", "outside/deep/3.txt", "data/z/4.txt")
    (data / "a").symlink_to(data / "z")  # of two names of a folder its own is told
    (data / "own" / "up").symlink_to("..")
    (data / "linked").symlink_to(outside)
    (data / "twice").symlink_to(outside)
    (outside / "back").symlink_to(data)
    (outside / "self").symlink_to("self")
    (data / "5.txt").symlink_to(outside / "2.txt")
    (data / "gone.txt").symlink_to("nowhere")
    (data / ".cache").symlink_to(outside)
    os.mkfifo(data / "pipe")
    listing = storage.list_inputs(str(data))
    found = [uri.removeprefix(f"{data}/") for uri in listing.sizes]
    assert found == ["5.txt", "linked/2.txt", "linked/deep/3.txt", "own/1.txt", "z/4.txt"]
    assert sorted(Path(uri).name for uri in listing.broken) == ["gone.txt", "pipe", "self"]
    assert f"{data}/linked/2.txt" not in storage.sizes(str(data)), (
        "what is deleted or copied is below the folder itself"
    )


def test_a_change_behind_a_link_or_pattern_is_seen(tmp_path: Path) -> None:
    fill(str(tmp_path), "outside/1.txt", "data/a.csv", "data/b.txt")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    locations = [f"{tmp_path}/data", f"{tmp_path}/data/*/*.txt"]
    before = [directory_fingerprint(location) for location in locations]
    assert before == [directory_fingerprint(location) for location in locations]
    fill(str(tmp_path), "outside/2.txt")
    after = [directory_fingerprint(location) for location in locations]
    assert all(one != two for one, two in zip(before, after, strict=True))


# -- patterns --

FILES = ("a/0.tar", "a/1.tar", "a/deep/2.tar", "a/deep/er/3.tar", "b/0.tar", "b/x[1].tar", "b/{y}.tar", "c.tar")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))
    fill(root, *FILES)
    return root


PATTERNS = (
    ("*.tar", ["c.tar"]),
    ("*/0.tar", ["a/0.tar", "b/0.tar"]),
    ("a/?.tar", ["a/0.tar", "a/1.tar"]),
    ("a/[01].tar", ["a/0.tar", "a/1.tar"]),
    ("a/[!0].tar", ["a/1.tar"]),
    ("**/*.tar", list(FILES)),
    ("a/**", ["a/0.tar", "a/1.tar", "a/deep/2.tar", "a/deep/er/3.tar"]),
    ("a/**/er/*", ["a/deep/er/3.tar"]),
    ("**/deep/*.tar", ["a/deep/2.tar"]),
    ("a/d*", ["a/deep/2.tar", "a/deep/er/3.tar"]),  # all below a folder that matches
    ("{a,b}/0.tar", ["a/0.tar", "b/0.tar"]),
    ("{a/{0..5},c}.tar", ["a/0.tar", "a/1.tar", "c.tar"]),
    ("{a,b}", ["a/0.tar", "a/1.tar", "a/deep/2.tar", "a/deep/er/3.tar", "b/0.tar", "b/x[1].tar", "b/{y}.tar"]),
    ("{a,b}/*0.tar", ["a/0.tar", "b/0.tar"]),
    ("b/x[1].tar", ["b/x[1].tar"]),  # what is there by that very name
    ("b/{y}.tar", ["b/{y}.tar"]),
    ("nothing*", []),
    ("nowhere/*", []),
    ("A/*.tar", []),
)


def test_patterns_name_files_and_folders(root: str) -> None:
    for pattern, found in PATTERNS:
        location = f"{root}/{pattern}"
        assert names(location, root) == sorted(found), pattern
        assert all(uri.startswith(storage.literal_folder(location)) for uri in storage.list_inputs(location).sizes)


def test_patterns_match_what_pythons_glob_matches(tmp_path: Path) -> None:
    fill(str(tmp_path), *FILES)
    for pattern in ("*.tar", "*/0.tar", "a/[01].tar", "**/*.tar", "**/deep/*.tar", "a/**/[23].tar", "**/[a-d]*/?.tar"):
        matched = sorted(str(path) for path in tmp_path.glob(pattern) if path.is_file())
        assert list(storage.list_inputs(f"{tmp_path}/{pattern}").sizes) == matched


def test_what_braces_ask_for_and_is_not_there_is_told(root: str) -> None:
    assert storage.list_inputs(f"{root}/a/{{0..2}}.tar").missing == [f"{root}/a/2.tar"]


def test_patterns_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path), *FILES)
    monkeypatch.chdir(tmp_path)
    assert list(storage.list_inputs("*.tar").sizes) == ["c.tar"]
    assert list(storage.list_inputs("*/[01].tar").sizes) == ["a/0.tar", "a/1.tar", "b/0.tar"]
    assert list(storage.list_inputs("**/3.tar").sizes) == ["a/deep/er/3.tar"]


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", ["a"]),
        ("{00008..00011}", ["00008", "00009", "00010", "00011"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{a..c}", ["a", "b", "c"]),
        ("x{,.gz}", ["x", "x.gz"]),
        ("{a,b{1,2}}c", ["ac", "b1c", "b2c"]),
        ("{a,b}{c,d}", ["ac", "ad", "bc", "bd"]),
        ("{a}", ["{a}"]),
        ("{}", ["{}"]),
        ("{a,b", ["{a,b"]),
        ("{x}{a,b}", ["{x}a", "{x}b"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded


@given(st.text("ab{},.01", max_size=12))
def test_any_braces_end(pattern: str) -> None:
    assert expand_braces(pattern)


def test_braces_for_millions_of_names_are_refused() -> None:
    with pytest.raises(storage.StorageError, match="more than 100,000 names"):
        expand_braces("{0..999}{0..999}")
    with pytest.raises(storage.StorageError, match="more than 100,000 names"):
        expand_braces("{0..99999999999999999999}")


# -- names in S3 --


def test_an_object_beside_the_prefix_of_its_name_is_read_too(s3: str) -> None:
    fill(s3, "data", "data/1.txt", "data-of-others/2.txt", "alone")
    assert names(f"{s3}/data", s3) == ["data", "data/1.txt"]
    assert names(f"{s3}/data/", s3) == ["data", "data/1.txt"]
    assert names(f"{s3}/alone", s3) == ["alone"]
    assert names(f"{s3}/dat", s3) == []


def test_an_empty_object_of_a_prefixs_name_is_its_mark(s3: str) -> None:
    fill(s3, "data/1.txt")
    storage.write_bytes(f"{s3}/data", b"")
    assert names(f"{s3}/data", s3) == ["data/1.txt"]


def test_keys_may_begin_with_a_slash(s3: str) -> None:
    bucket = s3.removeprefix("s3://").partition("/")[0]
    for key in ("/abs/1.txt", "//twice.txt"):
        s3_client().put_object(Bucket=bucket, Key=key, Body=key.encode())
    try:
        for location in (f"s3://{bucket}", f"s3://{bucket}//", f"s3://{bucket}//abs", f"s3://{bucket}//abs/*.txt"):
            found = storage.list_inputs(location).sizes
            assert f"s3://{bucket}//abs/1.txt" in found
            assert all(len(storage.read_bytes(uri)) == size for uri, size in found.items())
        with storage.open_read(f"s3://{bucket}//abs/1.txt") as file:
            assert file.read() == b"/abs/1.txt"
        assert storage.read_bytes(f"s3://{bucket}///twice.txt") == b"//twice.txt"
    finally:
        s3_client().delete_objects(
            Bucket=bucket, Delete={"Objects": [{"Key": key} for key in ("/abs/1.txt", "//twice.txt")]}
        )


def test_a_key_that_begins_with_a_slash_is_not_downloaded_to_the_root(s3: str, tmp_path: Path) -> None:
    bucket = s3.removeprefix("s3://").partition("/")[0]
    s3_client().put_object(Bucket=bucket, Key="/calumma-test-of-roots", Body=b"x")
    try:
        with pytest.raises(storage.StorageError, match="leads out of the folder"):
            storage.download(f"s3://{bucket}", tmp_path)
    finally:
        s3_client().delete_object(Bucket=bucket, Key="/calumma-test-of-roots")


def test_what_links_and_matches_lead_to_twice_is_listed_once(tmp_path: Path) -> None:
    fill(str(tmp_path), "a.txt", "sub/b.txt")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert list(storage.list_inputs(f"{tmp_path}/*").sizes) == [f"{tmp_path}/a.txt", f"{tmp_path}/sub/b.txt"]
    assert list(storage.list_inputs(f"{tmp_path}/{{link,sub}}/*.txt").sizes) == [f"{tmp_path}/sub/b.txt"]
    assert list(storage.list_inputs(f"{tmp_path}/{{link/b,a}}*").sizes) == [
        f"{tmp_path}/a.txt",
        f"{tmp_path}/link/b.txt",
    ]
