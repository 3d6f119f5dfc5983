"""Storage that fails: what is read is what was written, or there is an error that names what could not be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calumma.platform import storage
from calumma.platform.shards import row_groups
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.cache import ShardCache
from calumma.platform.shards.row_groups import RowGroupReader, ShardError
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.streaming import blocks
from calumma.platform.streaming.tensors import PlanData

CONTEXT = 40
KINDS = ["drop", "reset", "delay", "truncate", "short", "corrupt", "error", "slow down"]


def publish(uri: str, shards: int = 3, groups: int = 8) -> Manifest:
    random = np.random.default_rng(7)
    files = []
    for number in range(shards):
        rows = [
            PackedRow(random.integers(0, 60_000, CONTEXT + 1).astype(np.int32), None, np.zeros(CONTEXT + 1, np.int32))
            for _ in range(2 * groups)
        ]
        data = token_shards.to_parquet(rows, 2)
        path = f"{number}.parquet"
        storage.write_bytes(storage.join(uri, path), data)
        files.append(
            FileEntry.from_bytes(
                path,
                data,
                rows=len(rows),
                row_groups=groups,
                sequences_per_row_group=2,
                footer=token_shards.footer_digest(data),
            )
        )
    manifest = Manifest(kind="tokens", files=files, specification={"context": CONTEXT})
    manifest.write(uri)
    return manifest


def everything(uri: str, manifest: Manifest, cache: ShardCache | None = None) -> list[Any]:
    """All that a worker of one is handed in an epoch, as plain values; a fresh process knows no footers."""
    steps = 8
    row_groups._footer_cache.cache_clear()
    data = PlanData(3, {uri: 1.0}, {uri: manifest}, 3, steps, cache=cache)
    tables = blocks.read_blocks(0, steps, data.plan, data.reader, 0, 1)
    return [table.to_pylist() for table in tables]


QUICK = [kind for kind in KINDS if kind != "delay"]


@pytest.mark.parametrize("kinds", [["truncate"], ["delay"], QUICK], ids=["truncate", "delay", "all others"])
def test_the_stream_is_that_of_undisturbed_storage(proxy: Any, s3: str, kinds: list[str]) -> None:
    manifest = publish(s3)
    undisturbed = everything(s3, manifest)
    assert all(block["error"] == "" for table in undisturbed for block in table)
    proxy.disturb(*kinds, share=0.4)
    assert everything(s3, manifest) == undisturbed
    assert sum(proxy.faults.values()) >= 5
    assert set(proxy.faults) <= set(kinds)
    for request, answers in proxy.answers.items():
        assert answers[-1] == "", f"{request} ended in a bad answer, and was believed"


def test_corruption_is_detected_every_time(proxy: Any, s3: str) -> None:
    manifest = publish(s3)
    undisturbed = everything(s3, manifest)
    corrupted = 0
    for seed in range(5):
        proxy.disturb("corrupt", share=0.6, seed=seed)
        assert everything(s3, manifest) == undisturbed
        corrupted += proxy.faults["corrupt"]
        for answers in proxy.answers.values():
            assert answers[-1] == "", "asked for again, until it is right"
    assert corrupted > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_stays_is_an_error_that_names_the_object(
    proxy: Any, s3: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    manifest = publish(s3, shards=1)
    reader = RowGroupReader(CONTEXT)
    first, second = PlanData(3, {s3: 1.0}, {s3: manifest}, 2, 1).plan.step(0)
    reader.read(first)  # so that the footer is known
    proxy.disturb(kind, share=1.0, most=10**6)
    with pytest.raises((storage.StorageError, ShardError)) as caught:
        reader.read(second)
    assert second.shard in str(caught.value)
    assert proxy.faults[kind] == 3, "the last attempt is the third"
    if kind == "corrupt":
        assert f"row group {second.row_group} has checksum" in str(caught.value)
    row_groups._footer_cache.cache_clear()
    proxy.disturb(kind, share=1.0, most=10**6)
    with pytest.raises((storage.StorageError, ShardError), match=second.shard):
        reader.read(second)


@pytest.mark.parametrize("kind", ["drop", "truncate", "slow down"])
def test_other_reading_and_writing_goes_on(proxy: Any, s3: str, tmp_path: Path, kind: str) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    proxy.disturb(kind, share=0.3)
    actions: dict[str, Callable[[str], object]] = {
        "write": lambda uri: storage.write_bytes(uri, data),
        "read": storage.read_bytes,
        "range": lambda uri: storage.read_range(uri, 1000, 5000),
        "size": storage.size,
        "list": lambda uri: storage.list_files(s3),
        "exists": storage.exists,
    }
    uris = [storage.join(s3, f"{number}.bin") for number in range(3)]
    for uri in uris:
        done = {name: action(uri) for name, action in actions.items()}
        assert (done["read"], done["range"], done["size"]) == (data, data[1000:6000], len(data))
        assert uri in done["list"]  # type: ignore[operator]
        with storage.open_read(uri, buffer=1 << 16) as file:
            file.seek(70_000)
            assert file.read(150_000) == data[70_000:220_000]
    storage.download(s3, tmp_path)
    assert all((tmp_path / f"{number}.bin").read_bytes() == data for number in range(3))
    assert proxy.faults[kind] > 5


def test_damaged_copies_in_the_cache_are_not_believed(proxy: Any, s3: str, tmp_path: Path) -> None:
    manifest = publish(s3)
    undisturbed = everything(s3, manifest)
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    proxy.disturb("corrupt", share=0.7)
    assert everything(s3, manifest, cache=cache) == undisturbed
    proxy.disturb()
    for copy in (tmp_path / "cache").glob("*.shard"):
        copy.write_bytes(bytes(copy.stat().st_size))
    assert everything(s3, manifest, cache=cache) == undisturbed
