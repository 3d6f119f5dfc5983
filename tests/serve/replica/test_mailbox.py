"""What the engine's thread posts reaches the request's task: all of it, in order, waking it no more than needed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.serve.replica.mailbox import Mailbox

FAR = 3600.0  # seconds nobody waits for


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


@given(st.lists(st.integers() | st.text(), min_size=1, max_size=200), st.floats(0, 0.002))
def test_whatever_a_thread_posts_arrives_once_and_in_order(items: list[Any], patience: float) -> None:
    async def read() -> list[Any]:
        mailbox: Mailbox[Any] = Mailbox((str,))
        thread = threading.Thread(target=lambda: [mailbox.post(item) for item in items])
        thread.start()
        found: list[Any] = []
        while len(found) < len(items):
            taken = await mailbox.take(asyncio.get_running_loop().time() + patience)
            assert taken
            found += taken
        thread.join()
        return found

    assert run(read()) == items


def test_the_first_is_not_waited_with_and_what_can_wait_comes_together_with_what_cannot() -> None:
    async def read() -> list[list[Any]]:
        mailbox: Mailbox[Any] = Mailbox((str,))
        mailbox.post("a")
        first = await mailbox.take()
        mailbox.post("b")
        reader = asyncio.create_task(mailbox.take(asyncio.get_running_loop().time() + FAR))
        for item in ("c", "d", 1):
            await asyncio.to_thread(mailbox.post, item)
        return [first, await reader]

    assert run(read()) == [["a"], ["b", "c", "d", 1]]


def test_a_reader_with_enough_for_now_is_woken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read() -> int:
        loop = asyncio.get_running_loop()
        mailbox: Mailbox[Any] = Mailbox((str,))
        woken: list[Any] = []
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda call, *rest: woken.append(call) or loop.call_soon(call)
        )
        mailbox.post("a")
        reader = asyncio.create_task(mailbox.take(loop.time() + FAR))
        await asyncio.sleep(0)
        for item in ["b"] * 50 + [1, 2]:
            mailbox.post(item)
        assert len(await reader) == 53
        return len(woken)

    assert run(read()) == 1


def test_posting_to_somebody_who_has_gone_is_fine() -> None:
    async def read() -> Mailbox[int]:
        mailbox: Mailbox[int] = Mailbox(())
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        reader.cancel()
        return mailbox

    mailbox = run(read())
    mailbox.post(1)
    assert asyncio.run(mailbox.take()) == [1]
