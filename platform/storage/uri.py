"""URIs: `s3://bucket/key` and local paths (plain or `file://`), and the errors of storage."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

MANIFEST = "manifest.json"
FOREIGN = ("hf", "gs", "az")  # schemes; see filesystems.py
READ_ONLY = ("hf",)  # of those


class StorageError(OSError):
    """Storage could not do what was asked. The message names the URI, what happened and what to do."""


class NotFound(StorageError):
    """There is nothing at the URI."""


class Damaged(StorageError):
    """Something was read that is not what it should be, however often it was read."""


class BrokenRead(Exception):
    """An attempt to read that failed in a way that another may not."""


def is_remote(uri: str) -> bool:
    """Whether the URI is in object storage. Raises StorageError on a scheme we do not know."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return False
    if scheme in ("s3", *FOREIGN):
        return True
    raise StorageError(
        f"{uri}: storage {scheme}:// is not known; use s3://, gs:// or az://bucket/key, or a local path; "
        f"{', '.join(f'{scheme}://' for scheme in READ_ONLY)} is read"
    )


def is_foreign(uri: str) -> bool:
    """Whether the URI is in one of the object storages that are not S3's kind (see filesystems.py)."""
    return uri.partition("://")[0] in FOREIGN


def refuse_to_write(uri: str, action: str) -> None:
    """Raises StorageError for a URI in a storage that is only read."""
    scheme = uri.partition("://")[0]
    if scheme in READ_ONLY:
        raise StorageError(f"cannot {action} {uri}: {scheme}:// is only read; write to s3://bucket/key or a local path")


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


def bucket_and_key(uri: str) -> tuple[str, str]:
    scheme, _, path = uri.partition("://")
    bucket, _, key = path.partition("/")
    if not bucket:
        raise StorageError(f"{uri}: names no bucket; write {scheme}://bucket/key")
    return bucket, key.rstrip("/")  # a key may begin with a slash
