"""What the cache gives up is found again: in the host's memory, and on a disk by later engines; damaged, full or
foreign, it costs no more than the time of computing it anew (test_mixes.py draws with and without)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.generation.cache import disk_blocks
from calumma.model.generation.cache.disk_blocks import DiskBlocks, DiskCache
from calumma.model.vocabulary import Vocabulary
from tests.model.generation.conftest import MakeTransformer, RunEngine

N, SIZE = 4, 4  # codes of an image, positions of a block
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
BLOCK_BYTES = 2 * 2 * SIZE * 2 * 8 * 4  # layers, keys and values, positions, heads, their size, float32
LONG = 29  # tokens of a prompt: seven whole blocks and its last token


def request(number: int, salt: bytes = b"") -> Request:
    prompt = [V.bos, *((15 + (3 * at + number * at * at) % 13) for at in range(LONG - 1))]
    return Request(str(number), prompt, SamplingParams(6, text=PhaseSampling(1.2), seed=number), salt=salt)


def make(transformer: Any, **options: Any) -> Engine:
    return Engine(transformer, V, N, 1, block_size=SIZE, cache_tokens=48, **options)


def tokens(found: dict[str, list[Any]]) -> list[int]:
    return [token for events in found.values() for event in events for token in event.tokens]


def test_evicted_blocks_are_found_in_the_hosts_memory(make_transformer: MakeTransformer, run_engine: RunEngine) -> None:
    transformer = make_transformer(V.size, bias={V.eos: -99, V.end_turn: -99})
    expected = {number: tokens(run_engine(make(transformer), request(number))) for number in range(4)}
    engine = make(transformer, host_cache=40 * BLOCK_BYTES)
    for turn in range(2):
        for number in range(4):
            computed = engine.statistics.counters.computed_tokens
            assert tokens(run_engine(engine, request(number))) == expected[number]
            if turn:
                assert engine.statistics.counters.computed_tokens - computed == LONG - 28 + len(expected[number]) - 1
    statistics = engine.statistics
    assert statistics.restored_tokens >= 3 * 28
    assert 4 * 28 <= statistics.prefix_hit_tokens < 5 * 28, "and the front of a block that agrees in part"
    assert statistics.prefix_tokens == 8 * (LONG - 1)
    assert 0 < statistics.host_cache_bytes <= 40 * BLOCK_BYTES
    assert tokens(run_engine(engine, request(0, salt=b"another"))) == expected[0]
    assert engine.statistics.prefix_hit_tokens == statistics.prefix_hit_tokens, "what others were asked does not show"


def test_the_hosts_memory_is_bounded_and_the_longest_unused_goes(
    make_transformer: MakeTransformer, run_engine: RunEngine
) -> None:
    engine = make(make_transformer(V.size), host_cache=10 * BLOCK_BYTES)
    for number in range(12):
        run_engine(engine, request(number))
    assert engine.statistics.host_cache_bytes == 10 * BLOCK_BYTES
    restored = engine.statistics.restored_tokens
    run_engine(engine, request(0))
    assert engine.statistics.restored_tokens == restored


@pytest.fixture
def disk(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path, 1000 * BLOCK_BYTES)


def test_a_later_engine_of_the_same_weights_finds_what_is_on_the_disk(
    make_transformer: MakeTransformer, run_engine: RunEngine, disk: DiskCache
) -> None:
    """Other weights, if by one number, and other salts find nothing."""
    transformer = make_transformer(V.size)
    first = make(transformer, disk_cache=disk)
    expected = [tokens(run_engine(first, request(number))) for number in range(3)]
    first.close()
    again = make(make_transformer(V.size), disk_cache=disk, host_cache=4 * BLOCK_BYTES)
    assert [tokens(run_engine(again, request(number))) for number in range(3)] == expected
    assert again.statistics.disk_restored_tokens == again.statistics.restored_tokens == 3 * 28
    run_engine(again, request(1, salt=b"another"))
    assert again.statistics.restored_tokens == 3 * 28
    again.close()
    other = make_transformer(V.size)
    with torch.no_grad():
        other.blocks[1].attention.value.weight[3, 5] += 1
    engine = make(other, disk_cache=disk)
    run_engine(engine, request(0))
    engine.close()
    assert engine.statistics.restored_tokens == 0
    assert len([folder for folder in disk.folder.iterdir() if folder.is_dir()]) == 2
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in disk.folder.iterdir())


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "another's", "gone"])
def test_damaged_files_are_computed_anew(
    make_transformer: MakeTransformer, run_engine: RunEngine, disk: DiskCache, harm: str
) -> None:
    transformer = make_transformer(V.size)
    first = make(transformer, disk_cache=disk)
    expected = tokens(run_engine(first, request(0)))
    first.close()
    files = sorted(disk.folder.rglob("*.kv"))
    contents = [file.read_bytes() for file in files]
    engine = make(transformer, disk_cache=disk)
    for number, (file, content) in enumerate(zip(files, contents, strict=True)):
        if harm == "flipped":
            file.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
        elif harm == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif harm == "empty":
            file.write_bytes(b"")
        elif harm == "another's":
            file.write_bytes(contents[number - 1])
        else:
            file.unlink()
    assert tokens(run_engine(engine, request(0))) == expected
    statistics = engine.statistics
    assert statistics.restored_tokens == 0
    assert statistics.disk_damaged == (harm != "gone")  # after the first that is lacking none is asked for
    engine.close()
    later = make(transformer, disk_cache=disk)
    assert tokens(run_engine(later, request(0))) == expected
    later.close()


def test_the_disk_is_bounded_and_the_longest_unused_goes(tmp_path: Path) -> None:
    """Whoever else writes to the folder; half-written files of long ago go, too."""
    size = 1000 + disk_blocks.HEAD.size
    one, other = (DiskBlocks(DiskCache(tmp_path, 20 * size), "weights") for _ in range(2))
    stale = one.folder / "x.part"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    names = [bytes([number]) * 16 for number in range(60)]
    for number, name in enumerate(names):
        (one, other)[number % 2].write(name, torch.full((1000,), number, dtype=torch.uint8), wait=True)
    one.close()
    other.close()
    files = list(one.folder.iterdir())
    assert sum(file.stat().st_size for file in files) <= 22 * size
    assert not stale.exists()
    later = DiskBlocks(DiskCache(tmp_path, 20 * size), "weights")
    found = [
        number for number, name in enumerate(names) if (held := later.read(name)) is not None and held[0] == number
    ]
    assert found == sorted(found)
    assert found[-1] >= 58
    assert len(found) >= 15
    later.close()


def test_a_disk_that_takes_nothing_costs_nothing(
    make_transformer: MakeTransformer, run_engine: RunEngine, disk: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_blocks.tempfile, "mkstemp", full)
    transformer = make_transformer(V.size)
    engine = make(transformer, disk_cache=disk)
    expected = tokens(run_engine(make(transformer), *[request(number) for number in range(3)]))
    assert tokens(run_engine(engine, *[request(number) for number in range(3)])) == expected
    engine.close()
    assert list(disk.folder.rglob("*.kv")) == []
