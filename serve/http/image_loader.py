"""Images as clients send them: as files, in data URLs, or fetched from hosts that the operator allows. They are
decoded in processes of their own (`images.pool`), once: the replicas get pixels.

A fetch never reaches into private networks: the host must be on the list, every address its name resolves to must be
public, the connection goes to the very address that was checked (so DNS cannot answer differently the second time),
and each redirect is checked the same way. No proxy settings and no credentials are used.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, NoReturn
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image as PILImage

from calumma.model.images import from_base64
from calumma.serve.http.images.pool import EncodedImage, ImagePool, ImageRefused
from calumma.serve.http.images.turns import FairThreads
from calumma.serve.http.wire.errors import APIError
from calumma.serve.settings import Limits, RemoteImages
from calumma.serve.shares import Shares

CHUNK = 65536
REDIRECTS = (301, 302, 303, 307, 308)
TOO_MANY = "too_many"  # the code of an error: images in a request
FETCHERS = 8  # images that are fetched at once
AddressCheck = Callable[[str], bool]
LoadedImages = Mapping[str, PILImage.Image | bytes]  # by the request's field


@dataclass(frozen=True)
class ImageSource:
    """A URL or a file, the request's field that holds it, and how it fits into the model's square."""

    data: str | bytes
    param: str
    fit: Literal["crop", "pad"] = "pad"


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet; IPv4 inside of IPv6 counts as what it is."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if found in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast


class ImageLoader:
    """Reads image parts of requests. `public` says which addresses may be fetched from."""

    def __init__(self, limits: Limits, remote: RemoteImages, public: AddressCheck = is_public) -> None:
        self._limits, self._remote, self._public = limits, remote, public
        self._pool = ImagePool(limits.image_processes, limits.image_seconds, limits.pixels, limits.pixels_in_all)
        self._fetchers = FairThreads(FETCHERS, "fetching images")
        self._waiting = Shares(limits.images_waiting)

    async def load(self, parts: Sequence[ImageSource], resolution: int | None, tenant: str = "") -> LoadedImages:
        """The images of a request by their fields, in the model's square of `resolution` pixels; where that is not
        known, the files, proven to be images by decoding them. Raises APIError."""
        if not parts:
            return {}
        if len(parts) > self._limits.images:
            raise APIError(
                f"the prompt has {len(parts)} images; this server takes {self._limits.images}",
                param=parts[0].param.partition("[")[0],
                code=TOO_MANY,
            )
        if self._waiting.full(tenant, len(parts)):
            raise APIError(
                f"{self._limits.images_waiting} images wait to be decoded, as many as may; try again shortly",
                status=429,
                code="overloaded",
            )
        self._waiting.take(tenant, len(parts))
        try:
            encoded = await asyncio.gather(*(self._encoded(part, tenant) for part in parts))
            images = await self._pool.squares(encoded, resolution, tenant)
        except ImageRefused as error:
            if error.code is None:
                raise APIError(str(error), status=503) from error
            raise APIError(str(error), param=parts[error.index].param, code=error.code) from error
        finally:
            self._waiting.give_back(tenant, len(parts))
        found: Sequence[PILImage.Image | bytes] = images if resolution is not None else [*map(_file, encoded)]
        return {part.param: image for part, image in zip(parts, found, strict=True)}

    def close(self) -> None:
        self._pool.close()
        self._fetchers.close()

    async def _encoded(self, part: ImageSource, tenant: str) -> EncodedImage:
        if isinstance(part.data, bytes):
            return EncodedImage(part.data, part.fit)
        if part.data[:8].lower().startswith(("http://", "https://")):
            fetch = partial(self._fetch, part.data, part.param)
            return EncodedImage(await self._fetchers.run(tenant, fetch), part.fit)
        return EncodedImage(_base64_of(part.data, part.param), part.fit)

    # ---- images by URL

    def _fetch(self, url: str, param: str) -> bytes:
        if not self._remote.hosts:
            raise APIError(
                "remote images are not fetched; send the image itself as a data URL: data:image/png;base64,…",
                param=param,
                code="remote_image_url",
            )

        def refuse(why: str) -> NoReturn:
            raise APIError(f"the image at {url[:200]} was not fetched: {why}", param=param, code="remote_image_url")

        end = time.monotonic() + self._remote.seconds
        here = url
        for _ in range(self._remote.redirects + 1):
            try:
                found = self._get(here, end)
            except _FetchRefused as error:
                refuse(str(error))
            except (OSError, http.client.HTTPException, ValueError) as error:
                refuse(f"{type(error).__name__}: {error}")
            if isinstance(found, bytes):
                return found
            here = urljoin(here, found)
        refuse(f"more than {self._remote.redirects} redirects")

    def _get(self, url: str, end: float) -> bytes | str:
        """The body at a URL, or where it redirects to."""
        parts = urlsplit(url)
        address, port = self._address(parts)
        left = max(0.001, end - time.monotonic())
        connection = _PinnedConnection(parts, address, port, left)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "calumma", "Accept": "image/*"})
            reply = connection.getresponse()
            if reply.status in REDIRECTS and (location := reply.getheader("Location")):
                return location
            if reply.status != 200:
                raise _FetchRefused(f"the server answered with status {reply.status}")
            return self._body(reply, end)
        finally:
            connection.close()

    def _body(self, reply: http.client.HTTPResponse, end: float) -> bytes:
        limit = int(self._remote.mebibytes * 2**20)
        data = bytearray()
        while chunk := reply.read1(CHUNK):
            data += chunk
            if len(data) > limit:
                raise _FetchRefused(f"it is larger than {self._remote.mebibytes:g} MiB")
            if time.monotonic() > end:
                raise _FetchRefused(f"it was not there after {self._remote.seconds:g} s")
        return bytes(data)

    def _address(self, parts: SplitResult) -> tuple[str, int]:
        """The checked address to connect to. Raises _FetchRefused; OSError when the name has none."""
        host = (parts.hostname or "").rstrip(".")
        if parts.scheme not in ("http", "https") or parts.username or parts.password or not host:
            raise _FetchRefused("only plain http and https URLs are fetched")
        if not any(fnmatchcase(host, allowed.lower()) for allowed in self._remote.hosts):
            raise _FetchRefused(f"{host} is not among the hosts that this server fetches from")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not found or not all(self._public(address) for address in found):
            raise _FetchRefused(f"{host} does not lead to a public address")
        return found[0], port


class _FetchRefused(Exception):
    """An image that is not fetched; the message says why."""


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to one address, whatever the name resolves to by now; TLS still proves the name."""

    def __init__(self, parts: SplitResult, address: str, port: int, seconds: float) -> None:
        super().__init__(parts.hostname or "", parts.port, timeout=seconds)
        self._scheme, self._pinned = parts.scheme, (address, port)
        if parts.scheme == "https":
            self.default_port = 443

    def connect(self) -> None:
        plain = socket.create_connection(self._pinned, self.timeout)
        context = ssl.create_default_context() if self._scheme == "https" else None
        self.sock = plain if context is None else context.wrap_socket(plain, server_hostname=self.host)


def _base64_of(url: str, param: str) -> str:
    """What stands in a base64 data URL. Raises APIError."""
    header, comma, payload = url.partition(",")
    header = "".join(header.split()).lower()
    if not header.startswith("data:") or not comma:
        raise APIError(
            "not a data URL; it must look like data:image/png;base64,…", param=param, code="invalid_image_url"
        )
    if not header.endswith(";base64"):
        raise APIError(f"the data URL must be base64, found {header[:60]!r}", param=param, code="invalid_image_url")
    return payload


def _file(image: EncodedImage) -> bytes:
    return from_base64(image.data.encode()) if isinstance(image.data, str) else image.data
