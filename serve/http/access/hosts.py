"""Under which names the server answers. A page of another site can have its own name point to 127.0.0.1 and then talk
to what listens there as if it were that site (DNS rebinding); its requests still carry that name in their Host header.
A form on such a page can post without asking first, too: what forms send must come from an origin that is allowed.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import Scope

from calumma.serve.http.wire.errors import APIError
from calumma.serve.settings import is_loopback

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+(%[\w.-]+)?\]|[a-z0-9._-]+)(?P<port>:\d{0,5})?$")
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded", "text/plain")  # what HTML forms can send
FORM_METHODS = ("POST",)


class HostRules(Protocol):
    """What is checked, as a server's settings say it."""

    @property
    def host(self) -> str: ...
    @property
    def allowed_hosts(self) -> tuple[str, ...]: ...
    @property
    def allowed_origins(self) -> tuple[str, ...]: ...
    @property
    def keys_needed(self) -> bool: ...


@dataclass(frozen=True)
class HostSettings:
    """Those rules by themselves. `host`: where the server listens."""

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    keys_needed: bool = False


class HostCheck:
    """Names of this machine, the address itself that a client reached, and those of the settings are answered; where
    the server can be reached from elsewhere and its settings name none, all are."""

    def __init__(self, settings: HostRules) -> None:
        named = tuple(name.lower() for name in settings.allowed_hosts)
        self._every = "*" in named or (not named and not is_loopback(settings.host))
        self._names = {name.strip("[]") for name in named if not name.startswith("*.")}
        self._endings = tuple(name[1:] for name in named if name.startswith("*."))
        self._origins = settings.allowed_origins
        self._keys_needed = settings.keys_needed

    def require(self, scope: Scope) -> None:
        """Raises APIError 421 on a name that is not the server's, 400 on none or several, 403 on a form of a page that
        is not allowed."""
        headers = Headers(scope=scope)
        given = headers.getlist("host")
        if not given and scope.get("http_version") in ("1.0", "0.9"):
            return
        found = HOST.match(given[0].strip().lower()) if len(given) == 1 else None
        if found is None:
            raise APIError("the request needs one Host header with the name or address of this server")
        name = found["name"].strip("[]").rstrip(".")
        if not (self._every or self._known(name, scope)):
            raise APIError(
                f"this server is not {name!r}; the settings' allowed_hosts (serve start --allowed-host) says which "
                "other names it has",
                status=421,
                code="host_not_allowed",
            )
        if scope["method"] in FORM_METHODS and not self._keys_needed:
            self._require_own_form(headers, given[0].strip().lower())

    def _known(self, name: str, scope: Scope) -> bool:
        if is_loopback(name) or name in self._names or name.endswith(self._endings):
            return True
        reached = (scope.get("server") or ("", 0))[0]
        return name == reached and _is_address(name)

    def _require_own_form(self, headers: Headers, host: str) -> None:
        origin = headers.get("origin")
        if origin is None or not headers.get("content-type", "").lower().startswith(FORMS):
            return
        if not {origin, "*"} & {*self._origins} and origin.lower().partition("://")[2] != host:
            raise APIError(
                f"pages of {origin!r} may not use this server; the settings' allowed_origins says which may",
                status=403,
                code="origin_not_allowed",
            )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
