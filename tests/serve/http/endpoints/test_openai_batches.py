"""Files and batches through the official `openai` client, answered by a runner beside the server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from calumma.serve.batches import runner
from calumma.serve.batches.runner import BatchRunner
from calumma.serve.batches.store import Store
from calumma.serve.http.access.api_keys import hash_key
from calumma.serve.http.app import create_app
from calumma.serve.http.in_process import in_process
from calumma.serve.settings import APIKey, Batches

from ...conftest import StubBackend, listening
from ..conftest import CHAT, stub_settings

ORDER = {"input_file_id": "x", "endpoint": CHAT, "completion_window": "24h"}
MESSAGES = [{"role": "user", "content": "Which digit is this?"}]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, OpenAI]]:
    """By the names of their keys. A runner is at work."""
    location = str(tmp_path_factory.mktemp("batches"))
    keys = tuple(APIKey(name=name, sha256=hash_key(name)) for name in ("anna", "bert"))
    settings = stub_settings(keys=keys, batches=Batches(location=location))
    stop = threading.Event()

    async def run() -> None:
        app = create_app(StubBackend(), settings)
        task = asyncio.create_task(BatchRunner(Store(location), in_process(app), 2, 100, poll_seconds=0.05).run())
        await asyncio.to_thread(stop.wait)
        task.cancel()

    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(runner, "REPORT_SECONDS", 0.05)
        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        url = stack.enter_context(listening(create_app(StubBackend(), settings)))
        yield {
            name: stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key=name, max_retries=0))
            for name in ("anna", "bert")
        }


def sent(client: OpenAI, *lines: Any) -> str:
    """The id of a file of these lines."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=("requests.jsonl", data), purpose="batch").id


def chat(name: str, **fields: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": {"messages": MESSAGES, **fields}}


def ended(client: OpenAI, id: str) -> Any:
    for _ in range(6000):
        batch = client.batches.retrieve(id)
        if batch.status not in ("validating", "in_progress", "finalizing", "cancelling"):
            return batch
        threading.Event().wait(0.05)
    raise AssertionError(f"{id} does not end")


def content(client: OpenAI, id: str | None) -> list[Any]:
    assert id is not None
    return [json.loads(line) for line in client.files.content(id).text.splitlines()]


def test_files_come_back_as_they_were_sent_and_are_deleted(clients: dict[str, OpenAI], tmp_path: Path) -> None:
    client, path = clients["anna"], tmp_path / "größe.jsonl"
    path.write_bytes(b'{"a": "\xc3\xa9"}\n' * 1000)
    file = client.files.create(file=path, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.filename, file.bytes, file.purpose, file.status) == ("größe.jsonl", 12_000, "batch", "processed")
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == path.read_bytes()
    others = [sent(client, {}) for _ in range(3)]
    found = [each.id for each in client.files.list(limit=2)]
    assert [id for id in found if id in (file.id, *others)] == [*others[::-1], file.id], (
        "page by page, the newest first"
    )
    first = client.files.list(limit=2)
    assert (len(first.data), first.has_more) == (2, True)
    assert client.files.delete(file.id).deleted
    for look in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            look(file.id)


def test_a_batch_answers_every_line(clients: dict[str, OpenAI]) -> None:
    client = clients["anna"]
    lines = [chat("a", seed=1), {"custom_id": "b"}, chat("c", temperature=9), chat("d", n=2), chat("e", model="other")]
    batch = client.batches.create(
        input_file_id=sent(client, *lines), endpoint=CHAT, completion_window="24h", metadata={"of": "me"}
    )
    assert batch.status == "validating"
    assert batch.expires_at == batch.created_at + 24 * 3600
    done = ended(client, batch.id)
    assert done.status == "completed"
    assert done.request_counts
    assert done.request_counts.to_dict() == {"total": 5, "completed": 2, "failed": 3}
    assert done.metadata == {"of": "me"}
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    good = content(client, done.output_file_id)
    assert [each["custom_id"] for each in good] == ["a", "d"]
    assert [len(each["response"]["body"]["choices"]) for each in good] == [1, 2]
    assert good[0]["response"]["body"]["choices"][0]["message"]["content"] == "seven"
    wrong, hot, other = content(client, done.error_file_id)
    assert wrong["custom_id"] == "b"
    assert wrong["error"]["message"].startswith("line 2: ")
    assert [error.line for error in done.errors.data] == [2]
    assert hot["response"]["status_code"] == 400
    assert hot["response"]["body"]["error"]["param"] == "temperature"
    assert other["response"]["status_code"] == 404
    assert batch.id in [each.id for each in client.batches.list(limit=1)]
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert client.batches.cancel(batch.id) == done, "it has ended"


@pytest.mark.parametrize(
    ("endpoint", "body", "object_"),
    [
        ("/v1/completions", {"prompt": "The"}, "text_completion"),
        ("/v1/responses", {"input": "The"}, "response"),
    ],
)
def test_other_endpoints_have_batches_too(clients: dict[str, OpenAI], endpoint: Any, body: Any, object_: str) -> None:
    client = clients["anna"]
    file = sent(client, {"custom_id": "a", "method": "POST", "url": endpoint, "body": body})
    done = ended(client, client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h").id)
    assert content(client, done.output_file_id)[0]["response"]["body"]["object"] == object_


def test_keys_see_nothing_of_each_other(clients: dict[str, OpenAI]) -> None:
    anna, bert = clients["anna"], clients["bert"]
    file = sent(anna, chat("a"))
    batch = anna.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    assert [*bert.files.list(), *bert.batches.list()] == []
    for look, id in (
        (bert.files.retrieve, file), (bert.files.content, file), (bert.files.delete, file),
        (bert.batches.retrieve, batch.id), (bert.batches.cancel, batch.id),
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            look(id)
    with pytest.raises(openai.BadRequestError) as refused:
        bert.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    assert refused.value.param == "input_file_id"
    assert ended(anna, batch.id).status == "completed"


@pytest.mark.parametrize(
    ("path", "form", "param"),
    [
        ("/files", {"data": {"purpose": "fine-tune"}, "files": {"file": b"x"}}, "purpose"),
        ("/files", {"data": {"purpose": "batch", "x": "y"}}, None),
        ("/files", {"data": {"purpose": "batch", "file": "x"}, "files": {"other": b"x"}}, "file"),
        ("/files", {"files": {"file": b"x"}}, "purpose"),
        ("/files", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, None),
        (
            "/batches",
            {"json": {"input_file_id": "../x", "endpoint": CHAT, "completion_window": "24h"}},
            "input_file_id",
        ),
        (
            "/batches",
            {"json": {"input_file_id": "x", "endpoint": "/v1/models", "completion_window": "24h"}},
            "endpoint",
        ),
        (
            "/batches",
            {"json": {"input_file_id": "x", "endpoint": CHAT, "completion_window": "1h"}},
            "completion_window",
        ),
        ("/batches?limit=0", {"method": "GET"}, "limit"),
        ("/files?after=x", {"method": "GET"}, "after"),
    ],
)
def test_what_is_none_is_refused(clients: dict[str, OpenAI], path: str, form: Any, param: str | None) -> None:
    headers = {"authorization": "Bearer anna", **form.pop("headers", {})}
    method = form.pop("method", "POST")
    response = clients["anna"]._client.request(method, f"{clients['anna'].base_url}{path[1:]}", headers=headers, **form)
    assert response.status_code == 400, response.text
    found = response.json()["error"]["param"]
    assert param is None or found.rsplit(".", 1)[-1] == param


def test_a_server_without_a_place_for_files_says_so() -> None:
    with (
        listening(create_app(StubBackend(), stub_settings())) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match="keeps no files"),
    ):
        client.files.list()
