"""The endpoint on a real cluster: several models, replicas that die, versions that follow each other, the end."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
import yaml
from PIL import Image as PILImage
from prometheus_client.parser import text_string_to_metric_families

from calumma.model import generate, load
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.document import Document, Text
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.model.transformer import Transformer
from calumma.platform.specification import Tracking
from calumma.platform.tracking import server
from calumma.serve.deploy.applications import start_model
from calumma.serve.deploy.endpoint import await_health, deploy, undeploy
from calumma.serve.deploy.naming import APPLICATION_PREFIX, ENGINE
from calumma.serve.deploy.preparation import ServeError
from calumma.serve.deploy.routing import preferred_replica, prefix_key
from calumma.serve.protocol import GenerationRequest
from calumma.serve.replica.engine.process import MODULE
from calumma.serve.replica.tensor_parallel import ACTOR_PREFIX
from calumma.serve.settings import ModelSettings, ServeSettings

from ..conftest import free_port

CHAT = "/v1/chat/completions"
PATIENCE = 300.0  # seconds; a starved machine needs minutes to start a process
SOON = 60.0  # seconds; what would never come is known by then
COLD = 11.0  # seconds; Ray Serve forgets the lengths of queues after ten
FULL = 3  # requests that a replica answers together
LONG = 700  # tokens: seconds of streaming


@pytest.fixture(scope="module")
def talkative(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose greedy answers go on until they are cut: one that never ends a turn."""
    model = load(model_directory)
    torch.manual_seed(3)
    transformer = Transformer(model.config.model_copy(update={"context": 2048}))
    with torch.no_grad():  # the same word for ever
        transformer.output.weight.zero_()
        transformer.norm.weight.fill_(1.0)
        transformer.embedding.weight.abs_()
        transformer.output.weight[model.text_tokenizer.encode("s")[0]] = 1.0
        transformer.output.weight[model.vocabulary.eos] = -1.0
    folder = tmp_path_factory.mktemp("talkative")
    save_model(folder, transformer, model_directory, model_directory / IMAGE_TOKENIZER)
    return folder


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def settings(model_directory: Path, talkative: Path, cut: Path, registry: str) -> ServeSettings:
    name_champion(registry, model_directory)
    pair = ModelSettings(model=str(cut), name="pair", tensor_parallel=2, cpus_per_replica=0.25, threads=1)
    tiny = {"model": "models:/tiny@champion", "name": "tiny", "tracking": Tracking(uri=registry), "image_coders": 1}
    return ServeSettings(
        model=str(talkative),
        name="talkative",
        port=free_port(),
        cpus_per_replica=0.25,
        min_replicas=2,
        max_replicas=2,
        max_sequences=FULL,
        threads=1,
        also=(ModelSettings(**tiny, cpus_per_replica=0.25, threads=1), pair),
        watch_seconds=1.0,
    )


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def kill(application: str, replica: str) -> None:
    import ray

    ray.kill(ray.get_actor(f"SERVE_REPLICA::{application}#{ENGINE}#{replica}", namespace="serve"))


@pytest.mark.cluster
def test_several_answers_to_one_request_come_after_a_silence_and_disturb_nobody(url: str) -> None:
    """Ray Serve's router has forgotten by then how busy the replicas are, so all calls are routed at once."""
    time.sleep(COLD)

    def ask(**fields: Any) -> list[str]:
        reply = requests.post(url + CHAT, json=body(max_tokens=4, **fields), timeout=SOON)
        assert reply.status_code == 200, reply.text
        return [choice["message"]["content"] for choice in reply.json()["choices"]]

    with ThreadPoolExecutor(4) as pool:
        several = pool.submit(ask, n=3)
        streamed = pool.submit(lambda: [listen(url, "hi", n=2, max_tokens=4).error for _ in range(3)])
        others = pool.submit(lambda: [ask(text=f"other {number}") for number in range(5)])
        well = pool.submit(lambda: [requests.get(url + "/health", timeout=SOON).status_code for _ in range(5)])
        assert several.result() == ["ssss"] * 3
        assert streamed.result() == [None] * 3
        assert others.result() == [["ssss"]] * 5
        assert well.result() == [200] * 5
    prompts = {"prompt": ["a", "b", "c"], "temperature": 0, "max_tokens": 2, "repetition_penalty": 1}
    reply = requests.post(f"{url}/v1/completions", json=prompts, timeout=SOON)
    assert [choice["text"] for choice in reply.json()["choices"]] == ["ss"] * 3


@pytest.mark.cluster
def test_several_models_answer_under_one_endpoint(url: str, settings: ServeSettings) -> None:
    assert {m["id"] for m in requests.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"]} == {
        "talkative",
        "tiny",
        "pair",
    }
    assert requests.get(f"{url}/ready", timeout=PATIENCE).json() == {"ready": True, "unavailable": {}}
    assert requests.get(f"{url}/health?model=tiny", timeout=PATIENCE).json()["context"] == 128
    asked = {"messages": [{"role": "user", "content": "Draw a three."}], "modalities": ["image"], "model": "tiny"}

    def ask(seed: int) -> str:
        reply = requests.post(url + CHAT, json=asked | {"seed": seed}, timeout=PATIENCE)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["images"][0]["image_url"]["url"])

    with ThreadPoolExecutor(6) as pool:
        images = list(pool.map(ask, [1, 2, 3, 1, 2, 3]))
    assert images[:3] == images[3:], "an answer does not depend on who else is served"
    data = base64.b64decode(images[0].partition(",")[2])
    assert PILImage.open(io.BytesIO(data), formats=["PNG"]).size == (8, 8), "decoded by the image-coding deployment"
    buffer = io.BytesIO()
    PILImage.frombytes("RGB", (1300, 1300), random.Random(0).randbytes(3 * 1300**2)).save(buffer, "PNG")
    assert buffer.tell() > 1 << 22, "more than a message of gRPC has by default"
    large = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    question = [{"type": "text", "text": "Which?"}, {"type": "image_url", "image_url": {"url": large}}]
    reply = requests.post(
        url + CHAT,
        json=asked | {"messages": [{"role": "user", "content": question}], "modalities": ["text"], "max_tokens": 3},
        timeout=PATIENCE,
    )
    assert reply.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 18, "coded there too"
    refused = requests.post(url + CHAT, json=asked | {"model": "other"}, timeout=PATIENCE)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    with pytest.raises(ServeError, match="runs in this cluster already and listens"):
        deploy(settings.model_copy(update={"port": free_port()}))
    assert requests.get(f"{url}/health", timeout=PATIENCE).ok, "a refused second deployment disturbs nobody"


def engine_application(model: str) -> str:
    from ray import serve

    [found] = [
        name for name in serve.status().applications if name.startswith(f"{APPLICATION_PREFIX}talkative:{model}:")
    ]
    return found


def followers() -> list[str]:
    """Names of the actors of replicas' further processes."""
    import ray

    return [
        one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].startswith(ACTOR_PREFIX)
    ]


@pytest.mark.cluster
def test_a_replica_of_two_processes_answers_as_one_and_is_replaced_when_it_loses_one(url: str, cut: Path) -> None:
    import ray

    model = load(cut)
    params = SamplingParams(100, "text", text=PhaseSampling(0))
    [document] = generate(model, [Document((Text("Which digit?", "user"),))], [params])
    assert len(set(document.text)) > 10

    def answer() -> Heard:
        return listen(url, "Which digit?", model="pair", max_tokens=100)

    expected = Heard(document.text, finish="length")
    assert answer() == expected

    [lost] = followers()
    begun = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(listen, url, "Which digit?", begun, model="pair")
        begun.wait(PATIENCE)
        ray.kill(ray.get_actor(lost, namespace="serve"))
        heard = stream.result()
    assert heard.error is None, "it goes on at the replacement"
    known = min(len(heard.text), len(document.text) - 4)  # the last character may be cut
    assert heard.text
    assert heard.text[:known] == document.text[:known]
    until(lambda: len(followers()) == 1 and followers() != [lost], "another replica with its own second process")
    until(lambda: answer() == expected, "an answer of the new replica")
    assert len(followers()) == 1
    with pytest.raises(ServeError, match=r"pair-like.* need 900 CPU on one node each, and the cluster has room for 0"):
        start_model(ModelSettings(model="pair-like", tensor_parallel=2, cpus_per_replica=900), str(cut), "talkative")


@pytest.mark.cluster
def test_a_replica_whose_engine_is_lost_is_replaced_and_no_request_with_it(url: str) -> None:
    [engine] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if MODULE in (process.info["cmdline"] or ()) and ":tiny:" in "".join(process.parent().cmdline())
    ]
    engine.kill()
    heard = listen(url, "Draw", model="tiny", max_tokens=5, seed=1, temperature=1)
    assert (heard.error, heard.finish) in ((None, "length"), (None, "stop"))


@pytest.mark.cluster
def test_prompts_that_begin_alike_share_a_replica_and_its_death_ends_no_stream(url: str) -> None:
    until(lambda: len(replicas(url, "talkative")) == 2, "a second replica")
    names = sorted(replicas(url, "talkative"))

    def where(text: str) -> str:
        return preferred_replica(
            prefix_key(GenerationRequest("", Document((Text(text, "user"),)), SamplingParams())), names
        )

    texts = [f"question {number}" for number in range(40)]
    lost = [text for text in texts if where(text) == names[0]][:3]
    kept = [text for text in texts if where(text) == names[1]][:3]
    begun = threading.Barrier(7)
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(listen, url, text, begun) for text in lost + kept]
        begun.wait(PATIENCE)  # all six have text by now
        kill(engine_application("talkative"), names[0])
        heard = [stream.result() for stream in streams]
    assert [one.error for one in heard] == [None] * 6
    assert all(one.whole for one in heard), "those of the lost replica go on at the other"
    assert all(one.whole for one in ThreadPoolExecutor(6).map(lambda text: listen(url, text), texts[:6]))
    until(lambda: len(replicas(url, "talkative") - {names[0]}) == 2, "a replacement of the lost replica")


@pytest.mark.cluster
def test_a_new_version_takes_over_without_a_lost_request(
    url: str, registry: str, model_directory: Path, tmp_path: Path
) -> None:
    from ray import serve

    old = engine_application("tiny")
    stop, results = threading.Event(), []

    def ask_on_and_on(seed: int) -> None:
        asked = body("Draw", model="tiny", max_tokens=20, seed=seed, temperature=1)
        while not stop.is_set():
            reply = requests.post(url + CHAT, json=asked, timeout=PATIENCE)
            results.append((seed, reply.status_code, reply.text if reply.status_code != 200 else ""))

    threads = [threading.Thread(target=ask_on_and_on, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        name_champion(registry, shutil.copytree(model_directory, tmp_path / "next"))
        until(lambda: old not in serve.status().applications, "the old version's end")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(results) > 10
    assert [result for result in results if result[1] != 200] == []
    assert engine_application("tiny") != old


@pytest.mark.cluster
def test_a_full_server_answers_probes_and_ends_every_stream_whole_when_the_command_is_told_to_end(
    url: str, settings: ServeSettings, command: subprocess.Popen[str]
) -> None:
    """Streams wait at the engines and, for a request slot, in the ingress."""
    from ray import serve

    lasting, brief = 2 * FULL, 6 * FULL
    begun = threading.Barrier(lasting + 1)
    with ThreadPoolExecutor(lasting + brief) as pool:
        streams = [pool.submit(listen, url, f"last {number}", begun, max_tokens=2 * LONG) for number in range(lasting)]
        begun.wait(PATIENCE)
        streams += [pool.submit(listen, url, f"then {number}", max_tokens=40) for number in range(brief)]
        until(lambda: being_answered(url, "talkative") == lasting + brief, "a full server")
        for path in ("/health", "/health?model=pair", "/ready"):
            assert requests.get(url + path, timeout=SOON).status_code == 200
        assert len(replicas(url, "talkative")) == 2, "a full replica tells its numbers"
        assert not any(stream.done() for stream in streams[:lasting]), "answered before any of them has ended"
        command.send_signal(signal.SIGTERM)
        until(lambda: requests.get(f"{url}/ready", timeout=SOON).status_code == 503, "the drain")
        refused = requests.post(url + CHAT, json=body(), timeout=SOON)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert not any(stream.done() for stream in streams[:lasting]), "refused while they go on"
        command.send_signal(signal.SIGTERM)  # as some do that lose patience
        heard = [stream.result() for stream in streams]
    assert [(one.error, one.finish, len(one.text)) for one in heard] == [(None, "length", 2 * LONG)] * lasting + [
        (None, "length", 40)
    ] * brief
    assert command.wait(PATIENCE) == 0
    assert command.stdout is not None
    assert command.stdout.read().endswith("stopped talkative\n")
    with pytest.raises(requests.RequestException):
        requests.get(f"{url}/health", timeout=PATIENCE).raise_for_status()
    assert not followers(), "all processes of a replica end with it"
    undeploy(settings.name)  # what another process has ended already
    assert not serve.status().applications
