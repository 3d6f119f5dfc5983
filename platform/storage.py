"""Object storage: one set of functions over `s3://bucket/key` URIs and local paths (plain or `file://`).

S3 goes through boto3; endpoint, region and credentials come from the standard AWS variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, ...), so MinIO, Ceph and R2 work. A file appears whole or not at all; directories are published by
their `manifest.json`, which copies write last and deletions remove first. Every failure is a StorageError.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

MANIFEST = "manifest.json"
_THREADS = 8
_ATTEMPTS = 8  # of one request, with botocore's exponential back-off (about a minute); AWS_MAX_ATTEMPTS overrides
_READ_TIMEOUT = 60  # seconds without a byte, after which a request is made again
# What passes, of the codes of errors. Ranges are tried again by urllib3's Retry: botocore's own attempts end where a
# body begins, and after a hundred in one process.
_PASSING = {"429", "500", "502", "503", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}

Check = Callable[[bytes], str | None]


class StorageError(OSError):
    """Storage could not do what was asked. The message names the URI, what happened and what to do."""


class NotFound(StorageError):
    """There is nothing at the URI."""


class Damaged(StorageError):
    """Something was read that is not what it should be, however often it was read."""


class _Broken(Exception):
    """An attempt to read that failed in a way that another may not."""


def is_remote(uri: str) -> bool:
    """Whether the URI is in S3. Raises StorageError on a scheme we do not know."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return False
    if scheme == "s3":
        return True
    raise StorageError(f"{uri}: storage {scheme}:// is not known; use s3://bucket/key or a local path")


def join(uri: str, *parts: str) -> str:
    """The URI of something below another: join("s3://b/a/", "c", "d.json") is "s3://b/a/c/d.json"."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts if part.strip("/"))])


def relative(uri: str, base: str) -> str:
    """The path of `uri` below `base`, the inverse of join. Raises ValueError when it is not below."""
    if is_remote(uri) != is_remote(base):
        raise ValueError(f"{uri} is not below {base}")
    if not is_remote(uri):
        return local_path(uri).relative_to(local_path(base)).as_posix()
    prefix = base.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise ValueError(f"{uri} is not below {base}")
    return uri[len(prefix) :]


def local_path(uri: str) -> Path:
    """The Path of a local URI."""
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    return Path(uri).expanduser()


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: names no bucket; write s3://bucket/key")
    return bucket, key.strip("/")


def _client(attempts: int | None = None) -> Any:
    """The S3 client of this process and these AWS settings (clients may be shared by threads, never by forks)."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client_for(os.getpid(), settings, attempts or _attempts())


@functools.lru_cache(maxsize=8)
def _client_for(process: int, settings: tuple[tuple[str, str], ...], attempts: int) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=10,
        read_timeout=_READ_TIMEOUT,
        max_pool_connections=4 * _THREADS,
        # boto3's newer default checksums are refused by several S3-compatible stores; manifests carry sha256.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


def _attempts() -> int:
    return int(os.environ.get("AWS_MAX_ATTEMPTS", _ATTEMPTS))


@contextmanager
def _explained(uri: str, action: str) -> Iterator[None]:
    """Turn whatever goes wrong while doing `action` to `uri` into a StorageError that says what to do."""
    try:
        yield
    except (StorageError, _Broken):
        raise
    except Exception as error:
        explained = _explain_s3(uri, action, error) if is_remote(uri) else _explain_local(uri, action, error)
        if explained is None:
            raise
        raise explained from error


def _explain_local(uri: str, action: str, error: Exception) -> StorageError | None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(f"cannot {action} {uri}: there is no such file or folder")
    if isinstance(error, PermissionError):
        return StorageError(f"cannot {action} {uri}: permission denied; check who owns the folder")
    return StorageError(f"cannot {action} {uri}: {error.strerror or error}") if isinstance(error, OSError) else None


def _explain_s3(uri: str, action: str, raised: Exception) -> StorageError | None:
    from botocore import exceptions as e

    chain = (raised, raised.__cause__, raised.__context__)  # boto3's transfers and smart_open wrap botocore's errors
    error = next((x for x in chain if isinstance(x, e.ClientError | e.BotoCoreError)), None)
    said = f"cannot {action} {uri} at {_endpoint()}"
    if error is None:
        return StorageError(f"{said}: {raised}") if isinstance(raised, OSError) else None
    if isinstance(error, e.NoCredentialsError | e.PartialCredentialsError):
        return StorageError(f"{said}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, e.ConnectionError | e.HTTPClientError):
        return StorageError(f"{said}: the endpoint does not answer; check AWS_ENDPOINT_URL and the network ({error})")
    if not isinstance(error, e.ClientError):
        return StorageError(f"{said}: {error}")
    bucket, _ = _bucket_and_key(uri)
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code == "NoSuchBucket" or (code == "404" and not _bucket_exists(bucket)):
        return StorageError(f"{said}: bucket {bucket!r} does not exist; create it or correct the URI")
    if code in ("NoSuchKey", "404"):
        return NotFound(f"{said}: there is no such object")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return StorageError(f"{said}: the credentials are not valid ({code}); check AWS_ACCESS_KEY_ID and its secret")
    if code in ("AccessDenied", "403"):
        return StorageError(f"{said}: access denied; these credentials need list, read and write rights to {bucket!r}")
    return StorageError(f"{said}: {error}")


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"


def _bucket_exists(bucket: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        _client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return str(error.response.get("Error", {}).get("Code", "")) not in ("404", "NoSuchBucket")
    except BotoCoreError:  # unknown; the failure that led here is the one to tell
        return True
    return True


def sizes(prefix: str) -> dict[str, int]:
    """Full URI -> bytes of every file below a folder, or of the one file named; empty when there is none.

    Unfinished temporary files are not files. Raises StorageError.
    """
    with _explained(prefix, "list"):
        return dict(_remote_sizes(prefix)) if is_remote(prefix) else dict(_local_sizes(local_path(prefix)))


def list_files(prefix: str) -> list[str]:
    """Full URIs of all files below a folder (or of the one file named), sorted. Raises StorageError."""
    return sorted(sizes(prefix))


def exists(uri: str) -> bool:
    """Whether a file, or a folder with something in it, is there. Raises StorageError."""
    with _explained(uri, "look for"):
        if not is_remote(uri):
            return local_path(uri).exists()
        return next(_remote_sizes(uri), None) is not None


def _local_sizes(path: Path) -> Iterator[tuple[str, int]]:
    if path.is_file():
        yield str(path), path.stat().st_size
        return
    for folder, _, names in os.walk(path):
        for name in names:
            if not (name.startswith(".") and name.endswith(".tmp")):  # see _replace
                file = Path(folder, name)
                with suppress(FileNotFoundError):  # deleted since it was listed
                    yield str(file), file.stat().st_size


def _remote_sizes(uri: str) -> Iterator[tuple[str, int]]:
    from botocore.exceptions import ClientError

    bucket, key = _bucket_and_key(uri)
    pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/" if key else "")
    found = False
    for page in pages:
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):  # markers of empty folders
                found = True
                yield f"s3://{bucket}/{item['Key']}", item["Size"]
    if key and not found:
        try:
            yield f"s3://{bucket}/{key}", _client().head_object(Bucket=bucket, Key=key)["ContentLength"]
        except ClientError as error:
            if str(error.response.get("Error", {}).get("Code", "")) not in ("404", "NoSuchKey"):
                raise


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises StorageError, NotFound."""
    content = io.BytesIO()
    copy_to(uri, content)
    return content.getvalue()


def read_range(uri: str, offset: int, length: int, check: Check | None = None) -> bytes:
    """`length` bytes from `offset` of a file, in one request.

    `check` says what is wrong with them, or None. Requests that fail in passing, answers that break off or are short,
    and what fails the check are tried again, with back-off and jitter. Raises StorageError, NotFound, and Damaged when
    it fails the check to the last.
    """
    if not is_remote(uri):
        return _checked(uri, lambda: _local_range(uri, offset, length), check, attempts=2)
    return _checked(uri, lambda: _remote_range(uri, offset, length), check, _attempts())


def _checked(uri: str, read: Callable[[], bytes], check: Check | None, attempts: int) -> bytes:
    from urllib3.exceptions import MaxRetryError
    from urllib3.util import Retry

    # Also of what is no HTTP: it counts, and knows how long to wait.
    policy = Retry(attempts - 1, backoff_factor=0.5, backoff_jitter=1.0, backoff_max=20.0)
    while True:
        failure: StorageError
        try:
            data = read()
        except _Broken as error:
            failure = StorageError(f"cannot read {uri}: {error}, at the last of {attempts} attempts")
        else:
            wrong = check(data) if check else None
            if wrong is None:
                return data
            failure = Damaged(f"{uri}: {wrong}, however often it is read")
        try:
            policy = policy.increment(error=failure)
        except MaxRetryError:
            raise failure from None
        policy.sleep()


def _local_range(uri: str, offset: int, length: int) -> bytes:
    with _explained(uri, "read"), local_path(uri).open("rb", buffering=0) as file:
        file.seek(offset)
        data = file.read(length)
        while len(data) < length and (more := file.read(length - len(data))):
            data += more
    if len(data) < length:
        raise _Broken(f"it ends {length - len(data):,} bytes before byte {offset + length:,}")
    return data


def _remote_range(uri: str, offset: int, length: int) -> bytes:
    """One attempt. Raises _Broken, and StorageError for what no other attempt would change."""
    from botocore import exceptions as e

    bucket, key = _bucket_and_key(uri)
    with _explained(uri, "read"):
        try:
            client = _client(attempts=1)
            body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-{offset + length - 1}")["Body"]
            try:
                data: bytes = body.read(length + 1)
            finally:
                body.close()
        except e.ClientError as error:
            if str(error.response.get("Error", {}).get("Code", "")) in _PASSING:
                raise _Broken(str(error)) from error
            raise
        except (e.ConnectionError, e.HTTPClientError, e.IncompleteReadError, OSError) as error:
            raise _Broken(f"{_endpoint()} does not answer, or not to the end ({error})") from error
    if len(data) != length:
        raise _Broken(f"{len(data):,} bytes came where {length:,} were asked for")
    return data


def size(uri: str) -> int:
    """Bytes of a file. Raises StorageError, NotFound."""
    with _explained(uri, "look for"):
        if not is_remote(uri):
            return local_path(uri).stat().st_size
        bucket, key = _bucket_and_key(uri)
        return int(_client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def copy_to(uri: str, file: BinaryIO) -> None:
    """Copy a file's content into an open one. Raises StorageError, NotFound."""
    with _explained(uri, "read"):
        if is_remote(uri):
            bucket, key = _bucket_and_key(uri)
            _client().download_fileobj(bucket, key, file)  # in parts, and again from where a connection broke
            return
        with local_path(uri).open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file; readers see the old content or the new, never a part. Raises StorageError."""
    with _explained(uri, "write"):
        if not is_remote(uri):
            _replace(local_path(uri), lambda file: file.write(data))
            return
        bucket, key = _bucket_and_key(uri)
        _client().put_object(Bucket=bucket, Key=key, Body=data)


def open_read(uri: str, buffer: int = 4 << 20) -> io.BufferedIOBase:
    """A seekable binary file; S3 objects are read `buffer` bytes a request. Raises StorageError, NotFound."""
    with _explained(uri, "read"):
        if not is_remote(uri):
            return local_path(uri).open("rb")
        bucket, key = _bucket_and_key(uri)
        client = _client()
        client.head_object(Bucket=bucket, Key=key)
        return _reader()(bucket, key, client=client, defer_seek=True, buffer_size=buffer, range_chunk_size=buffer)


@functools.cache
def _reader() -> Callable[..., io.BufferedIOBase]:
    """smart_open's reader of S3 objects, with our errors."""
    from smart_open.s3 import Reader

    class ExplainingReader(Reader):
        @property
        def uri(self) -> str:
            return f"s3://{self._bucket}/{self._key}"

        def read(self, size: int | None = -1) -> bytes:
            with _explained(self.uri, "read"):
                return super().read(size)

        def readline(self, limit: int | None = -1) -> bytes:
            with _explained(self.uri, "read"):
                return super().readline(limit)

        def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
            with _explained(self.uri, "read"):
                return super().seek(offset, whence)

    return ExplainingReader


def _replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a local file under a temporary name beside it, flush it to the disk, and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some network file systems cannot flush a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def upload(local_dir: str | Path, uri: str) -> None:
    """Copy a local folder (or one file) to a URI, its manifests last. Raises StorageError, NotFound."""
    source = Path(local_dir)
    if source.is_file():
        _upload_file(source, uri)
        return
    files = {relative(file, str(source)): Path(file) for file in list_files(str(source))}
    if not files:
        raise NotFound(f"cannot upload {source} to {uri}: the folder is missing or empty")
    _in_order(files, lambda name: _upload_file(files[name], join(uri, name)))


def download(uri_dir: str, local_dir: str | Path) -> None:
    """Copy everything below a URI into a local folder, manifests last. Raises StorageError, NotFound."""
    target = Path(local_dir)
    files = {file: relative(file, uri_dir) for file in list_files(uri_dir) if file.rstrip("/") != uri_dir.rstrip("/")}
    if not files:
        raise NotFound(f"cannot download {uri_dir}: there is nothing below it")
    for name in files.values():
        if ".." in Path(name).parts:
            raise StorageError(f"cannot download {uri_dir}: the name {name!r} leads out of the folder")
    _in_order(files, lambda file: _download_file(file, target / files[file]))


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
    if is_remote(uri):
        if not _bucket_and_key(uri)[1]:
            raise StorageError(f"{uri}: refusing to delete a whole bucket; name a key below it")
    elif local_path(uri).resolve() in (Path("/"), Path.home(), Path.cwd()):
        raise StorageError(f"{uri}: refusing to delete the root, home or working folder")
    files = list_files(uri)
    with _explained(uri, "delete"):
        _in_order(files, _delete_file, manifests_first=True)
        if not is_remote(uri) and local_path(uri).is_dir():
            shutil.rmtree(local_path(uri))


def check(uri: str) -> None:
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


def _in_order(files: Iterable[str], work: Callable[[str], object], manifests_first: bool = False) -> None:
    """Do `work` on every file, several at a time, all manifests after (or before) the rest, the outermost last."""
    manifests = sorted((file for file in files if file.rsplit("/", 1)[-1] == MANIFEST), key=lambda f: -f.count("/"))
    others = [file for file in files if file.rsplit("/", 1)[-1] != MANIFEST]
    if manifests_first:
        for manifest in reversed(manifests):
            work(manifest)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(work, others):
            pass
    if not manifests_first:
        for manifest in manifests:
            work(manifest)


def _upload_file(file: Path, uri: str) -> None:
    with _explained(uri, "write"):
        if not is_remote(uri):
            with file.open("rb") as source:
                _replace(local_path(uri), lambda target: shutil.copyfileobj(source, target, 1 << 20))
            return
        bucket, key = _bucket_and_key(uri)
        _client().upload_file(str(file), bucket, key)  # large files in parts; they become visible together


def _download_file(uri: str, file: Path) -> None:
    with _explained(uri, "read"):
        _replace(file, lambda target: copy_to(uri, target))


def _delete_file(uri: str) -> None:
    # One request an object: deleting in bulk needs checksums that not every S3-compatible store accepts.
    with _explained(uri, "delete"):
        if not is_remote(uri):
            local_path(uri).unlink(missing_ok=True)
            return
        bucket, key = _bucket_and_key(uri)
        _client().delete_object(Bucket=bucket, Key=key)
