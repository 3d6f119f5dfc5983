"""Exceptions of boto3 and of the file system, translated into a StorageError that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from calumma.platform.storage import filesystems
from calumma.platform.storage.client import endpoint, s3_client
from calumma.platform.storage.uri import BrokenRead, NotFound, StorageError, bucket_and_key, is_foreign, is_remote


@contextmanager
def translated_errors(uri: str, action: str) -> Iterator[None]:
    """Turn whatever goes wrong while doing `action` to `uri` into a StorageError that says what to do."""
    try:
        yield
    except (StorageError, BrokenRead):
        raise
    except Exception as error:
        if is_foreign(uri):
            translated = filesystems.translate_error(uri, action, error)
        elif is_remote(uri):
            translated = translate_s3_error(uri, action, error)
        else:
            translated = translate_local_error(uri, action, error)
        if translated is None:
            raise
        raise translated from error


def translate_local_error(uri: str, action: str, error: Exception) -> StorageError | None:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(f"cannot {action} {uri}: there is no such file or folder")
    if isinstance(error, PermissionError):
        return StorageError(f"cannot {action} {uri}: permission denied; check who owns the folder")
    return StorageError(f"cannot {action} {uri}: {error.strerror or error}") if isinstance(error, OSError) else None


def translate_s3_error(uri: str, action: str, raised: Exception) -> StorageError | None:
    from botocore import exceptions as e

    chain = (raised, raised.__cause__, raised.__context__)  # boto3's transfers and smart_open wrap botocore's errors
    error = next((x for x in chain if isinstance(x, e.ClientError | e.BotoCoreError)), None)
    failure = f"cannot {action} {uri} at {endpoint()}"
    if error is None:
        return StorageError(f"{failure}: {raised}") if isinstance(raised, OSError) else None
    if isinstance(error, e.NoCredentialsError | e.PartialCredentialsError):
        return StorageError(
            f"{failure}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, e.ConnectionError | e.HTTPClientError):
        return StorageError(
            f"{failure}: the endpoint does not answer; check AWS_ENDPOINT_URL and the network ({error})"
        )
    if not isinstance(error, e.ClientError):
        return StorageError(f"{failure}: {error}")
    bucket, _ = bucket_and_key(uri)
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code == "NoSuchBucket" or (code == "404" and not _bucket_exists(bucket)):
        return StorageError(f"{failure}: bucket {bucket!r} does not exist; create it or correct the URI")
    if code in ("NoSuchKey", "404"):
        return NotFound(f"{failure}: there is no such object")
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return StorageError(
            f"{failure}: the credentials are not valid ({code}); check AWS_ACCESS_KEY_ID and its secret"
        )
    if code in ("AccessDenied", "403"):
        return StorageError(
            f"{failure}: access denied; these credentials need list, read and write rights to {bucket!r}"
        )
    return StorageError(f"{failure}: {error}")


def _bucket_exists(bucket: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return str(error.response.get("Error", {}).get("Code", "")) not in ("404", "NoSuchBucket")
    except BotoCoreError:  # unknown; the failure that led here is the one to tell
        return True
    return True
