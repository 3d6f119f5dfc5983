"""Who may ask, for how much, and what of the network a request can reach."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from starlette.testclient import TestClient

from calumma.serve.http import image_loader
from calumma.serve.http.access import api_keys
from calumma.serve.http.access.api_keys import AccessControl, hash_key, load_keys, new_key
from calumma.serve.http.app import create_app
from calumma.serve.http.image_loader import ImageLoader, is_public
from calumma.serve.http.wire.errors import APIError
from calumma.serve.protocol import Finished, Started, TextDelta, TokenCount
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import APIKey, Limits, RemoteImages, ServeSettings

from .conftest import listening

CHAT = "/v1/chat/completions"


def ask(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "modalities": ["text"], "max_tokens": 3, **fields}


def settings(**fields: Any) -> ServeSettings:
    return ServeSettings(model="/models/tiny", name="tiny", **fields)


class Stub:
    """A backend that answers when it is let; `generate` of a replica without an engine."""

    def __init__(self, wait: Callable[[], Any] | None = None) -> None:
        self.wait = wait

    async def generate(self, job: Any) -> Any:
        yield Started(TokenCount(3))
        if self.wait is not None:
            await self.wait()
        yield TextDelta("seven")
        yield Finished("stop", TokenCount(1))

    async def describe(self) -> dict[str, Any]:
        return {"context": 128}

    async def statistics(self) -> dict[str, dict[str, float]]:
        return {"one": {"requests_waiting": 2.0, "text_tokens": 5.0}}

    async def tokenize(self, text: str) -> list[int]:
        return [5]

    async def detokenize(self, ids: list[int]) -> str:
        return "x"


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# ---- keys


@pytest.fixture(scope="module")
def secret() -> str:
    return new_key()


@pytest.fixture
def locked(secret: str) -> Iterator[TestClient]:
    with TestClient(create_app(Stub(), settings(keys=[APIKey(name="alice", sha256=hash_key(secret))]))) as client:
        yield client


def test_who_has_a_key_is_answered(locked: TestClient, secret: str) -> None:
    assert locked.post(CHAT, json=ask(), headers={"Authorization": f"Bearer {secret}"}).status_code == 200


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "Basic eDp5"}])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/images/generations", "/tokenize"])
def test_who_has_none_is_not(locked: TestClient, header: dict[str, str], path: str) -> None:
    response = locked.post(path, json=ask(prompt="x"), headers=header)
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_body_is_not_even_read_for_who_has_no_key(locked: TestClient) -> None:
    assert locked.post(CHAT, content=b"{" * 10_000).status_code == 401


def test_pages_and_probes_need_no_key_and_tell_no_paths(locked: TestClient) -> None:
    for path in ("/", "/health", "/ready", "/metrics"):
        assert locked.get(path).status_code == 200
    assert "/models/tiny" not in locked.get("/health").text
    assert locked.get("/v1/models").status_code == 401


def test_the_openai_client_sees_an_authentication_error(secret: str) -> None:
    with listening(create_app(Stub(), settings(keys=[APIKey(name="a", sha256=hash_key(secret))]))) as url:
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="not one that this server knows"):
            wrong.models.list()
        assert [m.id for m in openai.OpenAI(base_url=f"{url}/v1", api_key=secret).models.list()] == ["tiny"]


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    one, two, three = hash_key(secret), hash_key("two"), hash_key("three")
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n{one} alice 4\n\n{two}\n")
    monkeypatch.setenv(api_keys.VARIABLE, f"{three} carol")
    found = load_keys(file)
    assert [(key.name, key.sha256, key.running) for key in found] == [
        ("alice", one, 4),
        (two[:8], two, None),
        ("carol", three, None),
    ]


@pytest.mark.parametrize("line", ["sk-calumma-abc alice", "alice", "0" * 63, "0" * 64 + " a b c", "0" * 64 + " a 0"])
def test_a_key_that_is_not_given_by_its_hash_is_refused_and_not_repeated(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(f"{'1' * 64} bob\n{line}\n")
    with pytest.raises(ValueError, match="entry 2") as error:
        load_keys(tmp_path / "keys")
    assert line not in str(error.value)


def test_a_file_without_keys_opens_no_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ValueError, match="everybody could use the server"):
        load_keys(tmp_path / "keys")


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.booleans()), max_size=40))
def test_requests_under_way_are_counted_by_key(steps: list[tuple[str | None, bool]]) -> None:
    known = {name: APIKey(name=name, sha256=hash_key(name), running=2) for name in ("a", "b")}
    door = AccessControl(tuple(known.values()), running=3, running_per_key=9)
    inside: list[tuple[str | None, Any]] = []
    for name, enter in steps:
        mine = [entry for entry in inside if entry[0] == name]
        if not enter:
            if mine:
                inside.remove(mine[0])
                mine[0][1].__exit__(None, None, None)
            continue
        visit = door.slot(known.get(name) if name else None)
        if len(inside) >= 3 or (name and len(mine) >= 2):
            with pytest.raises(APIError) as error:
                visit.__enter__()
            assert error.value.status == 429
        else:
            visit.__enter__()
            inside.append((name, visit))


def test_a_key_that_has_enough_under_way_gets_429_and_others_do_not() -> None:
    first, second = new_key(), new_key()
    limited = settings(
        keys=[APIKey(name="first", sha256=hash_key(first), running=1), APIKey(name="second", sha256=hash_key(second))]
    )
    let = threading.Event()

    async def wait() -> None:
        while not let.is_set():
            await asyncio.sleep(0.01)

    with listening(create_app(Stub(wait), limited)) as url:
        clients = [openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in (first, second)]
        fields: Any = {"model": "tiny", "messages": ask()["messages"]}
        stream = clients[0].chat.completions.create(stream=True, **fields)
        next(stream)
        with pytest.raises(openai.RateLimitError, match="1 requests under way") as error:
            clients[0].chat.completions.create(**fields)
        assert error.value.response.headers["retry-after"] == "1"
        let.set()
        assert clients[1].chat.completions.create(**fields).choices[0].message.content == "seven"
        list(stream)
        assert clients[0].chat.completions.create(**fields).choices[0].message.content == "seven"


# ---- limits


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    PILImage.new("1", (width, height)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_images(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return ask() | {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (ask(max_tokens=9), "may have 8 tokens here, 9 were asked for"),
        (ask(n=4), "3 answers here, found 4"),
        (ask(stop=["a", "b", "c"]), "2 stop strings here, found 3"),
        (with_images(*[png(2, 2)] * 3), "3 images; this server takes 2"),
        (with_images(png(11, 10)), "11x10 pixels; this server takes 100"),
        # 81 million pixels in a few kilobytes: refused by its header, and never decoded
        (with_images(png(9000, 9000)), "9000x9000 pixels"),
        (with_images(png(20_000, 20_000)), "400000000 pixels"),
    ],
)
def test_what_goes_beyond_a_limit_is_told_the_limit(body: dict[str, Any], says: str) -> None:
    limits = Limits(tokens=8, choices=3, stops=2, images=2, pixels=100)
    with TestClient(create_app(Stub(), settings(limits=limits, max_body_mebibytes=1))) as client:
        response = client.post(CHAT, json=body)
        assert response.status_code == 400
        assert says in error_of(response)["message"]


def test_several_prompts_count_as_choices() -> None:
    with TestClient(create_app(Stub(), settings(limits=Limits(choices=3)))) as client:
        assert client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}).status_code == 200


async def for_ever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_late_ends_with_an_error(stream: bool) -> None:
    with TestClient(create_app(Stub(for_ever), settings(limits=Limits(seconds=0.2)))) as client:
        response = client.post(CHAT, json=ask(stream=stream))
        if stream:
            *_, last, end = response.text.strip().split("\n\n")
            assert end == "data: [DONE]"
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert response.status_code == 504
            error = error_of(response)
        assert error["code"] == "deadline_exceeded"
        assert "0.2 s" in error["message"]


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with listening(create_app(Stub(), settings(limits=Limits(body_seconds=0.2)))) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n")
            client.sendall(b"Content-Type: application/json\r\n\r\n{")
            assert b" 408 " in client.recv(100)


def test_a_replica_whose_line_is_full_says_so(model: Any) -> None:
    replica = EngineReplica(model, max_sequences=3, max_queued=1)
    try:
        with listening(create_app(replica, settings())) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
            fields: Any = {"model": "tiny", "messages": ask()["messages"], "extra_body": {"modalities": ["image"]}}
            streams: list[Any] = []

            def fill() -> None:
                for _ in range(20):
                    streams.append(client.chat.completions.create(stream=True, **fields))

            with pytest.raises(openai.RateLimitError, match="in line already"):
                fill()
            for stream in streams:
                assert [c.choices[0].finish_reason for c in stream][-1] == "stop"
    finally:
        replica.close()


# ---- remote images


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
    image = base64.b64decode(png(4, 4).partition(",")[2])

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


def refusal(url: str, pictures: ImageLoader) -> str:
    with pytest.raises(APIError) as error:
        pictures.read(url, "here")
    assert error.value.status == 400
    assert error.value.body["error"]["param"] == "here"
    return str(error.value)


def test_an_allowed_host_is_fetched_from(web: str) -> None:
    data = reader().read(f"{web}/image.png", "here")
    assert PILImage.open(io.BytesIO(data)).size == (4, 4)
    assert reader().read(f"{web}/to?{web}/to?/image.png", "here") == data


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nothing", "status 404"),
        ("/large", "larger than 1 MiB"),
        ("/page", "not a readable image"),
        ("/to?http://other.test/image.png", "other.test is not among the hosts"),
        ("/to?file:///etc/passwd", "only plain http and https"),
        ("/to?/to?/to?/to?/to?/image.png", "more than 3 redirects"),
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
