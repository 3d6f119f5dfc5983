"""Folders over both kinds of storage: upload, download, delete. A directory is published by its `manifest.json`, which
copies write last and deletions remove first."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from calumma.platform.storage import filesystems
from calumma.platform.storage.client import THREADS, s3_client
from calumma.platform.storage.error_translation import translated_errors
from calumma.platform.storage.files import copy_to, list_files, read_bytes, write_bytes
from calumma.platform.storage.local import replace_file
from calumma.platform.storage.uri import (
    MANIFEST,
    NotFound,
    StorageError,
    bucket_and_key,
    is_foreign,
    is_remote,
    join,
    local_path,
    refuse_to_write,
    relative,
)


def upload(local_dir: str | Path, uri: str) -> None:
    """Copy a local folder (or one file) to a URI, its manifests last. Raises StorageError, NotFound."""
    source = Path(local_dir)
    if source.is_file():
        _upload_file(source, uri)
        return
    files = {relative(file, str(source)): Path(file) for file in list_files(str(source))}
    if not files:
        raise NotFound(f"cannot upload {source} to {uri}: the folder is missing or empty")
    _for_each_file(files, lambda name: _upload_file(files[name], join(uri, name)))


def download(uri_dir: str, local_dir: str | Path) -> None:
    """Copy everything below a URI into a local folder, manifests last. Raises StorageError, NotFound."""
    target = Path(local_dir)
    files = {file: relative(file, uri_dir) for file in list_files(uri_dir) if file.rstrip("/") != uri_dir.rstrip("/")}
    if not files:
        raise NotFound(f"cannot download {uri_dir}: there is nothing below it")
    for name in files.values():
        if ".." in Path(name).parts or name.startswith("/"):
            raise StorageError(f"cannot download {uri_dir}: the name {name!r} leads out of the folder")
    _for_each_file(files, lambda file: _download_file(file, target / files[file]))


@contextmanager
def local_copy(uri_dir: str) -> Iterator[Path]:
    """The folder as a local path: itself when it is local, else a copy that lives as long as the context."""
    if not is_remote(uri_dir):
        path = local_path(uri_dir)
        if not path.exists():
            raise NotFound(f"cannot read {uri_dir}: there is no such file or folder")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="calumma-") as folder:
        download(uri_dir, folder)
        yield Path(folder)


def delete(uri: str) -> None:
    """Delete a file or everything below a folder, manifests first; nothing there is fine. Raises StorageError."""
    refuse_to_write(uri, "delete")
    if is_remote(uri):
        if not bucket_and_key(uri)[1]:
            raise StorageError(f"{uri}: refusing to delete a whole bucket; name a key below it")
    elif local_path(uri).resolve() in (Path("/"), Path.home(), Path.cwd()):
        raise StorageError(f"{uri}: refusing to delete the root, home or working folder")
    files = list_files(uri)
    with translated_errors(uri, "delete"):
        _for_each_file(files, _delete_file, manifests_first=True)
        if not is_remote(uri) and local_path(uri).is_dir():
            shutil.rmtree(local_path(uri))


def check_writable(uri: str) -> None:
    """Prove that files can be written, read and deleted below a URI. Raises StorageError with the reason."""
    base = uri
    if not is_remote(uri):  # probe the nearest folder there is: a check creates nothing
        folder = local_path(uri).resolve()
        base = str(next(path for path in (folder, *folder.parents) if path.exists()))
    probe = join(base, f".calumma-check-{uuid.uuid4().hex}.tmp")
    write_bytes(probe, b"calumma")
    if read_bytes(probe) != b"calumma":
        raise StorageError(f"{uri}: what was read is not what was written; the storage is not consistent")
    delete(probe)


def _for_each_file(files: Iterable[str], work: Callable[[str], object], manifests_first: bool = False) -> None:
    """Do `work` on every file, several at a time, all manifests after (or before) the rest, the outermost last."""
    manifests = sorted((file for file in files if file.rsplit("/", 1)[-1] == MANIFEST), key=lambda f: -f.count("/"))
    others = [file for file in files if file.rsplit("/", 1)[-1] != MANIFEST]
    if manifests_first:
        for manifest in reversed(manifests):
            work(manifest)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(work, others):
            pass
    if not manifests_first:
        for manifest in manifests:
            work(manifest)


def _upload_file(file: Path, uri: str) -> None:
    refuse_to_write(uri, "write")
    with translated_errors(uri, "write"):
        if not is_remote(uri):
            with file.open("rb") as source:
                replace_file(local_path(uri), lambda target: shutil.copyfileobj(source, target, 1 << 20))
            return
        if is_foreign(uri):
            with file.open("rb") as source:
                filesystems.write(uri, source)
            return
        bucket, key = bucket_and_key(uri)
        s3_client().upload_file(str(file), bucket, key)  # large files in parts; they become visible together


def _download_file(uri: str, file: Path) -> None:
    with translated_errors(uri, "read"):
        replace_file(file, lambda target: copy_to(uri, target))


def _delete_file(uri: str) -> None:
    # One request an object: deleting in bulk needs checksums that not every S3-compatible store accepts.
    with translated_errors(uri, "delete"):
        if not is_remote(uri):
            local_path(uri).unlink(missing_ok=True)
            return
        if is_foreign(uri):
            filesystems.delete(uri)
            return
        bucket, key = bucket_and_key(uri)
        s3_client().delete_object(Bucket=bucket, Key=key)
