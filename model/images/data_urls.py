"""Pictures as text, as browsers read it (https://fetch.spec.whatwg.org, "data: URLs")."""

from __future__ import annotations

import base64
from urllib.parse import unquote_to_bytes


def from_base64(text: bytes) -> bytes:
    """What stands behind the comma of a base64 data URL: percent-encoded or not, with white space or without, with
    padding or without. Raises ValueError."""
    plain = b"".join(unquote_to_bytes(text).split())
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
