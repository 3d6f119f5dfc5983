"""What Prometheus is told, and that dashboard and alerts ask for what there is."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.http.metrics import COUNTERS, GAUGES
from calumma.serve.protocol import Started, TokenCount
from calumma.serve.settings import Limits

from ..conftest import StubBackend
from .conftest import CHAT, IMAGE_TOKENS, ask, metric, stub_settings

MONITORING = Path(__file__).parents[3] / "infra" / "monitoring"


def samples(client: TestClient) -> dict[str, float]:
    """Each sample as name{label=value,…} -> value."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_latencies_of_text_and_images_are_told_apart(client: TestClient) -> None:
    client.post(CHAT, json=ask(modalities=["image"]))
    client.post(CHAT, json=ask(modalities=["text"], max_tokens=9, seed=1))
    found = samples(client)
    assert found["calumma_image_seconds_count{model=tiny}"] == 1
    assert found["calumma_first_token_seconds_count{model=tiny}"] == 2
    assert found["calumma_token_seconds_count{model=tiny}"] >= 1
    assert found["calumma_first_token_seconds_sum{model=tiny}"] > 0


def test_the_engine_tells_its_queue_its_cache_and_its_phases(client: TestClient) -> None:
    before = samples(client)
    client.post(CHAT, json=ask(modalities=["image"]))
    after = samples(client)

    def grown(name: str) -> float:
        key = f"calumma_engine_{name}{{model=tiny,replica=local}}"
        return after[key] - before[key]

    assert grown("image_tokens_total") == 18
    assert grown("text_tokens_total") == 0
    assert grown("steps_total") > 0
    assert grown("finished_total") == 1
    assert after["calumma_engine_requests_waiting{model=tiny,replica=local}"] == 0
    assert 0 <= after["calumma_engine_cache_used_ratio{model=tiny,replica=local}"] <= 1


ENDLESS = [Started(TokenCount(3)), lambda: asyncio.Event().wait()]


@pytest.mark.parametrize(("steps", "end"), [([], "stop"), (ENDLESS, "late")], ids=["answered", "late"])
def test_how_answers_end_is_counted(steps: list[Any], end: str) -> None:
    with TestClient(create_app(StubBackend(*steps), stub_settings(limits=Limits(seconds=0.1)))) as client:
        client.post(CHAT, json=ask())
        assert samples(client)[f"calumma_answers_total{{end={end},model=tiny}}"] == 1


def test_engines_that_do_not_answer_keep_their_last_numbers() -> None:
    backend = StubBackend()
    with TestClient(create_app(backend, stub_settings())) as client:
        first = samples(client)
        backend.healthy = False
        key = "calumma_engine_requests_waiting{model=tiny,replica=one}"
        assert first[key] == samples(client)[key] == 2


def asked() -> set[str]:
    """Names of ours in the dashboard's and the alerts' expressions."""
    dashboard = json.loads((MONITORING / "grafana-serving.json").read_text())
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    expressions += [variable["query"] for variable in dashboard["templating"]["list"]]
    return {name for expression in expressions for name in re.findall(r"calumma_\w+", expression)}


def test_dashboard_and_alerts_ask_for_metrics_that_exist(client: TestClient) -> None:
    client.post(CHAT, json=ask(modalities=["image"]))
    there = {sample.partition("{")[0] for sample in samples(client)}
    names = asked()
    assert len(names) > 10
    assert names - there == set()


def test_prometheus_finds_the_rules_beside_its_configuration() -> None:
    configuration = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert [job["job_name"] for job in configuration["scrape_configs"]] == ["calumma", "ray"]
    assert all((MONITORING / file).is_file() for file in configuration["rule_files"])


def test_no_number_is_both_a_counter_and_a_gauge() -> None:
    assert not COUNTERS.keys() & GAUGES.keys()


def test_metrics_count_requests_and_tokens(client: TestClient) -> None:
    client.post(CHAT, json=ask(modalities=["image"]))
    usage = client.post(CHAT, json=ask(modalities=["text"], max_tokens=4)).json()["usage"]
    client.post(CHAT, json=ask(model="other"))
    client.get("/nowhere/in/particular")
    assert metric(client, f'calumma_requests_total{{endpoint="{CHAT}",status="200"}}') == 2
    assert metric(client, f'calumma_requests_total{{endpoint="{CHAT}",status="404"}}') == 1
    assert metric(client, 'calumma_requests_total{endpoint="other",status="404"}') == 1
    assert metric(client, 'calumma_tokens_total{direction="answer",modality="image",model="tiny"}') == IMAGE_TOKENS
    assert metric(client, 'calumma_tokens_total{direction="prompt",modality="text",model="tiny"}') == (
        2 * usage["prompt_tokens"]
    )
    assert (
        metric(client, 'calumma_tokens_total{direction="answer",modality="text",model="tiny"}')
        == (usage["completion_tokens"])
    )
    assert metric(client, 'calumma_images_total{model="tiny"}') == 1
    assert metric(client, 'calumma_requests_running{model="tiny"}') == 0
    assert metric(client, f'calumma_request_seconds_count{{endpoint="{CHAT}"}}') == 3
