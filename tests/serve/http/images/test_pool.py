"""Clients' images: what is opened, what is refused and in which words, and what a bad one costs others."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import pytest
import requests
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.images import preprocess
from calumma.serve.http.app import create_app
from calumma.serve.http.images import pool as pools
from calumma.serve.http.images.pool import EncodedImage, ImagePool, ImageRefused
from calumma.serve.http.images.turns import Turns
from calumma.serve.settings import Limits

from ...conftest import StubBackend, listening
from ..conftest import CHAT, ask, error_of, stub_settings

PIXELS = 10_000


def encoded(image: PILImage.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


RED = PILImage.new("RGB", (12, 9), (200, 30, 60))
PNG = encoded(RED, "PNG")


@pytest.fixture(scope="module")
def pool() -> Iterator[ImagePool]:
    pool = ImagePool(1, 300.0, PIXELS, 2 * PIXELS)
    yield pool
    pool.close()


def squares(pool: ImagePool, *files: bytes | str, side: int | None = 8) -> list[PILImage.Image]:
    return asyncio.run(pool.squares([EncodedImage(data) for data in files], side, ""))


def refusal(pool: ImagePool, *files: bytes | str) -> ImageRefused:
    with pytest.raises(ImageRefused) as refused:
        squares(pool, *files)
    return refused.value


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_five_formats_are_opened(pool: ImagePool, form: str) -> None:
    (image,) = squares(pool, encoded(RED, form))
    assert (image.mode, image.size) == ("RGB", (8, 8))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) print\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (EPS, "a PostScript document"),
        (b"<!DOCTYPE html><html><body>", "an HTML page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture, which is not decoded; convert it to PNG, JPEG, WebP"),
        (encoded(RED, "TIFF"), "a TIFF picture, which is not decoded; convert it to PNG, JPEG, WebP, GIF or BMP"),
        (encoded(RED, "ICO"), "an icon"),
        (b"<svg/>", "an SVG drawing"),
        (b"", "nothing"),
        (PNG[:40], "a PNG picture that"),
        (b"%PDF-1.7", "a PDF document"),
    ],
)
def test_other_bytes_are_told_what_they_are(pool: ImagePool, data: bytes, says: str) -> None:
    refused = refusal(pool, PNG, data)
    assert (refused.index, refused.code) == (1, "invalid_image")
    assert says in str(refused)
    assert "0x" not in str(refused)


def test_postscript_labelled_png_runs_nothing(pool: ImagePool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    other = ImagePool(1, 300.0, PIXELS, PIXELS)
    try:
        refusal(other, base64.b64encode(EPS).decode())
        refusal(other, b"\xc5\xd0\xd3\xc6" + EPS)
    finally:
        other.close()
    assert not (tmp_path / "ran").exists()


def test_sizes_are_told_from_headers(pool: ImagePool) -> None:
    bomb = encoded(PILImage.new("1", (20_000, 20_000)), "PNG")
    assert "20000x20000 pixels; this server takes 10000" in str(refusal(pool, PNG, bomb))
    large = encoded(PILImage.new("1", (100, 90)), "PNG")
    assert len(squares(pool, large, large)) == 2
    refused = refusal(pool, large, large, large)
    assert (refused.index, refused.code) == (2, "image_too_large")
    assert "more than 20000 pixels together" in str(refused)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P"])
def test_the_model_sees_what_it_would_see_of_the_file(pool: ImagePool, fit: Any, mode: str) -> None:
    """Decoded and fitted here, an image is not changed again by a replica."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (31, 17, 4), generator=generator, dtype=torch.uint8).numpy()
    picture = PILImage.fromarray(noise, "RGBA").convert(mode)
    data = encoded(picture, "PNG")
    (square,) = asyncio.run(pool.squares([EncodedImage(data, fit)], 8, ""))
    with PILImage.open(io.BytesIO(data)) as opened:
        expected = preprocess(opened, 8, fit)
    assert torch.equal(preprocess(square, 8, fit), expected)


def test_base64_is_read_where_images_are(pool: ImagePool) -> None:
    text = base64.b64encode(PNG).decode()
    for spelled in (base64.encodebytes(PNG).decode(), text.rstrip("="), quote(text, safe=""), text.replace("=", "%3D")):
        assert squares(pool, spelled) == squares(pool, PNG)
    refused = refusal(pool, PNG, "a")
    assert (refused.index, refused.code) == (1, "invalid_base64")


def pid_of(pool: ImagePool) -> int:
    (worker,) = pool._idle
    return worker._process.pid


def test_a_process_that_hangs_or_dies_costs_its_request_alone() -> None:
    pool = ImagePool(1, 300.0, PIXELS, PIXELS)
    try:
        squares(pool, PNG)
        os.kill(pid_of(pool), signal.SIGSTOP)
        pool._seconds = 0.2
        assert "not decoded in 0.2 s" in str(refusal(pool, PNG))
        pool._seconds = 300.0
        squares(pool, PNG)
        (worker,) = pool._idle
        os.kill(worker._process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker._process.pid, os.WEXITED | os.WNOWAIT)
        squares(pool, PNG)
        (worker,) = pool._idle
        worker._connection.close()
        assert "broke the decoder" in str(refusal(pool, PNG))
        squares(pool, PNG)
    finally:
        pool.close()


def test_a_process_that_does_not_start_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pool = ImagePool(1, 300.0, PIXELS, PIXELS)
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pools, "START_SECONDS", 0.5)
    try:
        for module in ("no_such_module", "sleeper"):
            with monkeypatch.context() as patch:
                patch.setattr(pools, "MODULE", module)
                assert refusal(pool, PNG).code is None
        monkeypatch.setattr(pools, "START_SECONDS", 300.0)
        assert len(squares(pool, PNG)) == 1
    finally:
        pool.close()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image within the limit of pixels that would take a gigabyte, in a process that has less."""
    monkeypatch.setattr(pools, "BYTES_A_PIXEL", 0)
    pool = ImagePool(1, 300.0, 2**26, 2**26)
    try:
        refused = refusal(pool, encoded(PILImage.new("LA", (8000, 7900)), "PNG", compress_level=1))
        assert refused.code == "image_too_large"
        assert "more memory" in str(refused)
        assert len(squares(pool, PNG)) == 1
    finally:
        pool.close()


@given(arriving=st.lists(st.sampled_from("aaab"), max_size=30), gone=st.sets(st.integers(0, 29)))
def test_tenants_get_slots_in_turn(arriving: list[str], gone: set[int]) -> None:
    """Between two of one tenant there is one of every other that waits; who has gone takes none."""

    async def run() -> list[str]:
        turns, order = Turns(1), []
        await turns.take("first")

        async def wait(tenant: str) -> None:
            await turns.take(tenant)
            order.append(tenant)
            turns.give_back()

        tasks = [asyncio.ensure_future(wait(tenant)) for tenant in arriving]
        await asyncio.sleep(0)
        for number in gone & set(range(len(tasks))):
            tasks[number].cancel()
        turns.give_back()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert turns._free == 1
        return order

    order = asyncio.run(run())
    left = [tenant for number, tenant in enumerate(arriving) if number not in gone]
    assert sorted(order) == sorted(left)
    both = 2 * min(left.count("a"), left.count("b"))
    assert all(one != other for one, other in pairwise(order[:both]))


def test_texts_do_not_wait_for_images_and_images_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    let, begun = threading.Event(), threading.Event()

    def hang(self: Any, *_: Any) -> list[PILImage.Image]:
        begun.set()
        assert let.wait(300)
        return [RED.resize((8, 8))]

    monkeypatch.setattr(pools._Worker, "ask", hang)
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    limited = stub_settings(limits=Limits(images_waiting=2, image_processes=1))
    backend = StubBackend()
    with listening(create_app(backend, limited)) as url, ThreadPoolExecutor(2) as clients:
        try:
            waiting = [clients.submit(requests.post, url + CHAT, json=body, timeout=300) for _ in range(2)]
            assert begun.wait(300)
            for _ in range(3):
                assert requests.post(url + CHAT, json=ask(), timeout=300).status_code == 200
            while (refused := requests.post(url + CHAT, json=body, timeout=300)).status_code != 429:
                assert refused.status_code == 200
            assert error_of(refused)["code"] == "overloaded"
            assert refused.headers["retry-after"] == "1"
        finally:
            let.set()
        assert [one.result().status_code for one in waiting] == [200, 200]
        (image,) = backend.requests[-1].prompt.images  # type: ignore[union-attr]
        assert image.data.size == (8, 8)  # type: ignore[union-attr]
