"""Object storage: the same behaviour on a local folder and on S3 (a moto server), and errors that say what to do."""

from __future__ import annotations

import io
import os
import pickle
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calumma.platform import storage


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to store things, of either kind."""
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3")


def test_what_is_written_is_read(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.exists(uri)
    assert storage.exists(root)
    assert not storage.exists(storage.join(root, "a", "b"))


def test_listing_is_recursive_sorted_and_knows_folders_from_prefixes(root: str) -> None:
    for name in ("tokens/b.parquet", "tokens/a/c.parquet", "tokens-2/x.parquet", "tokens/ü %20.txt"):
        storage.write_bytes(storage.join(root, name), name.encode())
    listed = storage.list_files(storage.join(root, "tokens"))
    names = ["a/c.parquet", "b.parquet", "ü %20.txt"]
    assert [storage.relative(uri, storage.join(root, "tokens")) for uri in listed] == names
    assert [storage.read_bytes(uri).decode() for uri in listed] == [f"tokens/{name}" for name in names]
    assert storage.list_files(storage.join(root, "tokens/")) == listed
    one = storage.join(root, "tokens-2/x.parquet")
    assert storage.list_files(one) == [one]
    assert storage.sizes(one) == {one: len("tokens-2/x.parquet")}
    assert storage.list_files(storage.join(root, "nothing")) == []


def test_files_of_the_same_name_and_other_suffixes_are_found(root: str) -> None:
    for name in ("a.jpg", "a.txt", "a.JSON", "a.Text", "ab.cls", "a.d/x.cls"):
        storage.write_bytes(storage.join(root, name), b"x")
    found = storage.files_beside(storage.join(root, "a"), (".json", ".txt", ".text", ".cls", ".d"))
    assert found == [storage.join(root, "a.JSON"), storage.join(root, "a.txt")]


def test_more_objects_than_one_page_of_s3(s3: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: storage.write_bytes(storage.join(s3, f"{i:04}"), b""), range(1003)))
    assert len(storage.list_files(s3)) == 1003
    storage.delete(s3)
    assert storage.list_files(s3) == []


def test_unfinished_files_are_not_listed_and_failed_writes_leave_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    seen: list[list[str]] = []

    def fail(descriptor: int) -> None:
        assert len(list(tmp_path.iterdir())) == 2, "the new content is beside the old one"
        seen.append(storage.list_files(str(tmp_path)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(storage.StorageError, match="No space left"):
        storage.write_bytes(uri, b"new and longer")
    assert seen == [[uri]]
    assert storage.read_bytes(uri) == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    uri, contents = str(tmp_path / "file"), [bytes([i]) * 200_000 for i in range(20)]
    storage.write_bytes(uri, contents[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(storage.read_bytes(uri))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        storage.write_bytes(uri, content)
    stop.set()
    reader.join()
    assert seen
    assert seen <= set(contents)


@pytest.mark.parametrize("buffer", [7, 1000, 1 << 20])
def test_open_files_can_be_read_from_anywhere(root: str, buffer: int) -> None:
    data = bytes(range(256)) * 40
    uri = storage.join(root, "file")
    storage.write_bytes(uri, data)
    with storage.open_read(uri, buffer=buffer) as file, io.BytesIO(data) as expected:
        for offset, whence, length in [(0, 2, 1), (-100, 2, 60), (5, 0, 3000), (10, 1, 20), (3, 0, 4), (9000, 0, -1)]:
            assert file.seek(offset, whence) == expected.seek(offset, whence)
            assert file.read(length) == expected.read(length)
    with storage.open_read(uri) as file:
        assert file.read() == data


def test_lines_of_open_files(root: str) -> None:
    uri = storage.join(root, "lines")
    storage.write_bytes(uri, b"one\ntwo\n\nfour")
    with storage.open_read(uri, buffer=5) as file:
        assert list(file) == [b"one\n", b"two\n", b"\n", b"four"]


def test_an_object_that_vanishes_while_it_is_read_is_named(s3: str) -> None:
    uri = storage.join(s3, "x")
    storage.write_bytes(uri, bytes(1000))
    with storage.open_read(uri, buffer=10) as file:
        assert file.read(3) == bytes(3)
        storage.delete(uri)
        with pytest.raises(storage.NotFound, match=f"cannot read {uri} .* there is no such object"):
            file.seek(500)


def test_open_files_hold_parquet(root: str) -> None:
    table = pa.table({"tokens": [[i, i + 1] for i in range(100)]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=10, compression="zstd")
    uri = storage.join(root, "x.parquet")
    storage.write_bytes(uri, sink.getvalue())
    with storage.open_read(uri) as file:
        assert pq.ParquetFile(file).read_row_group(7).to_pydict() == table.slice(70, 10).to_pydict()


def test_folders_travel_whole(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    contents = {"manifest.json": b"{}", "model/manifest.json": b"{}", "model/weights": b"w" * 100_000, "x": b""}
    for name, data in contents.items():
        storage.write_bytes(str(source / name), data)
    storage.upload(source, storage.join(root, "copy"))
    assert len(storage.list_files(storage.join(root, "copy"))) == len(contents)
    storage.download(storage.join(root, "copy"), tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in contents} == contents
    with storage.local_copy(storage.join(root, "copy")) as folder:
        assert (folder / "model" / "weights").read_bytes() == contents["model/weights"]
    assert folder.exists() == (not storage.is_remote(root)), "a copy of something remote is temporary"
    storage.upload(source / "x", storage.join(root, "one"))
    assert storage.read_bytes(storage.join(root, "one")) == b""


@pytest.mark.parametrize("copy", [storage.upload, storage.download])
def test_an_interrupted_copy_has_no_manifest(
    copy: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    for name in ("manifest.json", "zz", "below/manifest.json"):
        storage.write_bytes(str(source / name), b"{}")
    written: list[str] = []
    replace = Path.replace

    def record(self: Path, path: Path) -> Path:
        if path.name == "zz" and not written:
            written.append("failed")
            raise OSError(5, "Input/output error")
        written.append(path.relative_to(target).as_posix())
        return replace(self, path)

    monkeypatch.setattr(Path, "replace", record)
    with pytest.raises(storage.StorageError, match="Input/output"):
        copy(str(source), str(target))
    assert storage.list_files(str(target)) == []
    copy(str(source), str(target))
    assert written == ["failed", "zz", "below/manifest.json", "manifest.json"]


def test_deleting_takes_all_below_and_nothing_else(root: str) -> None:
    for name in ("a/manifest.json", "a/b/c", "ab", "d"):
        storage.write_bytes(storage.join(root, name), b"x")
    storage.delete(storage.join(root, "a"))
    storage.delete(storage.join(root, "d"))
    storage.delete(storage.join(root, "nothing"))
    assert [storage.relative(uri, root) for uri in storage.list_files(root)] == ["ab"]


def test_deleting_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "manifest.json", "z"):
        storage.write_bytes(str(tmp_path / "folder" / name), b"x")
    unlink, gone = Path.unlink, []

    def record(self: Path, missing_ok: bool = False) -> None:
        gone.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", record)
    storage.delete(str(tmp_path / "folder"))
    assert gone[0] == "manifest.json"


@pytest.mark.parametrize("uri", ["s3://calumma-tests", "s3://calumma-tests/", "/", "~", "."])
def test_whole_buckets_and_homes_are_not_deleted(uri: str) -> None:
    with pytest.raises(storage.StorageError, match="refusing to delete"):
        storage.delete(uri)


def test_what_is_missing_is_named(root: str, tmp_path: Path) -> None:
    uri = storage.join(root, "missing")
    actions: list[Callable[[], object]] = [
        lambda: storage.read_bytes(uri),
        lambda: storage.open_read(uri),
        lambda: storage.download(uri, tmp_path / "x"),
        lambda: storage.local_copy(uri).__enter__(),
    ]
    for action in actions:
        with pytest.raises(storage.NotFound, match=uri):
            action()
    with pytest.raises(storage.NotFound, match="missing or empty"):
        storage.upload(tmp_path / "no folder", root)


def test_a_missing_bucket_is_said_to_be_missing(s3: str, tmp_path: Path) -> None:
    uri = "s3://no-such-bucket/key"
    (tmp_path / "file").write_bytes(b"x")
    actions: list[Callable[[], object]] = [
        lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b""),
        lambda: storage.open_read(uri),
        lambda: storage.list_files(uri),
        lambda: storage.exists(uri),
        lambda: storage.upload(tmp_path, uri),
        lambda: storage.check_writable(uri),
    ]
    for action in actions:
        with pytest.raises(storage.StorageError, match="bucket 'no-such-bucket' does not exist; create it") as caught:
            action()
        assert uri in str(caught.value)


def test_missing_credentials_are_asked_for(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(storage.StorageError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(storage.join(s3, "x"))


def test_an_endpoint_that_does_not_answer_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and nobody listens
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(storage.StorageError, match="check AWS_ENDPOINT_URL") as caught:
            storage.check_writable(s3)
    assert endpoint in str(caught.value)


@pytest.mark.parametrize("uri", ["https://host/path"])
def test_unknown_schemes_are_refused(uri: str) -> None:
    with pytest.raises(storage.StorageError, match=r"is not known; use s3://, .* or a local path"):
        storage.read_bytes(uri)


def test_a_file_where_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(storage.StorageError, match=str(tmp_path / "file" / "below")):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")


def test_checking_leaves_nothing_behind(root: str) -> None:
    storage.check_writable(root)
    assert storage.list_files(root) == []
    assert storage.is_remote(root) or not Path(root).exists()


def test_file_uris_are_local_paths(tmp_path: Path) -> None:
    uri = (tmp_path / "a b").as_uri()
    storage.write_bytes(storage.join(uri, "c"), b"x")
    assert (tmp_path / "a b" / "c").read_bytes() == b"x"
    assert storage.list_files(uri) == [str(tmp_path / "a b" / "c")]


def test_joining() -> None:
    assert storage.join("s3://b/a/", "/c/", "", "d.json") == "s3://b/a/c/d.json"
    assert storage.join("/", "a") == "/a"
    assert storage.join("a") == "a"
    with pytest.raises(ValueError, match="not below"):
        storage.relative("s3://b/ab", "s3://b/a")


def test_forked_processes_and_pickles_reach_s3(s3: str) -> None:
    uri = storage.join(s3, "x")
    storage.write_bytes(uri, b"from the parent")  # the client exists before the fork
    with get_context("fork").Pool(1) as pool:
        assert pool.apply(storage.read_bytes, (uri,)) == b"from the parent"
    assert pickle.loads(pickle.dumps(storage.read_bytes))(uri) == b"from the parent"
