"""Batches on a real cluster, answered while whoever works on them is killed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from openai import APIConnectionError, APIStatusError, OpenAI

from calumma.serve.batches.store import Store
from calumma.serve.deploy.naming import APPLICATION_PREFIX, BATCHES, INGRESS, batches_application
from calumma.serve.settings import ServeSettings

from .conftest import PATIENCE, until

LINES = 6
COMPLETIONS = "/v1/completions"


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def end(application: str, deployment: str) -> None:
    """Kill a deployment's replicas."""
    import ray

    prefix = f"SERVE_REPLICA::{application}#{deployment}#"
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(prefix):
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)


@pytest.mark.cluster
def test_a_batch_is_answered_whoever_is_killed(client: OpenAI, url: str, settings: ServeSettings) -> None:
    def line(number: int) -> dict[str, Any]:
        asked = {"model": "talkative", "prompt": f"{number}", "max_tokens": 150 + number, "temperature": 0}
        return {"custom_id": f"{number}", "method": "POST", "url": COMPLETIONS, "body": asked | {"min_tokens": 150}}

    data = "".join(json.dumps(line(number)) + "\n" for number in range(LINES)) + "nonsense\n"
    file = client.files.create(file=("in.jsonl", data.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
    assert settings.batches.location is not None
    own = Store(settings.batches.location).of(None)
    until(lambda: len(own.answered(batch.id)) >= 2, "the first answers")
    before = own.answered(batch.id)
    end(batches_application(settings.name), BATCHES)
    end(f"{APPLICATION_PREFIX}{settings.name}", INGRESS)

    def status() -> str:
        try:
            return client.batches.retrieve(batch.id).status
        except (APIConnectionError, APIStatusError):  # there is no ingress now
            return "unknown"

    until(lambda: status() in ("completed", "failed"), "the end of the batch")
    done = client.batches.retrieve(batch.id)
    assert done.request_counts
    assert done.request_counts.to_dict() == {"total": LINES + 1, "completed": LINES, "failed": 1}
    assert done.output_file_id
    assert done.error_file_id
    found = [json.loads(text) for text in client.files.content(done.output_file_id).text.splitlines()]
    assert Counter(each["custom_id"] for each in found) == Counter(f"{number}" for number in range(LINES))
    assert set(before) <= {int(each["custom_id"]) + 1 for each in found} | {LINES + 1}
    for each in found:
        assert each["response"]["body"]["usage"]["completion_tokens"] == 150 + int(each["custom_id"])
    [bad] = client.files.content(done.error_file_id).text.splitlines()
    assert json.loads(bad)["error"]["message"].startswith(f"line {LINES + 1}: ")
    until(lambda: requests.get(f"{url}/ready", timeout=PATIENCE).ok, "the ingress")
