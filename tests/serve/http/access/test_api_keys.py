"""Who may use the API: keys, their files, and how many requests each may have under way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from calumma.serve.http.access import api_keys
from calumma.serve.http.access.api_keys import AccessControl, hash_key, load_keys, new_key
from calumma.serve.http.access.caller import Caller, behind
from calumma.serve.http.app import create_app
from calumma.serve.http.wire.errors import APIError
from calumma.serve.protocol import ImageOutput, TextDelta
from calumma.serve.settings import APIKey

from ...conftest import StubBackend, answered, listening
from ..conftest import CHAT, ask, error_of, stub_settings


@pytest.fixture(scope="module")
def secret() -> str:
    return new_key()


@pytest.fixture
def locked(secret: str) -> Iterator[TestClient]:
    with_key = stub_settings(keys=[APIKey(name="alice", sha256=hash_key(secret))])
    with TestClient(create_app(StubBackend(), with_key)) as client:
        yield client


def test_who_has_a_key_is_answered(locked: TestClient, secret: str) -> None:
    assert locked.post(CHAT, json=ask(), headers={"Authorization": f"Bearer {secret}"}).status_code == 200


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "Basic eDp5"}])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/images/generations", "/tokenize", "/detokenize"])
def test_who_has_none_is_not(locked: TestClient, header: dict[str, str], path: str) -> None:
    response = locked.post(path, json=ask(prompt="x"), headers=header)
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer {hash}", "Bearer  {hash} ", "{key}", "Basic {key}", "Bearer {name}"])
def test_only_the_key_itself_opens(locked: TestClient, secret: str, scheme: str) -> None:
    """Its hash stands in files, its name in logs: who reads them has no key."""
    header = scheme.format(key=secret, hash=hash_key(secret), name="alice")
    response = locked.post(CHAT, json=ask(), headers={"Authorization": header})
    assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")


def test_a_body_is_not_even_read_for_who_has_no_key(locked: TestClient) -> None:
    assert locked.post(CHAT, content=b"{" * 10_000).status_code == 401


def test_pages_and_probes_need_no_key_and_tell_no_paths(locked: TestClient) -> None:
    for path in ("/", "/health", "/ready", "/metrics"):
        assert locked.get(path).status_code == 200
    assert "/models/tiny" not in locked.get("/health").text
    for path in ("/v1/models", "/v1/models/tiny", "/tokenizer_info"):
        assert locked.get(path).status_code == 401


def test_the_openai_client_sees_an_authentication_error(secret: str) -> None:
    with listening(create_app(StubBackend(), stub_settings(keys=[APIKey(name="a", sha256=hash_key(secret))]))) as url:
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="not one that this server knows"):
            wrong.models.list()
        assert [m.id for m in openai.OpenAI(base_url=f"{url}/v1", api_key=secret).models.list()] == ["tiny"]


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    one, two, three = hash_key(secret), hash_key("two"), hash_key("three")
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n{one} alice 4 priority=2\n\n{two}\n")
    monkeypatch.setenv(api_keys.VARIABLE, f"{three} carol")
    found = load_keys(file)
    assert [(key.name, key.sha256, key.running, key.priority) for key in found] == [
        ("alice", one, 4, 2),
        (two[:8], two, None, 0),
        ("carol", three, None, 0),
    ]


@pytest.mark.parametrize("line", ["sk-calumma-abc alice", "alice", "0" * 63, "0" * 64 + " a b c", "0" * 64 + " a 0"])
def test_a_key_that_is_not_given_by_its_hash_is_refused_and_not_repeated(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(f"{'1' * 64} bob\n{line}\n")
    with pytest.raises(ValueError, match="entry 2") as error:
        load_keys(tmp_path / "keys")
    assert line not in str(error.value)


def test_a_file_without_keys_opens_no_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ValueError, match="nobody could use the server"):
        load_keys(tmp_path / "keys")


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.booleans()), max_size=40))
def test_requests_under_way_are_counted_by_key(steps: list[tuple[str | None, bool]]) -> None:
    known = {name: APIKey(name=name, sha256=hash_key(name), running=2) for name in ("a", "b")}
    access = AccessControl(tuple(known.values()), running=3, running_per_key=9)
    inside: list[tuple[str | None, Any]] = []
    for name, enter in steps:
        mine = [entry for entry in inside if entry[0] == name]
        if not enter:
            if mine:
                inside.remove(mine[0])
                mine[0][1].__exit__(None, None, None)
            continue
        visit = access.slot(known.get(name) if name else None)
        active = len({entry[0] for entry in inside} | {name})
        if (len(inside) >= 3 and len(mine) >= 3 // active) or (name and len(mine) >= 2):
            with pytest.raises(APIError) as error:
                visit.__enter__()
            assert error.value.status == 429
        else:
            visit.__enter__()
            inside.append((name, visit))


def test_a_key_without_a_limit_of_its_own_has_that_of_all_keys() -> None:
    key = APIKey(name="a", sha256=hash_key("a"))
    access = AccessControl((key,), running=9, running_per_key=1)
    with access.slot(key), pytest.raises(APIError, match="may have 1 at once"), access.slot(key):
        pass
    own = key.model_copy(update={"running": 2})
    with access.slot(own), access.slot(own):
        pass


def test_answers_are_counted_not_requests() -> None:
    key = APIKey(name="a", sha256=hash_key("a"), running=3)
    access = AccessControl((key,), running=9, running_per_key=1)
    with access.slot(key) as answers:
        answers.take(2)
        with access.slot(key) as others:
            with pytest.raises(APIError, match="may have 3 at once") as full:
                others.take(2)
            assert (full.value.status, full.value.body["error"]["code"]) == (429, "rate_limit_exceeded")
        answers.take(3)
        with pytest.raises(APIError, match="may have 3 at once"), access.slot(key):
            pass
        with pytest.raises(APIError, match="4 answers are asked for at once; 3 are the most") as never:
            answers.take(4)
        assert never.value.status == 400
    with access.slot(key) as answers:
        answers.take(3)


@pytest.mark.parametrize(
    ("path", "body", "answers"),
    [
        (CHAT, ask(n=3), 3),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, 4),
        ("/v1/images/generations", {"prompt": "a", "n": 2}, 2),
    ],
)
def test_a_request_with_more_answers_than_its_key_may_have_is_refused(
    secret: str, path: str, body: dict[str, Any], answers: int
) -> None:
    alice = APIKey(name="alice", sha256=hash_key(secret), running=1, priority=2)
    backend = StubBackend(script=lambda request: answered(ImageOutput(b"png")))
    with TestClient(create_app(backend, stub_settings(keys=[alice]))) as client:
        header = {"Authorization": f"Bearer {secret}"}
        refused = client.post(path, json=body, headers=header)
        assert (refused.status_code, error_of(refused)["param"]) == (400, "n")
        assert f"{answers} answers" in error_of(refused)["message"]
        few = body | {"n": 1, "priority": 5} | ({"prompt": "a"} if "prompt" in body else {})
        assert client.post(path, json=few, headers=header).status_code == 200
        assert client.post(path, json=few | {"priority": -5}, headers=header).status_code == 200
    assert [(request.tenant, request.priority) for request in backend.requests] == [("alice", 7), ("alice", 2)]


def test_a_request_that_fails_gives_its_slot_back() -> None:
    access = AccessControl((), running=1, running_per_key=1)
    with pytest.raises(RuntimeError), access.slot(None):
        raise RuntimeError
    with access.slot(None):
        pass


def test_a_server_that_works_on_enough_gets_no_more_and_its_pages_go_on() -> None:
    waiting, let = threading.Event(), threading.Event()

    async def wait() -> None:
        waiting.set()
        while not let.is_set():
            await asyncio.sleep(0.01)

    started, *rest = answered(TextDelta("seven"))
    full = stub_settings(limits={"running": 1})
    with listening(create_app(StubBackend(started, wait, *rest), full)) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(requests.post, url + CHAT, json=ask(), timeout=300)
        try:
            assert waiting.wait(300)
            refused = requests.post(url + CHAT, json=ask(), timeout=300)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "overloaded")
            assert requests.get(f"{url}/v1/models", timeout=300).status_code == 200
        finally:
            let.set()
        assert first.result().status_code == 200
        assert requests.post(url + CHAT, json=ask(), timeout=300).status_code == 200


def test_a_key_that_has_enough_under_way_gets_429_and_others_do_not() -> None:
    first, second = new_key(), new_key()
    limited = stub_settings(
        keys=[APIKey(name="first", sha256=hash_key(first), running=1), APIKey(name="second", sha256=hash_key(second))]
    )
    let = threading.Event()

    async def wait() -> None:
        while not let.is_set():
            await asyncio.sleep(0.01)

    started, *rest = answered(TextDelta("seven"))
    backend = StubBackend(started, wait, *rest)
    with listening(create_app(backend, limited)) as url:
        clients = [openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in (first, second)]
        fields: Any = {"model": "tiny", "messages": ask()["messages"]}
        stream = clients[0].chat.completions.create(stream=True, **fields)
        next(stream)
        with pytest.raises(openai.RateLimitError, match="may have 1 at once") as error:
            clients[0].chat.completions.create(**fields)
        assert error.value.response.headers["retry-after"] == "1"
        let.set()
        assert clients[1].chat.completions.create(**fields).choices[0].message.content == "seven"
        list(stream)
        again = clients[0].with_options(max_retries=5)  # the server may end the stream a moment after the client
        assert again.chat.completions.create(**fields).choices[0].message.content == "seven"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT, ask(n=2)),
        ("/v1/completions", {"prompt": "x", "n": 2}),
        ("/v1/images/generations", {"prompt": "x", "n": 2}),
        ("/v1/responses", {"input": "x"}),
    ],
)
def test_requests_of_a_key_share_a_salt_that_no_other_key_has(path: str, asked: dict[str, Any]) -> None:
    keys = [APIKey(name=name, sha256=hash_key(name)) for name in ("first", "second")]
    backend = StubBackend(script=lambda request: answered(ImageOutput(b"png")))
    salts = {}
    with TestClient(create_app(backend, stub_settings(keys=keys))) as client:
        for name in ("first", "second"):
            for stream in (False, True):
                reply = client.post(path, json=asked | {"stream": stream}, headers={"Authorization": f"Bearer {name}"})
                assert reply.status_code == 200, reply.text
            salts[name] = {request.salt for request in backend.requests}
            backend.requests.clear()
    assert [len(found) for found in salts.values()] == [1, 1]
    assert salts["first"] != salts["second"]
    assert b"" not in {*salts["first"], *salts["second"]}
    assert all(hash_key(name).encode() not in salt for name, found in salts.items() for salt in found)


def test_without_keys_all_share_what_is_computed() -> None:
    backend = StubBackend()
    with TestClient(create_app(backend, stub_settings())) as client:
        client.post(CHAT, json=ask(), headers={"Authorization": "Bearer any"})
    assert [request.salt for request in backend.requests] == [b""]


def test_a_cache_salt_is_kept_apart_from_others_and_from_other_keys() -> None:
    backend = StubBackend()
    with TestClient(create_app(backend, stub_settings(keys=[APIKey(name=n, sha256=hash_key(n)) for n in "ab"]))) as c:
        for name, fields in [
            ("a", {}),
            ("a", {"cache_salt": "x"}),
            ("a", {"cache_salt": "y"}),
            ("b", {"cache_salt": "x"}),
        ]:
            for _ in range(2):
                answer = c.post(CHAT, json=ask(**fields), headers={"Authorization": f"Bearer {name}"})
                assert answer.status_code == 200
    salts = [request.salt for request in backend.requests]
    assert salts[::2] == salts[1::2]
    assert len({*salts}) == 4


def test_a_new_key_of_an_old_name_does_not_see_what_the_old_one_left() -> None:
    old, new = (APIKey(name="alice", sha256=hash_key(secret)) for secret in ("old", "new"))
    assert old.owner != new.owner
    assert old.owner == APIKey(name="alice", sha256=old.sha256, running=3).owner


def test_batches_stand_behind_whatever_a_key_can_ask_for() -> None:
    last = APIKey(name="a", sha256=hash_key("a"), priority=1000)
    assert Caller.batches_of("b").priority > Caller.of(last).priority + behind(10**30)
