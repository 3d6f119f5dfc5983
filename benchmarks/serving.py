"""The endpoint under load: `python benchmarks/serving.py [MODEL] [--minutes 3] [--kill-every 20] [--chart FILE]`.

In a Ray cluster of its own it measures, in this order:
- HTTP over the bare engine: tokens a second of `--clients` text streams, through Ray Serve and by an engine in this
  process with the same requests; and the time to the first token.
- Load: 64 clients with mixed modes, some of which leave in the middle, while a replica is killed every `--kill-every`
  seconds. Each whole answer is compared with what the same request got alone; memory and cache are looked at.
- Autoscaling: replicas over time, with load from the start and without from the middle.
Without MODEL one with random weights is made, of the quickstart's shape or `--preset`: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import requests
import torch
import yaml

from calumma.model import MixedModalModel, load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import save_model
from calumma.model.document import Document, Text
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.transformer import Transformer
from calumma.platform.cluster import connection
from calumma.serve.deploy.endpoint import deploy, undeploy
from calumma.serve.replica.engine.process import MODULE as ENGINE_PROCESS
from calumma.serve.settings import ServeSettings

CHAT = "/v1/chat/completions"
RECIPES = Path(__file__).parents[1] / "jobs" / "recipes" / "quickstart"
NAME = "load"
PATIENCE = 600
ROUNDS = 3
SETTLED = 15.0  # seconds that the chart goes on when it is all over
TEXTS = ["Draw a seven.", "Count from two to four, with pictures.", "Which digit follows three?", "Write nine."]


def random_model(folder: Path, preset: str | None) -> Path:
    """A model directory with random weights, of a preset's Transformer or the quickstart's."""
    torch.manual_seed(0)
    quickstart = yaml.safe_load((RECIPES / "stage1.yaml").read_text())["model"]
    shape = {"preset": preset, "context": 1024} if preset else quickstart
    image = ImageTokenizerConfig(**yaml.safe_load((RECIPES / "train_image_tokenizer.yaml").read_text())["model"])
    vocabulary = train_text_tokenizer(TEXTS * 50, folder, vocabulary_size=600, image_codes=image.codebook_size)
    ImageTokenizer(image).save(folder / "image")
    config = ModelConfig.model_validate(shape | {"vocabulary_size": vocabulary.size, "dropout": 0.0})
    save_model(folder / "model", Transformer(config).initialize(0), folder, folder / "image")
    return folder / "model"


# ---- one client


@dataclass
class Heard:
    """What a client got of one answer."""

    content: list[str] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    first: float = 0.0  # seconds
    seconds: float = 0.0
    tokens: int = 0
    left: bool = False


def ask(url: str, body: dict[str, Any], leave: float = 1.0, key: str = "none", pause: float = 0.0) -> Heard:
    """Stream an answer; with `leave` below 1, leave after that share of its first ten events. pause: seconds before the
    first of it is read."""
    heard, begin = Heard(), time.perf_counter()
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with requests.post(url + CHAT, json=body, stream=True, timeout=PATIENCE, headers=headers) as reply:
            if reply.status_code != 200:
                heard.error = f"{reply.status_code}: {reply.text[:200]}"
                return heard
            time.sleep(pause)
            for number, chunk in enumerate(_chunks(reply)):
                if leave < 1 and number >= leave * 10:
                    heard.left = True
                    return heard
                if "error" in chunk:
                    heard.error = chunk["error"]["code"] or chunk["error"]["message"]
                    continue
                heard.tokens = chunk.get("usage", {}).get("completion_tokens", heard.tokens)
                for choice in chunk["choices"]:
                    delta = choice["delta"]
                    new = [delta.get("content") or "", *(i["image_url"]["url"] for i in delta.get("images") or [])]
                    if any(new) and not heard.first:
                        heard.first = time.perf_counter() - begin
                    heard.content += new
                    heard.finish = choice["finish_reason"] or heard.finish
    except requests.RequestException as error:
        heard.error = type(error).__name__
    heard.seconds = time.perf_counter() - begin
    return heard


def _chunks(reply: requests.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def mixed(seed: int) -> dict[str, Any]:
    """A request of one of three modes, the same for the same seed."""
    modes: list[dict[str, Any]] = [
        {"modalities": ["text"], "max_tokens": 48},
        {"modalities": ["image"]},
        {"modalities": ["text", "image"], "max_tokens": 90, "temperature": 1.0, "begin_with": "image"},
    ]
    return {"messages": [{"role": "user", "content": TEXTS[seed % len(TEXTS)]}], "seed": seed} | modes[
        seed % len(modes)
    ]


# ---- HTTP over the bare engine


def length(client: int, turn: int, mean: int) -> int:
    """Tokens of an answer, from half the mean to one and a half: clients do not ask in step."""
    return mean // 2 + (client * 37 + turn * 61) % (mean + 1)


def bare(model: MixedModalModel, clients: int, turns: int, tokens: int) -> float:
    """Tokens a second of an engine in this process, for that many clients, each of which asks again when it has its
    answer. Greedy: of random weights such answers never end by themselves."""
    engine = Engine(model.transformer, model.vocabulary, model.image_length, max_sequences=clients)

    def ask_again(client: int, turn: int) -> None:
        prompt = model.encode(Document((Text(TEXTS[client % len(TEXTS)], "user"),)), complete=False)
        params = SamplingParams(length(client, turn, tokens), "text", text=PhaseSampling(0.0, 1.0))
        engine.add(Request(f"{client} {turn}", prompt, params))

    for client in range(clients):
        ask_again(client, 0)
    begin, made = time.perf_counter(), 0
    while engine.has_work:
        for event in engine.step():
            made += len(event.tokens)
            client, turn = map(int, event.request_id.split())
            if event.finish is not None and turn + 1 < turns:
                ask_again(client, turn + 1)
    return made / (time.perf_counter() - begin)


def over_http(url: str, clients: int, turns: int, tokens: int) -> tuple[float, list[float], float]:
    """The same through the endpoint, the time to each answer's first token, and the share of a core that this process
    took meanwhile. The client parses little of what it gets: where cores are few it takes them from the server."""

    async def answer(session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[int, float]:
        begin, first, tail = time.perf_counter(), 0.0, b""
        async with session.post(url + CHAT, json=body) as reply:
            async for piece in reply.content.iter_any():
                tail = (tail + piece)[-4096:]
                if not first and re.search(rb'"content":\s*"[^"]', tail):
                    first = time.perf_counter() - begin
            if reply.status != 200 or b"data: [DONE]" not in tail:
                raise RuntimeError(f"a request failed: {reply.status}, {tail.decode(errors='replace')[-200:]}")
        [*_, usage] = re.findall(rb'"completion_tokens":\s*(\d+)', tail)
        return int(usage), first

    async def client(session: aiohttp.ClientSession, number: int) -> list[tuple[int, float]]:
        body = {"messages": [{"role": "user", "content": TEXTS[number % len(TEXTS)]}], "modalities": ["text"]}
        body |= {"temperature": 0.0, "repetition_penalty": 1.0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return [await answer(session, body | {"max_tokens": length(number, turn, tokens)}) for turn in range(turns)]

    async def everyone() -> list[tuple[int, float]]:
        patience = aiohttp.ClientTimeout(PATIENCE)
        async with aiohttp.ClientSession(timeout=patience, headers={"Authorization": "Bearer none"}) as session:
            return list(itertools.chain(*await asyncio.gather(*(client(session, n) for n in range(clients)))))

    begin, busy = time.perf_counter(), time.process_time()
    heard = asyncio.run(everyone())
    seconds = time.perf_counter() - begin
    return sum(n for n, _ in heard) / seconds, [f for _, f in heard if f], (time.process_time() - busy) / seconds


def compare(url: str, directory: str, clients: int = 16, turns: int = 3, tokens: int = 200) -> None:
    """HTTP and the bare engine in turns, for the machine's speed changes from one minute to the next; a row each."""
    torch.set_num_threads(1)
    model = load(directory)
    pairs, firsts = [], list[float]()
    for _ in range(ROUNDS):
        served, found, busy = over_http(url, clients, turns, tokens)
        firsts += found
        pairs.append((served / (alone := bare(model, clients, turns, tokens)), served, alone, busy))
    ratio, served, alone, busy = sorted(pairs)[len(pairs) // 2]
    cuts = statistics.quantiles(firsts, n=100)
    print(f"| HTTP, {clients} clients | {served:.0f} tokens/s | {ratio:.2f} of the bare engine's {alone:.0f} |")
    print(f"| these clients | {busy:.2f} of a core | |")
    print(f"| time to first token | p50 {cuts[49] * 1000:.0f} ms | p99 {cuts[98] * 1000:.0f} ms |", flush=True)


# ---- load


def replicas() -> int:
    """Engine replicas that run."""
    from ray import serve

    engines = (app.deployments.get("Engine") for app in serve.status().applications.values())
    return sum(engine.replica_states.get("RUNNING", 0) for engine in engines if engine is not None)


def kill_one(url: str) -> None:
    """Kill a replica, any of those that tell their numbers."""
    import ray
    from ray import serve

    page = requests.get(f"{url}/metrics", timeout=PATIENCE).text
    names = re.findall(r'calumma_engine_requests_running\{.*replica="([^"]+)"', page)
    [application] = [name for name in serve.status().applications if ":" in name]
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{application}#Engine#{random.choice(names)}", namespace="serve"))


def memory_of_replicas() -> list[float]:
    """MiB of each process of an engine replica: of its own, and its engine's."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "Engine" in "".join(process.cmdline()[:1]) or ENGINE_PROCESS in process.cmdline():
                found.append(process.memory_info().rss / 2**20)
    return found


def under_load(url: str, clients: int, seconds: float, kill_every: float) -> dict[str, Any]:
    """Mixed requests on and on. What came of them, and what the replicas looked like meanwhile."""
    seeds = 24
    alone = {seed: ask(url, mixed(seed)).content for seed in range(seeds)}
    alone = {seed: "".join(content) for seed, content in alone.items()}
    counts: Counter[str] = Counter()
    wrong: list[int] = []
    memory: list[float] = []
    kills: list[float] = []
    errors: list[float] = []
    end = time.monotonic() + seconds
    lock = threading.Lock()

    def client(number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            seed = dice.randrange(seeds)
            heard = ask(url, mixed(seed), leave=dice.random() if dice.random() < 0.2 else 1.0)
            with lock:
                if heard.left:
                    counts["left by the client"] += 1
                elif heard.error is not None:
                    counts[f"ended with an error ({heard.error[:60]})"] += 1
                    errors.append(time.monotonic())
                elif heard.finish is None:
                    counts["lost"] += 1
                elif "".join(heard.content) != alone[seed]:
                    wrong.append(seed)
                else:
                    counts["right"] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    next_kill = time.monotonic() + kill_every if kill_every else float("inf")
    while time.monotonic() < end:
        time.sleep(1)
        memory += memory_of_replicas()
        if time.monotonic() > next_kill:
            if replicas() > 1:
                with contextlib.suppress(ValueError):  # it has gone by itself meanwhile
                    kill_one(url)
                    kills.append(time.monotonic())
            next_kill = time.monotonic() + kill_every
    for thread in threads:
        thread.join()
    time.sleep(3)
    page = requests.get(f"{url}/metrics", timeout=PATIENCE).text
    held = [float(line.split()[-1]) for line in page.splitlines() if line.startswith("calumma_engine_cache_used_ratio")]
    half = len(memory) // 2
    first, second = (max(part, default=0.0) for part in (memory[:half], memory[half:]))
    return {
        **counts,
        "wrong": len(wrong),
        "replicas killed": len(kills),
        "errors away from a kill": sum(not any(-1 < at - kill < 10 for kill in kills) for at in errors),
        "cache held afterwards": max(held, default=-1.0),
        "largest MiB of a process of a replica, first and second half": f"{first:.0f}, {second:.0f}",
    }


# ---- autoscaling


def scaling(url: str, clients: int, busy: float, idle: float) -> tuple[list[tuple[float, int]], Counter[str]]:
    """(seconds, replicas), under load for `busy` seconds and without for at most `idle`; and what came of the load."""
    begin, seen = time.monotonic(), [(0.0, replicas())]
    stop, counts = threading.Event(), Counter[str]()

    def client(number: int) -> None:
        while not stop.is_set():
            heard = ask(url, mixed(number))
            counts["whole" if heard.finish and not heard.error else heard.error or "lost"] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    settled = None  # since when one replica is left
    while (now := time.monotonic() - begin) < busy + idle and (settled is None or now < settled + SETTLED):
        if now > busy:
            stop.set()
        seen.append((now, replicas()))
        if settled is None and now > busy and seen[-1][1] == 1:
            settled = now
        time.sleep(1)
    for thread in threads:
        thread.join()
    return seen, counts


def draw(seen: list[tuple[float, int]], busy: float, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    axes.step([at for at, _ in seen], [number for _, number in seen], where="post", color="#2f7d4f")
    axes.axvspan(0, busy, color="#2f7d4f", alpha=0.12, label="under load")
    axes.set(xlabel="seconds", ylabel="engine replicas", yticks=range(5), xlim=(0, seen[-1][0]), ylim=(0, None))
    axes.legend(loc="upper right")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model directory")
    parser.add_argument("--preset", help="shape of the model that is made, say calumma-20m; default: the quickstart's")
    parser.add_argument("--parts", default="http,load,scaling")
    parser.add_argument("--clients", type=int, default=64, help="of the load")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds; 0: never")
    parser.add_argument("--replicas", type=int, default=2, help="under the load")
    parser.add_argument("--busy", type=float, default=90.0, help="seconds of load in the autoscaling part")
    parser.add_argument("--chart", type=Path, default=Path("autoscaling.png"))
    options = parser.parse_args()
    parts = options.parts.split(",")
    with tempfile.TemporaryDirectory() as folder, connection.embedded(lean=True):
        directory = options.model or str(random_model(Path(folder), options.preset))
        settings = ServeSettings(model=directory, name=NAME, port=8765, cpus_per_replica=0.5, threads=1)
        if "http" in parts:
            url = deploy(settings)
            compare(url, directory)
            undeploy(NAME)
        if "load" in parts:
            fixed = {"min_replicas": options.replicas, "max_replicas": options.replicas, "max_queued": 4096}
            url = deploy(settings.model_copy(update=fixed))
            for name, value in under_load(url, options.clients, 60 * options.minutes, options.kill_every).items():
                print(f"| {name} | {value} |", flush=True)
            undeploy(NAME)
        if "scaling" in parts:
            moving = {"max_replicas": 3, "busy_seconds": 5.0, "idle_seconds": 15.0, "max_sequences": 6}
            url = deploy(settings.model_copy(update=moving))
            seen, counts = scaling(url, 24, options.busy, 180.0)
            steps = [seen[0], *(now for before, now in itertools.pairwise(seen) if now[1] != before[1])]
            print("| replicas | " + ", ".join(f"{number} at {at:.0f} s" for at, number in steps) + " |", flush=True)
            print("| answers meanwhile | " + ", ".join(f"{n} {what}" for what, n in counts.items()) + " |", flush=True)
            draw(seen, options.busy, options.chart)
            undeploy(NAME)


if __name__ == "__main__":
    main()
