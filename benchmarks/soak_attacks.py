"""The attacks of soak.py."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil
import requests
from PIL import Image as PILImage
from serving import ENGINE_PROCESS, PATIENCE, Heard, ask, kill_one, mixed, replicas

REPLICAS, SEEDS, ATTACKERS, EVERY = 2, 24, 6, 20.0
BRIEF = {"modalities": ["text"], "max_tokens": 16, "seed": 7, "messages": [{"role": "user", "content": "Which one?"}]}
ROLES = {"Ingress": ":Ingress", "replica": ":Engine", "engine": ENGINE_PROCESS, "proxy": "ProxyActor"}


def content(heard: Heard) -> str:
    return "".join(heard.content)


def role_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        for role, mark in ROLES.items():
            if (mark in words) if role == "engine" else mark in "".join(words[:1]):
                return role
    return None


@dataclass
class Tally:
    """Ended answers of somebody, by what came of them."""

    counts: Counter[str] = field(default_factory=Counter)
    seen: list[str] = field(default_factory=list)  # some of what was not right
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, heard: Heard, expected: str, request: object = "") -> str:
        if heard.error is not None and heard.error.startswith("429"):
            what = "refused (429)"
        elif heard.error is not None:
            what = "error"
        elif heard.finish is None:
            what = "lost"
        else:
            what = "right" if content(heard) == expected else "wrong"
        with self.lock:
            self.counts[what] += 1
            if what in ("error", "lost", "wrong") and len(self.seen) < 20:
                self.seen.append(f"{time.monotonic():.1f} {what} {request} {heard.error or ''}")
        return what

    def only(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1


@dataclass
class Arena:
    url: str
    key: str  # of those who attack
    poison: list[int]
    alone: dict[int, str]
    tally: Tally
    begin: float = 0.0
    end: float = 0.0

    def now(self) -> bool:
        return time.monotonic() < self.end

    def several(self, attack: Callable[[int], None], most: int = ATTACKERS) -> None:
        def on_and_on(number: int) -> None:
            while self.now():
                attack(number)

        with ThreadPoolExecutor(most) as pool:
            list(pool.map(on_and_on, range(most)))

    def post(self, path: str, body: dict[str, Any]) -> requests.Response | None:
        try:
            headers = {"Authorization": f"Bearer {self.key}"}
            return requests.post(self.url + path, json=body, timeout=PATIENCE, headers=headers)
        except requests.RequestException as error:
            self.tally.only(type(error).__name__)
            return None

    def every(self, act: Callable[[], str]) -> None:
        """Every EVERY seconds, from the beginning on, where all replicas run."""
        while self.now():
            if replicas() == REPLICAS:
                with contextlib.suppress(ValueError, psutil.Error):  # it has gone by itself meanwhile
                    self.tally.only(act())
                time.sleep(max(0.0, min(EVERY, self.end - time.monotonic())))
            time.sleep(0.5)


def kills(arena: Arena) -> None:
    def kill() -> str:
        kill_one(arena.url)
        return "replicas killed"

    arena.every(kill)


def stops(arena: Arena) -> None:
    def suspend() -> str:
        engines = [process for process in psutil.process_iter() if role_of(process) == "engine"]
        random.choice(engines).send_signal(signal.SIGSTOP)
        return "engines stopped"

    arena.every(suspend)


def poison(arena: Arena) -> None:
    def attack(number: int) -> None:
        reply = arena.post("/v1/completions", {"prompt": arena.poison, "max_tokens": 8, "seed": number})
        if reply is not None:
            code = "" if reply.status_code == 200 else f" {reply.json()['error']['code']}"
            arena.tally.only(f"{reply.status_code}{code}")

    arena.several(attack)


def slow_readers(arena: Arena) -> None:
    def attack(number: int) -> None:
        seed = number % SEEDS
        heard = ask(arena.url, mixed(seed), key=arena.key, pause=max(0.0, arena.end - time.monotonic()))
        arena.tally.add(heard, arena.alone[seed], seed)

    arena.several(attack, 4 * ATTACKERS)


def bombs(arena: Arena) -> None:
    buffer = io.BytesIO()
    PILImage.new("1", (8000, 8000)).save(buffer, format="PNG")
    bomb = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()},
    }
    question = {"modalities": ["text"], "max_tokens": 4, "messages": [{"role": "user", "content": [bomb] * 16}]}

    def attack(number: int) -> None:
        reply = arena.post("/v1/chat/completions", question)
        if reply is not None:
            arena.tally.only(str(reply.status_code))

    arena.several(attack)


def choices(arena: Arena) -> None:
    def attack(number: int) -> None:
        reply = arena.post("/v1/chat/completions", BRIEF | {"n": 36, "max_tokens": 48})
        if reply is not None:
            arena.tally.only(str(reply.status_code))
            if reply.status_code == 429:
                time.sleep(0.5)

    arena.several(attack)


ATTACKS = {
    "kills": kills,
    "stops": stops,
    "poison": poison,
    "slow readers": slow_readers,
    "bombs": bombs,
    "choices": choices,
}
