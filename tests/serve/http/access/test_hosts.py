"""Who is answered: the server's names, and pages of browsers."""

from __future__ import annotations

import http.client
from typing import Any

import pytest
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.settings import APIKey

from ...conftest import StubBackend, listening
from ..conftest import CHAT, ask, error_of, stub_settings

PAGE = "https://app.example.org"
KEY = (APIKey(name="a", sha256="0" * 64),)


def client_of(url: str = "http://localhost:8000", **fields: Any) -> TestClient:
    return TestClient(create_app(StubBackend(), stub_settings(**{"allowed_hosts": ()} | fields)), base_url=url)


def status(client: TestClient, host: str) -> int:
    return client.get("/v1/models", headers={"Host": host}).status_code


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1:9000", "[::1]:8000", "a.localhost"]
)
def test_a_server_at_a_loopback_address_is_called_by_the_names_of_this_machine(host: str) -> None:
    assert status(client_of(), host) == 200


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", CHAT, "/nowhere"])
@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", "192.168.1.5", "1.0.0.127"]
)
def test_a_name_that_was_made_to_point_here_is_not_answered(path: str, host: str) -> None:
    refused = client_of().request("POST" if path == CHAT else "GET", path, headers={"Host": host})
    assert (refused.status_code, error_of(refused)["code"]) == (421, "host_not_allowed")
    assert "--allowed-host" in error_of(refused)["message"]


@pytest.mark.parametrize("host", ["", "a b", "x/y", "user@localhost", "localhost:80:80", "[::1"])
def test_what_is_no_name_is_refused(host: str) -> None:
    assert error_of(client_of().get("/v1/models", headers={"Host": host}))["message"].startswith("the request needs")


def test_more_than_one_name_is_none() -> None:
    with listening(create_app(StubBackend(), stub_settings())) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.putrequest("GET", "/v1/models")  # with a Host header of its own
        connection.putheader("Host", "evil.example")
        connection.endheaders()
        assert connection.getresponse().status == 400
        connection.close()


def test_further_names_are_given_one_by_one_or_by_their_ending() -> None:
    client = client_of(allowed_hosts=("api.example.org", "*.example.com", "[2001:db8::1]"))
    for host in ("API.example.org:443", "x.example.com", "y.x.example.com", "localhost", "[2001:db8::1]:80"):
        assert status(client, host) == 200, host
    for host in ("example.org", "x.api.example.org", "example.com", "evilexample.com"):
        assert status(client, host) == 421, host


def test_a_server_for_others_has_the_names_that_it_is_given_or_any() -> None:
    assert status(client_of(host="0.0.0.0", open=True), "any.example") == 200
    named = client_of(host="0.0.0.0", keys=KEY, allowed_hosts=("api.example.org",), url="http://10.1.2.3:8000")
    assert status(named, "any.example") == 421
    # 401: the name is one, the key is missing. Probes call the address that they reach.
    assert [status(named, host) for host in ("api.example.org", "10.1.2.3:8000", "10.1.2.4")] == [401, 401, 421]
    assert status(client_of(allowed_hosts=("*",)), "any.example") == 200


def test_pages_of_others_may_not_use_it_unless_they_are_named() -> None:
    closed, named = client_of(), client_of(allowed_origins=(PAGE,))
    wish = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    refused = closed.options(CHAT, headers=wish)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    granted = named.options(CHAT, headers=wish)
    assert granted.status_code == 200
    assert granted.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in granted.headers["access-control-allow-headers"]
    other = named.options(CHAT, headers=wish | {"Origin": "https://evil.example"})
    assert other.status_code == 400
    for client, headers in ((closed, wish), (named, {"Origin": "https://evil.example"})):
        answer = client.post(CHAT, json=ask(), headers=headers)
        assert "access-control-allow-origin" not in answer.headers


def test_a_page_that_is_named_reads_answers_and_refusals_and_its_preflight_needs_no_key() -> None:
    client = client_of(allowed_origins=(PAGE,), keys=KEY)
    wish = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert client.options(CHAT, headers=wish).status_code == 200
    for answer in (client.post(CHAT, json=ask(), headers={"Origin": PAGE}), client.get("/health", headers=wish)):
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-expose-headers"] == "*"


@pytest.mark.parametrize(
    ("fields", "origin", "refused"),
    [
        ({}, "https://evil.example", True),
        ({}, "null", True),
        ({}, "http://localhost:3000", True),
        ({}, "http://localhost:8000", False),
        ({}, None, False),
        ({"allowed_origins": (PAGE,)}, PAGE, False),
        ({"keys": KEY}, "https://evil.example", False),  # a form cannot send a key
    ],
)
def test_a_form_of_another_page_does_not_get_through(fields: Any, origin: str | None, refused: bool) -> None:
    """A browser posts a form without asking first; only the answer is kept from the page."""
    headers = {} if origin is None else {"Origin": origin}
    answer = client_of(**fields).post("/v1/images/edits", files={"image": b"x"}, headers=headers)
    assert (answer.status_code == 403) == refused


@pytest.mark.parametrize(
    ("method", "path", "allow"), [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("PUT", "/", "GET")]
)
def test_a_method_that_a_path_does_not_take_is_told_those_that_it_does(method: str, path: str, allow: str) -> None:
    answer = client_of().request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)
    assert method in error_of(answer)["message"]


def test_all_routes_of_a_path_are_told() -> None:
    app = create_app(StubBackend(), stub_settings())
    app.delete("/v1/models")(lambda: None)
    assert TestClient(app).put("/v1/models").headers["allow"] == "DELETE, GET"
