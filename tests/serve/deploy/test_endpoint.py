"""The endpoint on a real cluster: several models, several answers to a request, replicas that die."""

from __future__ import annotations

import base64
import io
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from PIL import Image as PILImage

from calumma.model import generate, load
from calumma.model.document import Document, Text
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.serve.deploy.applications import start_model
from calumma.serve.deploy.endpoint import deploy
from calumma.serve.deploy.preparation import ServeError
from calumma.serve.deploy.routing import preferred_replica, prefix_key
from calumma.serve.protocol import GenerationRequest
from calumma.serve.settings import ModelSettings, ServeSettings

from ..conftest import free_port
from .conftest import (
    CHAT,
    COLD,
    PATIENCE,
    SOON,
    Heard,
    body,
    engine_application,
    engine_of,
    engines,
    followers,
    listen,
    replicas,
    until,
)


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
    [engine] = engines(engine_application("tiny"))
    psutil.Process(engine).kill()
    heard = listen(url, "Draw", model="tiny", max_tokens=5, seed=1, temperature=1)
    assert (heard.error, heard.finish) in ((None, "length"), (None, "stop"))


@pytest.mark.cluster
def test_a_request_whose_numbers_are_none_fails_alone_and_nowhere_else(url: str, talkative: Path) -> None:
    before = replicas(url, "talkative")
    poison = {"prompt": [load(talkative).vocabulary.unknown], "max_tokens": 5}
    begun = threading.Barrier(5)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(listen, url, f"beside {number}", begun) for number in range(4)]
        begun.wait(PATIENCE)
        failed = [requests.post(f"{url}/v1/completions", json=poison, timeout=PATIENCE) for _ in range(4)]
        assert [stream.result().whole for stream in streams] == [True] * 4
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in failed] == [(500, "request_failed")] * 4
    assert replicas(url, "talkative") == before


@pytest.mark.cluster
def test_prompts_that_begin_alike_share_a_replica_and_one_that_hangs_ends_no_stream(url: str) -> None:
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
        engine_of(engine_application("talkative"), names[0]).suspend()
        heard = [stream.result() for stream in streams]
    assert [one.error for one in heard] == [None] * 6
    assert all(one.whole for one in heard), "those of the replica that hangs go on at the other"
    assert all(one.whole for one in ThreadPoolExecutor(6).map(lambda text: listen(url, text), texts[:6]))
    until(lambda: len(replicas(url, "talkative") - {names[0]}) == 2, "a replacement of the lost replica")
