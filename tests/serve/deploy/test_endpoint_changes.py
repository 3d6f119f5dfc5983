"""The endpoint while what serves changes: versions that follow each other, fewer replicas, the end."""

from __future__ import annotations

import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from calumma.serve.deploy.applications import build_model
from calumma.serve.deploy.endpoint import undeploy
from calumma.serve.deploy.naming import ENGINE
from calumma.serve.settings import ModelSettings, ServeSettings

from .conftest import (
    CHAT,
    FULL,
    LONG,
    PATIENCE,
    SOON,
    Heard,
    applications,
    being_answered,
    body,
    engine_application,
    engines,
    followers,
    listen,
    name_champion,
    replicas,
    until,
)


@pytest.mark.cluster
def test_a_new_version_takes_over_and_what_the_old_one_began_ends_there(url: str, registry: str, cut: Path) -> None:
    """The old version is held up by a signal from when its streams have begun until the new one answers."""
    from ray import serve

    old, stop, results = engine_application("tiny"), threading.Event(), []
    [engine] = [psutil.Process(pid) for pid in engines(old)]

    def ask(seed: int, tokens: int = 20, begun: threading.Barrier | None = None) -> Heard:
        return listen(url, "Draw", begun, model="tiny", max_tokens=tokens, seed=seed, temperature=1)

    def ask_on_and_on(seed: int) -> None:
        while not stop.is_set():
            results.append((seed, ask(seed)))

    alone = {seed: ask(seed) for seed in range(3)}
    long = {seed: heard for seed in range(9) if len((heard := ask(seed, 100)).text) > 100}
    threads = [threading.Thread(target=ask_on_and_on, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    try:
        name_champion(registry, cut)
        until(lambda: len(applications("tiny")) == 2, "the start of the next version")
        with ThreadPoolExecutor(len(long)) as pool:
            while True:  # one that has ended already would prove nothing
                begun = threading.Barrier(len(long) + 1)
                streams = {seed: pool.submit(ask, seed, 100, begun) for seed in long}
                begun.wait(PATIENCE)
                engine.suspend()
                if not any(stream.done() for stream in streams.values()):
                    break
                engine.resume()
            until(lambda: requests.get(f"{url}/health?model=tiny").json()["context"] == 2048, "the new version's turn")
            assert not any(stream.done() for stream in streams.values())
            after = {seed: ask(seed) for seed in alone}
            engine.resume()
            assert {seed: stream.result() for seed, stream in streams.items()} == long, "as if nothing had happened"
        until(lambda: old not in serve.status().applications, "the old version's end")
    finally:
        if engine.is_running():
            engine.resume()
        stop.set()
        for thread in threads:
            thread.join()
    assert after != alone, "another model"
    assert len(results) > 10
    assert [(seed, heard) for seed, heard in results if heard not in (alone[seed], after[seed])] == []
    assert engine_application("tiny") != old


def scale(application: str, model: ModelSettings, source: Path, replicas: int, drain_seconds: float) -> None:
    """Change the number of replicas as Ray Serve does it for its autoscaler: those that stay are not touched."""
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig
    from ray.serve.context import _get_global_client
    from ray.serve.generated.serve_pb2 import DeploymentRoute

    controller = _get_global_client()._controller
    info = DeploymentRoute.FromString(ray.get(controller.get_deployment_info.remote(ENGINE, application)))
    now: Any = build_model(model, str(source))
    changed = now._bound_deployment.options(
        version=info.deployment_info.version,
        autoscaling_config=AutoscalingConfig(min_replicas=replicas, max_replicas=replicas),
        graceful_shutdown_timeout_s=drain_seconds,
        _internal=True,
    )
    serve.run(changed.bind(*changed.init_args), name=application, route_prefix=None)


@pytest.mark.cluster
def test_streams_of_a_replica_that_is_not_needed_any_more_go_on_at_another(
    url: str, settings: ServeSettings, talkative: Path
) -> None:
    """It gets less time to drain than its streams need."""
    until(lambda: len(replicas(url, "talkative")) == 2, "two replicas")
    before = replicas(url, "talkative")
    begun = threading.Barrier(5)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(listen, url, f"shrink {number}", begun, max_tokens=2 * LONG) for number in range(4)]
        begun.wait(PATIENCE)
        scale(engine_application("talkative"), settings, talkative, 1, drain_seconds=0.5)
        heard = [stream.result() for stream in streams]
    assert heard == [Heard("s" * 2 * LONG, finish="length")] * 4
    until(lambda: len(replicas(url, "talkative")) == 1, "one replica")
    assert replicas(url, "talkative") < before


@pytest.mark.cluster
def test_a_full_server_answers_probes_and_ends_every_stream_whole_when_the_command_is_told_to_end(
    url: str, settings: ServeSettings, command: subprocess.Popen[str]
) -> None:
    """Streams wait at the engines and, for a request slot, in the ingress."""
    from ray import serve

    lasting, brief = FULL, 6 * FULL
    begun = threading.Barrier(lasting + 1)
    with ThreadPoolExecutor(lasting + brief) as pool:
        streams = [pool.submit(listen, url, f"last {number}", begun, max_tokens=2 * LONG) for number in range(lasting)]
        begun.wait(PATIENCE)
        streams += [pool.submit(listen, url, f"then {number}", max_tokens=40) for number in range(brief)]
        until(lambda: being_answered(url, "talkative") == lasting + brief, "a full server")
        for path in ("/health", "/health?model=pair", "/ready"):
            assert requests.get(url + path, timeout=SOON).status_code == 200
        assert replicas(url, "talkative"), "a full replica tells its numbers"
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
