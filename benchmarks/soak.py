"""The endpoint under attack: `python benchmarks/soak.py [MODEL] [--minutes 5] [--json FILE]`.

In a Ray cluster of its own, with two replicas, 64 clients of one key ask for texts, images and interleaved answers
all the time; a bystander in a process of its own, with a key of its own, asks for short texts. One after the other
there are:
- kills: a replica is killed every 20 s
- stops: an engine's process is stopped by a signal (SIGSTOP) every 20 s
- poison: requests whose logits are NaN; the embedding of one token is, which nothing but their prompts has
- slow readers: streams whose clients read nothing until the end of the attack
- bombs: images of 64 million pixels in a few kilobytes, sixteen a request, six requests at once
- choices: requests for 36 answers, six at once
Each whole answer is compared with that of an engine that serves nobody else: right, wrong (another one), lost (without
an end), error (events and statuses, but for 429: asked again). It tells the bystander's times during each attack and as
long before it, on the same replicas (which of them its prompt leads to, and who else is there, changes with them); and
the memory of the processes, by what they are, at the start and the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from serving import PATIENCE, ask, mixed, random_model, replicas
from soak_attacks import ATTACKS, BRIEF, REPLICAS, ROLES, SEEDS, Arena, Tally, content, role_of

from calumma.model import load
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.platform.cluster import connection
from calumma.serve.deploy.endpoint import deploy, undeploy
from calumma.serve.http.access.api_keys import hash_key, new_key
from calumma.serve.http.app import create_app
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import APIKey, ServeSettings

NAME, PORT = "soak", 8766
STALL_SECONDS = 8.0
BYSTANDERS = 4
BEFORE = "before"  # an attack


def poisonable(directory: Path, folder: Path) -> tuple[Path, list[int]]:
    """The model with one embedding that is not a number, and a prompt that has it."""
    model = load(directory)
    with torch.no_grad():
        model.transformer.embedding.weight[model.vocabulary.unknown] = float("nan")
    save_model(folder, model.transformer, directory, directory / IMAGE_TOKENIZER)
    return folder, [model.vocabulary.bos, *model.text_tokenizer.encode("Draw"), model.vocabulary.unknown]


@contextlib.contextmanager
def undisturbed(directory: Path, settings: ServeSettings) -> Iterator[str]:
    """The URL of an engine in this process, without Ray."""
    import socket

    import uvicorn

    replica = EngineReplica(load(directory), 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        app = create_app(replica, settings.model_copy(update={"keys": ()}))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
    replica.close()


def crowd(url: str, key: str, clients: int, alone: dict[int, str], tally: Tally, stop: threading.Event) -> list[Any]:
    def client(number: int) -> None:
        dice = random.Random(number)
        while not stop.is_set():
            seed = dice.randrange(SEEDS)
            if tally.add(ask(url, mixed(seed), key=key), alone[seed], seed) in ("refused (429)", "error"):
                time.sleep(0.5)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    return threads


def bystand(url: str, key: str, expected: str) -> None:
    """In a process of its own: (when it began, seconds, what came of it) of each answer, a line each, until it is
    ended."""
    tally, one_at_a_time = Tally(), threading.Lock()

    def client() -> None:
        while True:
            begin = time.monotonic()
            what = tally.add(ask(url, BRIEF, key=key), expected)
            with one_at_a_time:  # print writes a line's end by itself
                print(json.dumps([begin, time.monotonic() - begin, what]), flush=True)
            time.sleep(0.2)

    for _ in range(BYSTANDERS):
        threading.Thread(target=client, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


# ---- memory


def memory() -> dict[str, float]:
    """MiB of the largest process of each role."""
    found: dict[str, float] = {}
    for process in psutil.process_iter():
        if (role := role_of(process)) is not None:
            with contextlib.suppress(psutil.Error):
                found[role] = max(found.get(role, 0.0), process.memory_info().rss / 2**20)
    return found


class MemoryWatch:
    """The most that a process of each role had."""

    def __init__(self) -> None:
        self.most: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            for role, value in memory().items():
                self.most[role] = max(value, self.most.get(role, 0.0))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def settle() -> None:
    """Until all replicas run, and a moment more."""
    end = time.monotonic() + PATIENCE
    while replicas() != REPLICAS and time.monotonic() < end:
        time.sleep(0.5)
    time.sleep(3.0)


# ---- all of it


def soak(directory: Path, prompt: list[int], options: argparse.Namespace) -> dict[str, Any]:
    keys = {name: new_key() for name in ("crowd", "attacker", "bystander")}
    settings = ServeSettings(
        model=str(directory),
        name=NAME,
        port=PORT,
        cpus_per_replica=0.5,
        threads=1,
        min_replicas=REPLICAS,
        max_replicas=REPLICAS,
        max_queued=4096,
        stall_seconds=STALL_SECONDS,
        keys=tuple(APIKey(name=name, sha256=hash_key(key)) for name, key in keys.items()),
    )
    torch.set_num_threads(1)
    with undisturbed(directory, settings) as url:
        alone = {seed: content(ask(url, mixed(seed))) for seed in range(SEEDS)}
        brief = content(ask(url, BRIEF))
    url = deploy(settings)
    stop, all_of_it = threading.Event(), Tally()
    threads = crowd(url, keys["crowd"], options.clients, alone, all_of_it, stop)
    given = json.dumps([url, keys["bystander"], brief])
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads until the end would fill and stop it)
    bystander = subprocess.Popen(
        [sys.executable, __file__, "--bystander", given], stdin=subprocess.PIPE, stdout=said, text=True
    )
    names = [name for name in ATTACKS if name in options.attacks.split(",")]
    each = 60 * options.minutes / len(names)
    arenas: dict[str, Arena] = {}
    time.sleep(10.0)  # caches and pools are warm
    watch, at_start = MemoryWatch(), memory()
    for name in (part for attack in names for part in (f"{BEFORE} {attack}", attack)):
        arena = arenas[name] = Arena(url, keys["attacker"], prompt, alone, Tally())
        arena.begin = time.monotonic()
        arena.end = arena.begin + each
        before = Counter(all_of_it.counts)
        ATTACKS.get(name, lambda arena: time.sleep(each))(arena)
        arena.end = time.monotonic()
        arena.tally.seen += [str(dict(all_of_it.counts - before))]
        print(f"{name}: {dict(arena.tally.counts)} beside {arena.tally.seen[-1]}", file=sys.stderr, flush=True)
        settle()
    stop.set()
    for thread in threads:
        thread.join()
    bystander.communicate("")
    time.sleep(5.0)
    watch.close()
    at_end = memory()
    said.seek(0)
    times = [json.loads(line) for line in said]
    undeploy(NAME)
    return {
        "clients": dict(all_of_it.counts),
        "seen": all_of_it.seen,
        "bystander": dict(Counter(what for *_, what in times)),
        "attacks": {name: dict(arena.tally.counts) for name, arena in arenas.items()},
        "p99": {name: quantile([s for at, s, _ in times if a.begin <= at < a.end], 0.99) for name, a in arenas.items()},
        "p50": {name: quantile([s for at, s, _ in times if a.begin <= at < a.end], 0.5) for name, a in arenas.items()},
        "memory": {role: [at_start.get(role), at_end.get(role), watch.most.get(role)] for role in ROLES},
    }


def quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1] if len(values) > 1 else -1.0


def show(found: dict[str, Any]) -> None:
    print("| | right | wrong | lost | error | refused (429) |\n|---|---|---|---|---|---|")
    for who in ("clients", "bystander"):
        kinds = ("right", "wrong", "lost", "error", "refused (429)")
        print(f"| {who} | " + " | ".join(str(found[who].get(kind, 0)) for kind in kinds) + " |")
    print("\n| attack | bystander's p50 before, during | p99 before, during | ratio | what came of it |")
    print("|---|---|---|---|---|")
    for name, attacked in found["attacks"].items():
        if f"{BEFORE} {name}" in found["p99"]:
            (p50, p99), (calm50, calm99) = (
                (found["p50"][part], found["p99"][part]) for part in (name, f"{BEFORE} {name}")
            )
            came = ", ".join(f"{number} {what}" for what, number in attacked.items())
            print(f"| {name} | {calm50:.2f}, {p50:.2f} s | {calm99:.2f}, {p99:.2f} s | {p99 / calm99:.2f} | {came} |")
    print("\n| largest process, MiB | start | end | most |\n|---|---|---|---|")
    for role, numbers in found["memory"].items():
        print(f"| {role} | " + " | ".join("" if n is None else f"{n:.0f}" for n in numbers) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", type=Path, help="model directory; default: random weights, the quickstart's shape"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of attacks, and as many without (default: 5)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--json", type=Path, help="file for what was found")
    parser.add_argument("--bystander", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bystander:
        bystand(*json.loads(options.bystander))
    with tempfile.TemporaryDirectory() as folder, connection.embedded(lean=True):
        made, prompt = poisonable(options.model or random_model(Path(folder), None), Path(folder) / "poisonable")
        found = soak(made, prompt, options)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
