"""Metrics and pictures reach TensorBoard and Weights & Biases as their own tools read them."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from calumma.platform.specification import SpecificationError, Tracking
from calumma.platform.tracking import mirrors
from calumma.platform.tracking.mirrors import Mirrors, require_clients


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = Mirrors(Tracking(tensorboard=str(tmp_path)), "run1", {}, None)
    told.log({"loss": 2.5, "held_out/a/loss": 3.0}, 1)
    told.log({"loss": 1.5}, 2)
    told.log_image(PILImage.new("RGB", (4, 3), "red"), "samples/00.png")
    told.close()
    found = EventAccumulator(str(tmp_path / "run1"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert found.Tags()["images"] == ["samples/00.png"]
    assert found.Images("samples/00.png")[0].step == 2


def log_records(content: bytes) -> Iterator[bytes]:
    """Of a log as LevelDB's: behind seven bytes, blocks of 32 KiB with pieces of records, each with checksum, length
    and kind (1 whole, 2 first, 3 middle, 4 last)."""
    place, held = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if place + 7 + length > len(content):  # it is being written
            return
        held += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


def finished_run(folder: Path) -> list[Any]:
    """The records of the only run, once its end is there: the client's own process writes them."""
    from wandb.proto import wandb_internal_pb2

    end, records = time.monotonic() + 120, list[Any]()
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < end, "the run has no end"
        time.sleep(0.1)
        records = []
        for file in folder.glob("wandb/offline-run-*/*.wandb"):
            records += [wandb_internal_pb2.Record.FromString(data) for data in log_records(file.read_bytes())]
    return records


def test_wandb_keeps_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: its client writes the run to a file that `wandb sync` sends."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    told = Mirrors(Tracking(wandb="chameleons"), "run1", {"steps": 3}, "tuned")
    told.log({"loss": 2.5}, 1)
    told.log({"loss": 1.5}, 2)
    told.close()
    values, projects = [], []
    for record in finished_run(tmp_path):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        values += [float(items["loss"])] if "loss" in items else []
        projects += [record.run.project] if record.run.project else []
    assert values == [2.5, 1.5]
    assert set(projects) == {"chameleons"}


def test_what_fails_in_a_mirror_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirrors.TensorBoard, "log", lambda *given: 1 / 0)
    told = Mirrors(Tracking(tensorboard=str(tmp_path)), "run1", {}, None)
    told.log({"loss": 1.0}, 1)
    told.log({"loss": 1.0}, 2)
    assert [record.message for record in caplog.records] == [
        "TensorBoard takes nothing any more, training goes on without it: division by zero"
    ]


def test_a_client_that_is_missing_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    require_clients(Tracking())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecificationError, match=r"tracking\.wandb: the package wandb is not installed"):
        require_clients(Tracking(wandb="p"))
