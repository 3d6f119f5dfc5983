"""A model cut over several processes answers as in one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.config import ModelConfig
from calumma.model.generation import Shard, read_shard
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.transformer import Transformer
from calumma.model.weights import LazyTensor, write_weights

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
SHAPE = ModelConfig(vocabulary_size=9, layers=1, width=32, heads=4, kv_heads=2, ffn_width=49)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[int]]]]:
    """A folder with the model that the processes read, and what one process answers."""
    specification = importlib.util.spec_from_file_location("tensor_parallel_worker", WORKER)
    assert specification is not None
    assert specification.loader is not None
    worker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)
    folder = tmp_path_factory.mktemp("parallel")
    return folder, worker.answers(None, folder)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_answer_as_one(alone: tuple[Path, list[dict[str, list[int]]]], world: int) -> None:
    """Text, guided images, interleaving, scored prompts, aborts, preemption and drafts; the vocabulary is odd, and
    three processes share two key-value heads."""
    folder, expected = alone
    command = [sys.executable, str(WORKER)]
    processes = [subprocess.Popen([*command, str(rank), str(world), str(folder)]) for rank in range(world)]
    assert [process.wait() for process in processes] == [0] * world
    assert json.loads((folder / f"answers{world}.json").read_text()) == expected
    assert all(sum(len(answer) for answer in answers.values()) > 20 for answers in expected)


def test_more_processes_than_heads_are_refused() -> None:
    config = ModelConfig(vocabulary_size=9, layers=1, width=32, heads=4, kv_heads=2, ffn_width=48)
    with pytest.raises(ValueError, match="4 heads cannot be cut into 5 parts: use at most 4 processes"):
        Decoder(Transformer(config), Shard(0, 5))


@given(kv_heads=st.integers(1, 5), grouped=st.integers(1, 4), data=st.data())
def test_every_head_is_in_one_part_beside_the_keys_it_attends_to(
    kv_heads: int, grouped: int, data: st.DataObject
) -> None:
    heads = kv_heads * grouped
    count = data.draw(st.integers(1, heads))
    config = ModelConfig(vocabulary_size=9, layers=1, width=4 * heads, heads=heads, kv_heads=kv_heads, ffn_width=7)
    found = []
    for index in range(count):
        own, keys = Shard(index, count).heads(config)
        size = (own.stop - own.start) // (keys.stop - keys.start)
        for place, head in enumerate(range(own.start, own.stop)):
            assert keys.start + place // size == head // grouped
            found.append(head)
    assert found == list(range(heads))


@given(name=st.sampled_from(sorted(dict(Transformer(SHAPE).named_parameters()))), count=st.integers(1, 4))
def test_parts_make_up_the_whole(name: str, count: int) -> None:
    """Key-value heads that several parts share apart."""
    weight = dict(Transformer(SHAPE).named_parameters())[name].detach()
    covered = torch.zeros_like(weight)
    for index in range(count):
        covered[Shard(index, count).slices(name, SHAPE)] += 1
    shared = "norm.weight" in name.removeprefix("blocks.0.attention.") or any(k in name for k in ("key", "value"))
    assert bool((covered >= 1).all()) if shared else bool((covered == 1).all())


def test_a_directory_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    SHAPE.save(tmp_path)
    state = Transformer(SHAPE).state_dict()
    del state["norm.weight"]
    write_weights(tmp_path, {name: LazyTensor.of(tensor) for name, tensor in state.items()})
    with pytest.raises(ValueError, match=r"does not hold the weights its config\.json describes: norm\.weight"):
        read_shard(tmp_path, Shard(0, 2))
