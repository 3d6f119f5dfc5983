"""A model cut over two processes answers as in one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.generation import Shard
from calumma.model.generation.decoder import Decoder
from calumma.model.transformer import Transformer

WORKER = Path(__file__).with_name("parallel_worker.py")


def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    """Text, guided images, interleaving, scored prompts, aborts, preemption and drafts; the vocabulary is odd."""
    specification = importlib.util.spec_from_file_location("parallel_worker", WORKER)
    assert specification is not None
    assert specification.loader is not None
    worker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)
    output = tmp_path / "answers.json"
    command = [sys.executable, str(WORKER)]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store"), str(output)]) for rank in range(2)
    ]
    expected = worker.answers(None)
    assert [process.wait() for process in processes] == [0, 0]
    assert json.loads(output.read_text()) == expected
    assert all(sum(len(answer) for answer in answers.values()) > 20 for answers in expected)


def test_a_model_that_cannot_be_cut_evenly_is_refused() -> None:
    config = ModelConfig(vocabulary_size=9, layers=1, width=32, heads=4, kv_heads=2, ffn_width=48)
    with pytest.raises(ValueError, match="kv_heads, 2, cannot be cut into 4 equal parts"):
        Decoder(Transformer(config), Shard(0, 4))


@pytest.mark.parametrize("rows", [8, 9])
def test_parts_of_rows_make_up_the_whole(rows: int) -> None:
    weight = torch.randn(rows, 3)
    parts = [Shard(index, 2).rows(weight) for index in range(2)]
    assert len({part.shape for part in parts}) == 1
    assert torch.equal(torch.cat(parts)[:rows], weight)
    assert torch.equal(torch.cat([Shard(index, 3).columns(weight) for index in range(3)], dim=1), weight)
