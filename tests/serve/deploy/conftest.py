"""One endpoint on a real cluster for the tests of this folder that need one, and how they look at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from calumma.model import load
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.transformer import Transformer
from calumma.platform.specification import Tracking
from calumma.platform.tracking import server
from calumma.serve.deploy.endpoint import await_health
from calumma.serve.deploy.naming import APPLICATION_PREFIX, ENGINE
from calumma.serve.replica.engine.process import MODULE
from calumma.serve.replica.tensor_parallel import ACTOR_PREFIX
from calumma.serve.settings import Batches, ModelSettings, ServeSettings

from ..conftest import free_port

CHAT = "/v1/chat/completions"
PATIENCE = 300.0  # seconds; a starved machine needs minutes to start a process
SOON = 60.0  # seconds; what would never come is known by then
COLD = 11.0  # seconds; Ray Serve forgets the lengths of queues after ten
FULL = 3  # requests that a replica answers together
STALL = 10.0  # seconds
LONG = 700  # tokens: seconds of streaming


@pytest.fixture(scope="package")
def talkative(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy answers go on until they are cut: one that never ends a turn. An id of prompts is poison."""
    model = load(model_directory)
    torch.manual_seed(3)
    transformer = Transformer(model.config.model_copy(update={"context": 2048}))
    with torch.no_grad():  # the same word for ever
        transformer.output.weight.zero_()
        transformer.norm.weight.fill_(1.0)
        transformer.embedding.weight.abs_()
        transformer.output.weight[model.text_tokenizer.encode("s")[0]] = 1.0
        transformer.output.weight[model.vocabulary.eos] = -1.0
        transformer.embedding.weight[model.vocabulary.unknown] = float("nan")  # no text has it
    folder = tmp_path_factory.mktemp("talkative")
    save_model(folder, transformer, model_directory, model_directory / IMAGE_TOKENIZER)
    return folder


@pytest.fixture(scope="package")
def cut(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy answers are long, and not easily guessed."""
    model = load(model_directory)
    torch.manual_seed(5)
    transformer = Transformer(model.config.model_copy(update={"context": 2048}))
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
        transformer.output.weight[[model.vocabulary.eos, model.vocabulary.end_turn]] = 0  # seldom the likeliest
    folder = tmp_path_factory.mktemp("cut")
    save_model(folder, transformer, model_directory, model_directory / IMAGE_TOKENIZER)
    return folder


def name_champion(registry: str, model_directory: Path) -> None:
    """The directory is the registered model's next version, and its champion from now on."""
    from mlflow import MlflowClient

    client = MlflowClient(server.resolve_uri(Tracking(uri=registry)))
    if not client.search_registered_models("name = 'tiny'"):
        client.create_registered_model("tiny")
    version = client.create_model_version("tiny", str(model_directory), await_creation_for=0)
    client.set_registered_model_alias("tiny", "champion", version.version)


@pytest.fixture(scope="package")
def settings(
    model_directory: Path, talkative: Path, cut: Path, registry: str, tmp_path_factory: pytest.TempPathFactory
) -> ServeSettings:
    name_champion(registry, model_directory)
    pair = ModelSettings(model=str(cut), name="pair", tensor_parallel=2, cpus_per_replica=0.25, threads=1)
    tiny = {"model": "models:/tiny@champion", "name": "tiny", "tracking": Tracking(uri=registry), "image_coders": 1}
    held = {"stall_seconds": None}  # a test holds its engine up by a signal, which would end it otherwise
    return ServeSettings(
        model=str(talkative),
        name="talkative",
        port=free_port(),
        cpus_per_replica=0.25,
        min_replicas=2,
        max_replicas=2,
        max_sequences=FULL,
        stall_seconds=STALL,
        threads=1,
        also=(ModelSettings(**tiny, **held, cpus_per_replica=0.25, threads=1), pair),
        watch_seconds=1.0,
        batches=Batches(location=str(tmp_path_factory.mktemp("batches")), running=2),
    )


@pytest.fixture(scope="package")
def command(
    ray_cluster: None, settings: ServeSettings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """`calumma serve start --block` that has said where it serves."""
    import ray

    folder = tmp_path_factory.mktemp("command")
    (folder / "serve.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    address = ray.get_runtime_context().gcs_address
    words = ["serve", "start", "--config", "serve.yaml", "--address", address, "--block"]
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "calumma"), *words],
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    late = threading.Timer(PATIENCE, process.kill)
    late.start()
    try:
        said = process.stdout.readline()
        while "(raylet)" in said:  # what Ray has to say of a machine that is busy
            said = process.stdout.readline()
        late.cancel()
        assert said == f"talkative is served at {settings.url}\n"
        await_health(settings.url)
        yield process
    finally:
        late.cancel()
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE)
        process.stdout.close()


@pytest.fixture(scope="package")
def url(command: subprocess.Popen[str], settings: ServeSettings) -> str:
    return settings.url


def body(text: str = "hi", **fields: Any) -> dict[str, Any]:
    values = {"messages": [{"role": "user", "content": text}], "modalities": ["text"], "temperature": 0}
    return values | {"repetition_penalty": 1, "max_tokens": LONG} | fields


@dataclass
class Heard:
    """A stream as a client hears it."""

    text: str = ""
    error: str | None = None
    finish: str | None = None

    @property
    def whole(self) -> bool:
        return self.error is None and self.finish == "length" and len(self.text) >= LONG


def listen(url: str, text: str, begun: threading.Barrier | None = None, **fields: Any) -> Heard:
    heard = Heard()
    with requests.post(url + CHAT, json=body(text, stream=True, **fields), stream=True, timeout=PATIENCE) as reply:
        if reply.status_code != 200:
            return Heard(error=reply.text)
        for line in reply.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                heard.error = chunk["error"]["code"]
                continue
            choice = chunk["choices"][0]
            if not heard.text and choice["delta"].get("content") and begun is not None:
                begun.wait(PATIENCE)
            heard.text += choice["delta"].get("content") or ""
            heard.finish = choice["finish_reason"] or heard.finish
    return heard


def replicas(url: str, model: str) -> set[str]:
    """Names of the engine replicas that tell their numbers."""
    found = set()
    for family in text_string_to_metric_families(requests.get(f"{url}/metrics", timeout=PATIENCE).text):
        for sample in family.samples:
            if sample.name == "calumma_engine_requests_running" and sample.labels["model"] == model:
                found.add(sample.labels["replica"])
    return found


def being_answered(url: str, model: str) -> int:
    """Requests that an ingress works on."""
    for line in requests.get(f"{url}/metrics", timeout=PATIENCE).text.splitlines():
        if line.startswith(f'calumma_requests_running{{model="{model}"}} '):
            return int(float(line.split()[-1]))
    return 0


def until(found: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, f"{what} did not happen within {PATIENCE:.0f} s"
        time.sleep(0.5)


def applications(model: str) -> list[str]:
    from ray import serve

    return [name for name in serve.status().applications if name.startswith(f"{APPLICATION_PREFIX}talkative:{model}:")]


def engine_application(model: str) -> str:
    [found] = applications(model)
    return found


def engines(application: str) -> list[int]:
    """The processes of an application's engines."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if MODULE in (process.info["cmdline"] or ()) and application in "".join(process.parent().cmdline())
    ]


def engine_of(application: str, replica: str) -> psutil.Process:
    """The engine's process of a replica."""
    import ray

    actor = ray.get_actor(f"SERVE_REPLICA::{application}#{ENGINE}#{replica}", namespace="serve")
    [engine] = psutil.Process(ray.get(actor.is_allocated.remote())[0]).children()
    assert MODULE in engine.cmdline()
    return engine


def followers() -> list[str]:
    """Names of the actors of replicas' further processes."""
    import ray

    return [
        one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].startswith(ACTOR_PREFIX)
    ]
