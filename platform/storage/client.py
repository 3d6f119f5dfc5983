"""The S3 client: boto3, with endpoint, region and credentials from the standard AWS variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, ...), so MinIO, Ceph and R2 work."""

from __future__ import annotations

import functools
import os
from typing import Any

THREADS = 8
_ATTEMPTS = 8  # of one request, with botocore's exponential back-off (about a minute); AWS_MAX_ATTEMPTS overrides
_READ_TIMEOUT = 60  # seconds without a byte, after which a request is made again


def s3_client(attempts: int | None = None) -> Any:
    """The S3 client of this process and these AWS settings (clients may be shared by threads, never by forks)."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client_for(os.getpid(), settings, attempts or max_attempts())


@functools.lru_cache(maxsize=8)
def _client_for(process: int, settings: tuple[tuple[str, str], ...], attempts: int) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=10,
        read_timeout=_READ_TIMEOUT,
        max_pool_connections=4 * THREADS,
        # boto3's newer default checksums are refused by several S3-compatible stores; manifests carry sha256.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


def max_attempts() -> int:
    return int(os.environ.get("AWS_MAX_ATTEMPTS", _ATTEMPTS))


def endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
