"""Writing checkpoints and finding the one to go on with, with a stand-in for DeepSpeed's engine."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from botocore.exceptions import ConnectionClosedError
from safetensors.torch import load_file

from calumma.platform import storage
from calumma.platform.specification import Retention
from calumma.platform.storage.client import s3_client
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.training.checkpoints import catalog, identity, layout, resumption, saver
from calumma.platform.training.checkpoints.saver import Saver
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.specification import PretrainSpecification


def specification(output: str) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": "/nowhere",
        "mixture": {"tokens": 1.0},
        "output": output,
        "initial": "elsewhere",
        "steps": 1000,
        "micro_batches": 6,
        "precision": "float32",
    }
    return PretrainSpecification.model_validate(values)


# -- writing --


class Engine:
    """One tensor of weights under an optimizer, as DeepSpeed's engine has them without ZeRO."""

    device = torch.device("cpu")
    global_steps, global_samples, skipped_steps = 3, 18, 0

    def __init__(self, size: int = 1000) -> None:
        self.module = torch.nn.Linear(size, 1, bias=False)
        self.basic_optimizer = self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.state = self.module.weight.data

    def zero_optimization_stage(self) -> int:
        return 0


def report(step: int, **fields: Any) -> dict[str, Any]:
    return {"step": step, "schedule_step": step, "tokens": {}, **fields}


def saved(run: Engine, output: str, step: int, **fields: Any) -> str:
    """The URI of a published checkpoint whose weights are `step` everywhere."""
    run.state.fill_(step)
    uri = catalog.checkpoint_uri(output, step)
    saver.save(run, uri, specification(output), {}, report(step, **fields))  # type: ignore[arg-type]
    return uri


def content(output: str, step: int) -> float:
    manifest = Manifest.read(catalog.checkpoint_uri(output, step))
    manifest.verify(catalog.checkpoint_uri(output, step), content=True)
    (path,) = [entry.path for entry in manifest.files if entry.path.endswith("part-00000.safetensors")]
    weights = load_file(Path(catalog.checkpoint_uri(output, step), path))["weight[0].fp32"]
    assert len(weights.unique()) == 1
    return float(weights[0])


def test_training_goes_on_while_a_checkpoint_is_written(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state of when it was saved, and nothing is published before all of it is there."""
    output, run, write, may_write = str(tmp_path / "stage"), Engine(), layout.write_part, threading.Event()

    def slow(*given: Any, **named: Any) -> FileEntry:
        may_write.wait()
        return write(*given, **named)

    monkeypatch.setattr(layout, "write_part", slow)
    told: list[str] = []
    with Saver(specification(output), {}, published=lambda uri, report: told.append(uri)) as saver:
        for step in (1, 2):
            run.state.fill_(step)
            may_write.clear()
            saver.save(run, catalog.checkpoint_uri(output, step), report(step))  # type: ignore[arg-type]
            run.state.fill_(99)  # the next optimizer step
            assert catalog.newest_step(output) == step - 1 or step == 1
            assert not storage.exists(f"{catalog.checkpoint_uri(output, step)}/manifest.json")
            may_write.set()
            saver.wait_until_published()
    assert [content(output, step) for step in (1, 2)] == [1.0, 2.0]
    assert told == [catalog.checkpoint_uri(output, step) for step in (1, 2)]


def slow_and_quick(rank: int, world: int, output: str) -> None:
    """Two workers: the first publishes, the second is told when it may write."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{output}.meeting", rank=rank, world_size=world)
    uri, may_write = catalog.checkpoint_uri(output, 1), Path(f"{output}.may-write")
    if rank == 1:
        write = layout.write_part

        def slow(*given: Any, **named: Any) -> FileEntry:
            while not may_write.exists():
                time.sleep(0.01)
            return write(*given, **named)

        layout.write_part = slow
    run = Engine()
    with Saver(specification(output), {}) as saving:
        saving.save(run, uri, report(1))  # type: ignore[arg-type]
        for _ in range(5):  # steps
            saving.announce()
        if rank == 0:
            Path(f"{output}.early").write_text(str(Manifest.find(uri)))
            may_write.touch()
        for _ in range(1000):
            saving.announce()
            time.sleep(0.001)
        if rank == 0:
            assert saving._manifest is not None, "nobody has to wait for it"
        saving.wait_until_published()


def test_a_checkpoint_exists_when_every_worker_has_written_its_part_and_not_before(tmp_path: Path) -> None:
    output = str(tmp_path / "stage")
    torch.multiprocessing.start_processes(slow_and_quick, (2, output), nprocs=2, start_method="fork")
    assert Path(f"{output}.early").read_text() == "None", "published while a worker was still writing"
    manifest = Manifest.read(catalog.checkpoint_uri(output, 1))
    manifest.verify(catalog.checkpoint_uri(output, 1), content=True)
    names = sorted(Path(entry.path).name for entry in manifest.files)
    assert names == ["index.parquet", "part-00000.safetensors", "part-00001.safetensors"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_in_use(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output, run = str(tmp_path / "stage"), Engine()
    saved(run, output, 1)
    with monkeypatch.context() as broken:
        broken.setattr(layout, "write_part", failing)
        with pytest.raises(storage.StorageError, match=r"step-00000002 was not written: .*disk full"):
            saved(run, output, 2)
        assert catalog.newest_step(output) == 1
        with pytest.raises(TrainingFailed, match=r"3 checkpoints in a row could not be written: .*disk full"):
            save_without_waiting(run, output, range(3, 8))
    assert "training goes on with the one before it" in caplog.text
    assert catalog.newest_step(output) == 1
    saved(run, output, 8)
    assert content(output, 8) == 8.0


def save_without_waiting(run: Engine, output: str, steps: range) -> None:
    with Saver(specification(output), {}) as saver:
        for step in steps:
            saver.save(run, catalog.checkpoint_uri(output, step), report(step))  # type: ignore[arg-type]


def failing(*given: Any, **named: Any) -> None:
    raise OSError("disk full")


def test_a_checkpoint_in_s3_is_whole(group_of_one: None, s3: str) -> None:
    uri = saved(Engine(), f"{s3}/stage", 3)
    manifest = Manifest.read(uri)
    manifest.verify(uri, content=True)
    assert [Path(entry.path).name for entry in manifest.files] == ["part-00000.safetensors", "index.parquet"]


def test_a_host_whose_disk_takes_no_copy_goes_on_without(
    group_of_one: None, s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(tmp_path, "full").write_text("no folder")
    recovery = {"node_local": f"{tmp_path}/full"}
    spec = specification(f"{s3}/stage").model_dump() | {"resources": {"recovery": recovery}}
    uris = [catalog.checkpoint_uri(f"{s3}/stage", step) for step in (1, 2)]
    with Saver(PretrainSpecification.model_validate(spec), {}) as saving:
        for step, uri in enumerate(uris, 1):
            saving.save(Engine(), uri, report(step))  # type: ignore[arg-type]
        saving.wait_until_published()
    for uri in uris:
        Manifest.read(uri).verify(uri, content=True)
    assert caplog.text.count("no copy of checkpoints") == 1


def test_a_part_of_an_upload_that_fails_is_sent_again_and_one_that_fails_for_good_leaves_no_checkpoint(
    group_of_one: None, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, run = f"{s3}/stage", Engine(6_000_000)  # 24 MB: three parts
    sent, broken = list[str](), {1, 4}  # of all requests for parts, those that break off

    def send(request: Any, **named: Any) -> None:
        sent.append(request.url)
        if len(sent) - 1 in broken:
            raise ConnectionClosedError(endpoint_url=request.url)

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3_client().meta.events.register("before-send.s3.UploadPart", send)
    Manifest.read(saved(run, output, 1)).verify(catalog.checkpoint_uri(output, 1), content=True)
    assert len(sent) == 4
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3_client().meta.events.register("before-send.s3.UploadPart", send)
    with pytest.raises(storage.StorageError, match=r"step-00000002 was not written: .*part-00000.safetensors"):
        saved(run, output, 2)
    assert storage.sizes(catalog.checkpoint_uri(output, 2)).keys() == set()
    found = resumption.agreed_checkpoint(output, specification(output), {})
    assert found is not None
    assert found.step == 1


# -- finding the one to go on with --


def test_one_that_is_not_whole_is_passed_over_and_a_damaged_one_is_set_aside(
    group_of_one: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, run = str(tmp_path / "stage"), Engine()
    places = [Path(saved(run, output, step)) for step in (1, 2, 3, 4)]
    storage.write_bytes(f"{catalog.checkpoint_uri(output, 5)}/abc/state/part.pt", b"killed before its manifest")
    cut, changed = (next(place.rglob("part-*")) for place in (places[3], places[2]))
    cut.write_bytes(cut.read_bytes()[:-1])
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1  # one bit, same size
    changed.write_bytes(data)

    found = resumption.load_newest(run, output, specification(output), {})  # type: ignore[arg-type]
    assert found is not None
    assert found.step == 2
    assert run.state.unique().tolist() == [2.0]
    assert "the checkpoint after step 4 is not whole" in caplog.text
    assert "the checkpoint after step 3 is damaged and set aside" in caplog.text
    assert (places[2] / catalog.DAMAGED).exists()
    newest = catalog.newest(output)
    assert newest is not None
    assert newest.step == 2  # whoever looks from now on agrees, without reading contents


def test_late_writers_of_a_group_that_was_given_up_do_no_harm(group_of_one: None, tmp_path: Path) -> None:
    output, run = str(tmp_path / "stage"), Engine()
    spec = specification(output)
    with Saver(spec, {}) as old:
        run.state.fill_(7.5)
        old.save(run, catalog.checkpoint_uri(output, 7), report(7))  # type: ignore[arg-type]
        saved(run, output, 7)
        old.wait_until_published()
    assert content(output, 7) in (7.0, 7.5)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"last": 2}, {7, 8}),
        ({"last": 1, "every": 3}, {3, 6, 8}),
        ({"last": 1, "best": 2}, {2, 5, 8}),
        ({"last": 20}, set(range(1, 9))),
    ],
)
def test_retention_keeps_the_last_every_nth_and_the_best(tmp_path: Path, keep: dict[str, int], left: set[int]) -> None:
    output = str(tmp_path)
    losses = [9.0, 1.0, 8.0, 7.0, 2.0, 6.0, 5.0, 4.0]
    for step, loss in enumerate(losses, start=1):
        storage.write_bytes(f"{catalog.checkpoint_uri(output, step)}/abc/state/part.pt", b"x")
        files = [FileEntry.from_bytes("abc/state/part.pt", b"x")]
        Manifest(kind="checkpoint", files=files, report=report(step, loss=loss)).write(
            catalog.checkpoint_uri(output, step)
        )
    storage.delete(f"{catalog.checkpoint_uri(output, 4)}/manifest.json")  # killed while it was written, long ago
    storage.write_bytes(f"{catalog.checkpoint_uri(output, 9)}/abc/state/part.pt", b"being written")
    assert set(catalog.retain(output, Retention.model_validate(keep))) == left - {4}
    there = {int(path.name.removeprefix("step-")) for path in Path(catalog.checkpoints_folder(output)).iterdir()}
    assert there == left - {4} | {9}


def test_fields_that_a_checkpoint_is_older_than_do_not_make_it_another_training(tmp_path: Path) -> None:
    spec = specification(str(tmp_path))
    older = spec.model_dump(mode="json")
    del older["resources"], older["z_loss"]
    manifest = Manifest(kind="checkpoint", specification=older, report=report(4))
    assert identity.made_by(spec, {})(manifest)
    assert not identity.made_by(spec.model_copy(update={"z_loss": 0.5}), {})(manifest)
