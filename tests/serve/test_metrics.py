"""What Prometheus is told, and that dashboard and alerts ask for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from calumma.serve.http.app import create_app
from calumma.serve.http.metrics import COUNTERS, GAUGES
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import ServeSettings

from .test_protection import Stub, for_ever

CHAT = "/v1/chat/completions"
MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Draw a three."}]}


@pytest.fixture
def client(replica: EngineReplica, settings: ServeSettings) -> Iterator[TestClient]:
    with TestClient(create_app(replica, settings)) as client:
        yield client


def samples(client: TestClient) -> dict[str, float]:
    """Each sample as name{label=value,…} -> value."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_latencies_of_text_and_images_are_told_apart(client: TestClient) -> None:
    client.post(CHAT, json=ASK | {"modalities": ["image"]})
    client.post(CHAT, json=ASK | {"modalities": ["text"], "max_tokens": 9, "seed": 1})
    found = samples(client)
    assert found["calumma_image_seconds_count{model=tiny}"] == 1
    assert found["calumma_first_token_seconds_count{model=tiny}"] == 2
    assert found["calumma_token_seconds_count{model=tiny}"] >= 1
    assert found["calumma_first_token_seconds_sum{model=tiny}"] > 0


def test_the_engine_tells_its_queue_its_cache_and_its_phases(client: TestClient) -> None:
    before = samples(client)
    client.post(CHAT, json=ASK | {"modalities": ["image"]})
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


@pytest.mark.parametrize(("stub", "end"), [(Stub(), "stop"), (Stub(for_ever), "late")], ids=["answered", "late"])
def test_how_answers_end_is_counted(stub: Stub, end: str) -> None:
    settings = ServeSettings.model_validate({"model": "m", "name": "tiny", "limits": {"seconds": 0.1}})
    with TestClient(create_app(stub, settings)) as client:
        client.post(CHAT, json=ASK)
        assert samples(client)[f"calumma_answers_total{{end={end},model=tiny}}"] == 1


def test_engines_that_do_not_answer_keep_their_last_numbers() -> None:
    class Silent(Stub):
        well = True

        async def statistics(self) -> dict[str, dict[str, float]]:
            if not self.well:
                raise RuntimeError("gone")
            return await super().statistics()

    backend = Silent()
    with TestClient(create_app(backend, ServeSettings(model="m", name="tiny"))) as client:
        first = samples(client)
        backend.well = False
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
    client.post(CHAT, json=ASK | {"modalities": ["image"]})
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
