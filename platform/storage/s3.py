"""Objects in S3: listed, read in ranges, opened as seekable files."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime

from calumma.platform.storage.client import endpoint, s3_client
from calumma.platform.storage.error_translation import translated_errors
from calumma.platform.storage.uri import BrokenRead, bucket_and_key

# Codes of errors that pass. Ranges are tried again by urllib3's Retry: botocore's own attempts end where a body begins,
# and after a hundred in one process.
_TRANSIENT = {"429", "500", "502", "503", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"}


def remote_sizes(uri: str) -> Iterator[tuple[str, int]]:
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(uri)
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/" if key else "")
    found = False
    for page in pages:
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):  # markers of empty folders
                found = True
                yield f"s3://{bucket}/{item['Key']}", item["Size"]
    if key and not found:
        try:
            yield f"s3://{bucket}/{key}", s3_client().head_object(Bucket=bucket, Key=key)["ContentLength"]
        except ClientError as error:
            if str(error.response.get("Error", {}).get("Code", "")) not in ("404", "NoSuchKey"):
                raise


def beginning(uri: str) -> set[str]:
    """The objects of one folder whose names begin so."""
    bucket, key = bucket_and_key(uri)
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key, Delimiter="/")
    return {f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ())}


def remote_range(uri: str, offset: int, length: int) -> bytes:
    """One attempt. Raises BrokenRead, and StorageError for what no other attempt would change."""
    from botocore import exceptions as e

    bucket, key = bucket_and_key(uri)
    with translated_errors(uri, "read"):
        try:
            client = s3_client(attempts=1)
            body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-{offset + length - 1}")["Body"]
            try:
                data: bytes = body.read(length + 1)
            finally:
                body.close()
        except e.ClientError as error:
            if str(error.response.get("Error", {}).get("Code", "")) in _TRANSIENT:
                raise BrokenRead(str(error)) from error
            raise
        except (e.ConnectionError, e.HTTPClientError, e.IncompleteReadError, OSError) as error:
            raise BrokenRead(f"{endpoint()} does not answer, or not to the end ({error})") from error
    if len(data) != length:
        raise BrokenRead(f"{len(data):,} bytes came where {length:,} were asked for")
    return data


def create_object(uri: str, data: bytes) -> bool:
    """Write an object where there is none; whether it was."""
    from botocore.exceptions import ClientError

    bucket, key = bucket_and_key(uri)
    try:
        s3_client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        # 409: another conditional write of it is under way.
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
            return False
        raise
    return True


def object_age(uri: str) -> float:
    """Seconds since an object was written, by the server's clock."""
    bucket, key = bucket_and_key(uri)
    found = s3_client().head_object(Bucket=bucket, Key=key)
    now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
    return max(0.0, (now - found["LastModified"]).total_seconds())


@functools.cache
def object_reader() -> Callable[..., io.BufferedIOBase]:
    """smart_open's reader of S3 objects, with our errors."""
    from smart_open.s3 import Reader

    class ExplainingReader(Reader):
        @property
        def uri(self) -> str:
            return f"s3://{self._bucket}/{self._key}"

        def read(self, size: int | None = -1) -> bytes:
            with translated_errors(self.uri, "read"):
                return super().read(size)

        def readline(self, limit: int | None = -1) -> bytes:
            with translated_errors(self.uri, "read"):
                return super().readline(limit)

        def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
            with translated_errors(self.uri, "read"):
                return super().seek(offset, whence)

    return ExplainingReader
