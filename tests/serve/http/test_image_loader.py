"""What of the network a request can reach: allowed hosts, public addresses, sizes, redirects."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image as PILImage

from calumma.serve.http import image_loader
from calumma.serve.http.image_loader import ImageLoader, ImageSource, is_public
from calumma.serve.http.wire.errors import APIError
from calumma.serve.settings import Limits, RemoteImages


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe",
    ],
)  # fmt: skip
def test_addresses_of_private_networks_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"])
def test_addresses_of_the_internet_are(address: str) -> None:
    assert is_public(address)


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A web server of this machine with an image, redirects and too much."""
    buffer = io.BytesIO()
    PILImage.new("1", (4, 4)).save(buffer, format="PNG")
    image = buffer.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/to?"):
                self.send_response(302)
                self.send_header("Location", self.path.partition("?")[2])
                self.end_headers()
                return
            body = {"/image.png": image, "/large": b"x" * 3_000_000, "/page": b"<html>"}.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


REMOTE = RemoteImages(hosts=("localhost", "*.example.org"), mebibytes=1)


def reader(remote: RemoteImages = REMOTE, public: Callable[[str], bool] = lambda address: True) -> ImageLoader:
    return ImageLoader(Limits(), remote, public)


def read(pictures: ImageLoader, url: str) -> bytes:
    try:
        found = asyncio.run(pictures.load([ImageSource(url, "here")], None))["here"]
    finally:
        pictures.close()
    assert isinstance(found, bytes)
    return found


def refusal(url: str, pictures: ImageLoader) -> str:
    with pytest.raises(APIError) as error:
        read(pictures, url)
    assert error.value.status == 400
    assert error.value.body["error"]["param"] == "here"
    return str(error.value)


def test_an_allowed_host_is_fetched_from(web: str) -> None:
    data = read(reader(), f"{web}/image.png")
    assert PILImage.open(io.BytesIO(data)).size == (4, 4)
    assert read(reader(), f"{web}/to?{web}/to?/to?/image.png") == data, "as many redirects as are allowed"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nothing", "status 404"),
        ("/large", "larger than 1 MiB"),
        ("/page", "not a readable image"),
        ("/to?http://other.test/image.png", "other.test is not among the hosts"),
        ("/to?file:///etc/passwd", "only plain http and https"),
        ("/to?/to?/to?/to?/image.png", "more than 3 redirects"),
    ],
)
def test_what_an_allowed_host_answers_is_checked(web: str, path: str, says: str) -> None:
    assert says in refusal(f"{web}{path}", reader())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://localhost.evil.test/x", "not among the hosts"),
        ("http://example.org/x", "not among the hosts"),
        ("http://user:pass@localhost/x", "only plain"),
        ("http://[::1]/x", "not among the hosts"),
    ],
)
def test_other_hosts_are_not_asked(url: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_loader.socket, "create_connection", None)
    assert says in refusal(url, reader())


def test_an_allowed_name_that_leads_into_a_private_network_is_not_followed(web: str) -> None:
    assert "does not lead to a public address" in refusal(f"{web}/image.png", reader(public=is_public))


def test_the_connection_goes_to_the_address_that_was_checked(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS that answers with a public address first and a private one then (rebinding) gains nothing."""
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        address = "93.184.215.14" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: Any) -> Any:
        connected.append(address)
        raise OSError("no route")

    monkeypatch.setattr(image_loader.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(image_loader.socket, "create_connection", connect)
    assert "no route" in refusal("http://a.example.org/cat.png", reader(public=is_public))
    assert connected == [("93.184.215.14", 80)]
    assert asked == ["a.example.org"]


def test_one_private_address_among_several_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(image_loader.socket, "getaddrinfo", lambda *_, **__: found)
    assert "does not lead to a public address" in refusal("http://a.example.org/x", reader(public=is_public))


def test_nothing_is_fetched_unless_it_is_switched_on(web: str) -> None:
    assert "remote images are not fetched" in refusal(f"{web}/image.png", reader(RemoteImages()))


def test_the_head_of_a_data_url_may_be_in_capitals(png: bytes) -> None:
    text = base64.b64encode(png).decode()
    for url in f" DATA:image/png;BASE64,{text}", f"data:image/png; base64,{text}", f"data:;base64,{text.rstrip('=')}":
        assert read(reader(), url) == png


def test_a_tenant_with_slow_hosts_does_not_hold_up_the_fetches_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_loader, "FETCHERS", 1)
    reader = ImageLoader(Limits(), RemoteImages(hosts=["host"]))
    order: list[str] = []

    def fetch(url: str, param: str) -> bytes:
        order.append(url)
        raise APIError("nothing there")

    monkeypatch.setattr(reader, "_fetch", fetch)

    async def ask(tenant: str) -> None:
        with pytest.raises(APIError, match="nothing there"):
            await reader.load([ImageSource(f"http://host/{tenant}", "image")], 8, tenant)

    async def main() -> None:
        await asyncio.gather(*map(ask, "aaaaab"))

    try:
        asyncio.run(main())
    finally:
        reader.close()
    assert [url[-1] for url in order[:3]] in (["a", "a", "b"], ["a", "b", "a"])
    assert len(order) == 6
