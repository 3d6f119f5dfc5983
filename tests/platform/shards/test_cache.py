"""The cache of shards: what it hands out is a whole copy, it keeps its size, and nobody downloads what another does."""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calumma.platform import storage
from calumma.platform.shards.cache import ShardCache


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """URI -> how often it was downloaded. A URI's content is its own bytes, over and over, 100 of them."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def copy_to(uri: str, file: BinaryIO) -> None:
        with lock:
            counts[uri] += 1
        file.write(content(uri))

    monkeypatch.setattr(storage, "copy_to", copy_to)
    return counts


def content(uri: str) -> bytes:
    return (uri.encode() * 100)[:100]


def held(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.directory.glob("*.shard"))


def test_a_shard_is_downloaded_once(tmp_path: Path, downloads: Counter[str]) -> None:
    cache = ShardCache(tmp_path / "new" / "cache", 1000)
    for _ in range(3):
        path = cache.copy_of("s3://b/x", 100)
        assert path is not None
        assert path.read_bytes() == content("s3://b/x")
    assert downloads == {"s3://b/x": 1}
    cache.copy_of("s3://b/x", 100, b"another version")
    assert downloads == {"s3://b/x": 2}


def test_shards_larger_than_the_cache_are_left_where_they_are(tmp_path: Path, downloads: Counter[str]) -> None:
    assert ShardCache(tmp_path, 99).copy_of("s3://b/x", 100) is None
    assert not downloads
    assert list(tmp_path.iterdir()) == []


def test_the_copy_not_read_for_longest_makes_room(tmp_path: Path, downloads: Counter[str]) -> None:
    cache = ShardCache(tmp_path, 250)
    first, second = (cache.copy_of(uri, 100) for uri in ("s3://b/1", "s3://b/2"))
    assert first is not None
    assert second is not None
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    cache.copy_of("s3://b/1", 100)
    cache.copy_of("s3://b/3", 100)
    assert first.exists()
    assert not second.exists()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.integers(0, 9), max_size=40), limit=st.integers(100, 700))
def test_the_cache_keeps_its_size_whatever_is_asked_for(
    asked: list[int], limit: int, downloads: Counter[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = ShardCache(tmp_path_factory.mktemp("cache"), limit)
    for number in asked:
        path = cache.copy_of(f"s3://b/{number}", 100)
        assert path is not None
        assert path.read_bytes() == content(f"s3://b/{number}")
        assert held(cache) <= limit


def test_threads_and_caches_share_a_folder(tmp_path: Path, downloads: Counter[str]) -> None:
    caches = [ShardCache(tmp_path, 2000) for _ in range(4)]

    def read(turn: int) -> bytes:
        path = caches[turn % 4].copy_of(f"s3://b/{turn % 7}", 100)
        assert path is not None
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(200)))
    assert found == [content(f"s3://b/{turn % 7}") for turn in range(200)]
    assert set(downloads.values()) == {1}


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str, file: Any) -> None:
        file.write(b"half")
        raise storage.StorageError(f"cannot read {uri}")

    monkeypatch.setattr(storage, "copy_to", fail)
    cache = ShardCache(tmp_path, 1000)
    with pytest.raises(storage.StorageError, match="s3://b/x"):
        cache.copy_of("s3://b/x", 100)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_what_killed_downloads_left_is_cleared_away(tmp_path: Path, downloads: Counter[str]) -> None:
    old, new = tmp_path / "a.shard.1.tmp", tmp_path / "b.shard.2.tmp"
    for path in (old, new):
        path.write_bytes(bytes(100))
    os.utime(old, (1, 1))
    assert ShardCache(tmp_path, 1000).copy_of("s3://b/x", 100) is not None
    assert not old.exists()
    assert new.exists(), "somebody may be writing it"
