"""Single files over all kinds of storage: list, read, write. A file appears whole or not at all."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from typing import BinaryIO

from calumma.platform.storage import filesystems
from calumma.platform.storage.client import max_attempts, s3_client
from calumma.platform.storage.error_translation import translated_errors
from calumma.platform.storage.local import create_file, local_age, local_range, local_sizes, replace_file
from calumma.platform.storage.s3 import (
    beginning,
    create_object,
    object_age,
    object_reader,
    remote_range,
    remote_sizes,
)
from calumma.platform.storage.uri import (
    BrokenRead,
    Damaged,
    StorageError,
    bucket_and_key,
    is_foreign,
    is_remote,
    local_path,
    refuse_to_write,
)

ContentCheck = Callable[[bytes], str | None]


def sizes(prefix: str) -> dict[str, int]:
    """Full URI -> bytes of every file below a folder, or of the one file named; empty when there is none.

    Unfinished temporary files are not files. Raises StorageError.
    """
    with translated_errors(prefix, "list"):
        if is_foreign(prefix):
            return dict(filesystems.sizes(prefix))
        return dict(remote_sizes(prefix)) if is_remote(prefix) else dict(local_sizes(local_path(prefix)))


def list_files(prefix: str) -> list[str]:
    """Full URIs of all files below a folder (or of the one file named), sorted. Raises StorageError."""
    return sorted(sizes(prefix))


def exists(uri: str) -> bool:
    """Whether a file, or a folder with something in it, is there. Raises StorageError."""
    with translated_errors(uri, "look for"):
        if not is_remote(uri):
            return local_path(uri).exists()
        if is_foreign(uri):
            return next(filesystems.sizes(uri), None) is not None
        return next(remote_sizes(uri), None) is not None


def files_beside(uri: str, suffixes: Sequence[str]) -> list[str]:
    """Of the names that a URI and one of the suffixes (in lower or upper case) make, those of files, in this order;
    in S3 by one request. Raises StorageError."""
    wanted = [uri + case for suffix in suffixes for case in dict.fromkeys((suffix, suffix.upper()))]
    with translated_errors(uri, "look for"):
        if not is_remote(uri):
            return [name for name in wanted if local_path(name).is_file()]
        if is_foreign(uri):
            return [name for name in wanted if exists(name)]
        there = beginning(f"{uri}.")
        return [name for name in wanted if name in there]


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises StorageError, NotFound."""
    content = io.BytesIO()
    copy_to(uri, content)
    return content.getvalue()


def read_range(uri: str, offset: int, length: int, check: ContentCheck | None = None) -> bytes:
    """`length` bytes from `offset` of a file, in one request.

    `check` says what is wrong with them, or None. Requests that fail in passing, answers that break off or are short,
    and what fails the check are tried again, with back-off and jitter. Raises StorageError, NotFound, and Damaged when
    it fails the check to the last.
    """
    if not is_remote(uri):
        return _read_with_retries(uri, lambda: local_range(uri, offset, length), check, attempts=2)
    if is_foreign(uri):
        with translated_errors(uri, "read"):
            return _read_with_retries(uri, lambda: filesystems.read_range(uri, offset, length), check, max_attempts())
    return _read_with_retries(uri, lambda: remote_range(uri, offset, length), check, max_attempts())


def _read_with_retries(uri: str, read: Callable[[], bytes], check: ContentCheck | None, attempts: int) -> bytes:
    from urllib3.exceptions import MaxRetryError
    from urllib3.util import Retry

    # Also of what is no HTTP: it counts, and knows how long to wait.
    policy = Retry(attempts - 1, backoff_factor=0.5, backoff_jitter=1.0, backoff_max=20.0)
    while True:
        failure: StorageError
        try:
            data = read()
        except BrokenRead as error:
            failure = StorageError(f"cannot read {uri}: {error}, at the last of {attempts} attempts")
        else:
            problem = check(data) if check else None
            if problem is None:
                return data
            failure = Damaged(f"{uri}: {problem}, however often it is read")
        try:
            policy = policy.increment(error=failure)
        except MaxRetryError:
            raise failure from None
        policy.sleep()


def size(uri: str) -> int:
    """Bytes of a file. Raises StorageError, NotFound."""
    with translated_errors(uri, "look for"):
        if not is_remote(uri):
            return local_path(uri).stat().st_size
        if is_foreign(uri):
            return filesystems.size(uri)
        bucket, key = bucket_and_key(uri)
        return int(s3_client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def copy_to(uri: str, file: BinaryIO) -> None:
    """Copy a file's content into an open one. Raises StorageError, NotFound."""
    with translated_errors(uri, "read"):
        if is_foreign(uri):
            with filesystems.open_file(uri, 4 << 20) as content:
                shutil.copyfileobj(content, file, 1 << 20)
            return
        if is_remote(uri):
            bucket, key = bucket_and_key(uri)
            s3_client().download_fileobj(bucket, key, file)  # in parts, and again from where a connection broke
            return
        with local_path(uri).open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file; readers see the old content or the new, never a part. Raises StorageError."""
    refuse_to_write(uri, "write")
    with translated_errors(uri, "write"):
        if not is_remote(uri):
            replace_file(local_path(uri), lambda file: file.write(data))
            return
        if is_foreign(uri):
            filesystems.write(uri, io.BytesIO(data))
            return
        bucket, key = bucket_and_key(uri)
        s3_client().put_object(Bucket=bucket, Key=key, Body=data)


def create(uri: str, data: bytes) -> bool:
    """Write a whole file where there is none; whether it was: of several at once one alone does. Raises StorageError.

    On S3 a conditional write (`If-None-Match: *`), on a file system a hard link; Arrow's file systems have neither, and
    of two at the same moment both may believe it there, with the content of one.
    """
    refuse_to_write(uri, "write")
    with translated_errors(uri, "write"):
        if not is_remote(uri):
            return create_file(local_path(uri), data)
        if is_foreign(uri):
            if next(filesystems.sizes(uri), None) is not None:
                return False
            filesystems.write(uri, io.BytesIO(data))
            return True
        return create_object(uri, data)


def age(uri: str) -> float:
    """Seconds since a file was written, by the clock of its storage alone (by this machine's, too, on Google's and
    Azure's). Raises StorageError, NotFound."""
    with translated_errors(uri, "look for"):
        if not is_remote(uri):
            return local_age(local_path(uri))
        if is_foreign(uri):
            return filesystems.age(uri)
        return object_age(uri)


def open_read(uri: str, buffer: int = 4 << 20) -> io.BufferedIOBase:
    """A seekable binary file; S3 objects are read `buffer` bytes a request. Raises StorageError, NotFound."""
    with translated_errors(uri, "read"):
        if not is_remote(uri):
            return local_path(uri).open("rb")
        if is_foreign(uri):
            return filesystems.open_file(uri, buffer)
        bucket, key = bucket_and_key(uri)
        client = s3_client()
        client.head_object(Bucket=bucket, Key=key)
        return object_reader()(bucket, key, client=client, defer_seek=True, buffer_size=buffer, range_chunk_size=buffer)
