"""A runner of batches that is to be killed: ROOT LOG HOLD. It writes to LOG which lines it asks for, and asks for ever
from the HOLD-th on."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from calumma.serve.batches.runner import BatchRunner, Reply
from calumma.serve.batches.store import Store


async def main(root: str, log: Path, hold: int) -> None:
    asked = 0

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        nonlocal asked
        asked += 1
        with log.open("a") as file:
            file.write(f"{json.loads(body)['prompt']}\n")
        if asked >= hold:
            await asyncio.get_running_loop().create_future()
        return Reply(200, json.dumps({"text": json.loads(body)["prompt"]}).encode(), f"req_{asked}")

    await BatchRunner(Store(root), ask, 2, 100, poll_seconds=0.02).run()


asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
