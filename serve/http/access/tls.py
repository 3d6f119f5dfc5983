"""TLS of a server on this machine: its files, and how its own commands talk with it."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests


def require_certificate(certificate: str, key: str) -> None:
    """Raises ValueError, OSError when a server could not use the files."""
    for file in (certificate, key):
        Path(file).read_bytes()  # whose error names the file
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{certificate} and {key} are no certificate and its key in PEM files: {error}") from error


def _no_password() -> str:
    raise ValueError("the key has a password; the server cannot ask for it")


def session_for(certificate: str | None) -> requests.Session:
    """For requests to a server of this machine. It is known by its very certificate, whatever name that is made for and
    whoever has signed it; without one it speaks plain HTTP. Raises OSError, ValueError on a file without one."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    session.trust_env = False  # no proxies on the way to this machine, and no other authorities
    if certificate is None:
        return session
    pem = Path(certificate).read_text()
    end = "-----END CERTIFICATE-----"
    own = pem[pem.index("-----BEGIN CERTIFICATE-----") : pem.index(end) + len(end)]  # the server's comes first
    fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(own)).hexdigest()

    class Pinned(HTTPAdapter):
        def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
            super().init_poolmanager(*arguments, **options, assert_fingerprint=fingerprint)

    session.verify = False  # by authorities
    session.mount("https://", Pinned())
    return session
