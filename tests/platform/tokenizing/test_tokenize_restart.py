"""A tokenizing job that is killed, at any point: the next one goes on from its finished windows, and what it publishes
is what an undisturbed job publishes. Forked children of this process are killed; nothing here needs a cluster.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image, Text
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards import receipts
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing import actor, tokenize
from calumma.platform.tokenizing.specification import TokenizeSpecification

WINDOWS = 9  # 6 of pairs, 3 of text
KILLS = 20


class Stopped(Exception):
    """What a test raises in the middle of a job."""


class Recorder:
    """What a job logs."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics


def publish(uri: str, documents: list[Document]) -> None:
    """A curated directory of these documents, five in a shard."""
    entries = []
    for number in range(0, len(documents), 5):
        part = documents[number : number + 5]
        data = document_shards.to_parquet(part)
        path = f"documents-{number:04d}.parquet"
        storage.write_bytes(storage.join(uri, path), data)
        entries.append(FileEntry.from_bytes(path, data, rows=len(part)))
    Manifest(kind=document_shards.CURATED, files=entries).write(uri)


def pair(shade: int) -> Document:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade, 255 - shade, 99)).save(buffer, "PNG")
    return Document((Image(buffer.getvalue()), Text(f"number {shade}")))


def prepare(root: str) -> None:
    """Tokenizers and two curated directories below `root`."""
    publish(f"{root}/curated/pairs", [pair(n) for n in range(30)])
    # Some are longer than the context, to be split; a conversation like that is dropped.
    texts = [Document((Text(f"text {n}: " + "more words " * 3 * n),)) for n in range(14)]
    chat = Document((Text("number", "user"), Text("more words " * 90, "assistant")))
    publish(f"{root}/curated/text", [*texts, chat])


def train_tokenizers(root: Path) -> None:
    (root / "tokenizers/text").mkdir(parents=True)
    train_text_tokenizer([f"number {n} more words of text {n}" for n in range(200)], root / "tokenizers/text", 300, 8)
    small = ImageTokenizerConfig(
        resolution=8, codebook_size=8, embedding=4, base_channels=4, multipliers=[1, 1], residual_blocks=1
    )
    ImageTokenizer(small).save(root / "tokenizers/image")


def specification(root: Path | str, **fields: Any) -> TokenizeSpecification:
    values: dict[str, Any] = {
        "storage": str(root),
        "documents": ["curated/pairs", "curated/text"],
        "context": 63,
        "micro_batch": 2,
        "micro_batches_per_shard": 1,
        "window": 5,
        "resources": {"workers": 0},
        **fields,
    }
    return TokenizeSpecification.model_validate(values)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    train_tokenizers(root)
    prepare(str(root))
    return root


@pytest.fixture
def root(prepared: Path) -> Path:
    """Storage with tokenizers and curated documents, and no tokens."""
    shutil.rmtree(prepared / "tokens", ignore_errors=True)
    return prepared


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stems of the windows that were made."""
    stems: list[str] = []
    work = actor.TokenizingActor.__call__

    def noted(self: actor.TokenizingActor, task: dict[str, Any]) -> dict[str, Any]:
        made = work(self, task)
        stems.append(task["shard_prefix"])
        return made

    monkeypatch.setattr(actor.TokenizingActor, "__call__", noted)
    return stems


def run(spec: TokenizeSpecification) -> tuple[Manifest, dict[str, float]]:
    recorder = Recorder()
    return tokenize.run(spec, recorder, no_progress), recorder.metrics  # type: ignore[arg-type]


def run_until(spec: TokenizeSpecification, windows_done: int) -> None:
    """A job that ends in the middle."""

    def progress(done: float, total: float, note: str = "") -> None:
        nonlocal windows_done
        windows_done -= 1
        if windows_done < 0:
            raise Stopped

    with pytest.raises(Stopped):
        tokenize.run(spec, Recorder(), progress)  # type: ignore[arg-type]


def files_below(folder: Path) -> dict[str, bytes]:
    """Really all files: those that storage hides, too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def counted(spec: TokenizeSpecification, act: Callable[[int], None]) -> None:
    """Run the job; `act` is called with the number of everything that happens: each call and return, Python's and C's,
    in every thread."""
    numbers = itertools.count(1)

    def happened(*_: object) -> None:
        act(next(numbers))

    threading.setprofile(happened)
    sys.setprofile(happened)
    try:
        run(spec)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def killed(spec: TokenizeSpecification, at: int) -> bool:
    """Run the job in a child that dies at once when `at` things have happened; whether it did."""

    def kill(number: int) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            counted(spec, kill)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the job itself failed"
    return os.WIFSIGNALED(status)


def test_a_job_that_was_killed_anywhere_publishes_in_the_end_what_an_undisturbed_one_does(
    root: Path, worked: list[str]
) -> None:
    spec = specification(root)
    expected = run(spec)  # first, since it also imports what a job needs
    files = files_below(root / "tokens")
    shutil.rmtree(root / "tokens")
    numbers: list[int] = []
    counted(spec, numbers.append)
    last = max(numbers)
    assert files_below(root / "tokens") == files
    assert len(worked) == 2 * WINDOWS

    random = np.random.default_rng(4)
    saved = died = 0
    for at in random.integers(1, last, KILLS):
        shutil.rmtree(root / "tokens")
        died += killed(spec, int(at))
        if random.random() < 0.5:  # the next one does not come far, either
            killed(spec, int(random.integers(1, last)))
        worked.clear()
        assert run(spec) == expected
        assert files_below(root / "tokens") == files
        saved += WINDOWS - len(worked)
    # Points of threads move a little: one may fall behind the end.
    assert died >= KILLS - 2
    assert saved > KILLS  # of 9 windows, half in the mean


def test_finished_windows_are_not_made_again(root: Path, worked: list[str]) -> None:
    spec = specification(root)
    run_until(spec, 5)
    assert len(files_below(root / "tokens/.receipts")) == len(worked) == 5
    first = list(worked)
    notes: list[tuple[float, float, str]] = []
    tokenize.run(spec, Recorder(), lambda *said: notes.append(said))  # type: ignore[arg-type, misc]
    assert len(worked) == len(set(worked)) == WINDOWS
    assert worked[:5] == first
    assert notes[0] == (25, 45, "45 documents of 2 sources, 25 of them done before")
    assert notes[-1][:2] == (45, 45)
    assert not (root / "tokens/.receipts").exists()


def test_a_receipt_counts_while_its_shards_are_there(root: Path, worked: list[str]) -> None:
    spec = specification(root)
    run_until(spec, 4)
    shard = sorted((root / "tokens/pairs").glob("*.parquet"))[0]
    cut = sorted((root / "tokens/pairs").glob("*-00001-*.parquet"))[0]
    damaged = sorted((root / "tokens/.receipts/pairs").iterdir())[2]
    shard.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    damaged.write_text("{")
    worked.clear()
    run(spec)
    again = {shard.name.rpartition("-")[0], cut.name.rpartition("-")[0], damaged.stem}
    assert len(again) == 3
    assert set(worked[:3]) == again
    assert len(worked) == WINDOWS - 1


@pytest.mark.parametrize("changed", ["specification", "documents"])
def test_receipts_of_other_documents_or_another_specification_are_removed(
    tmp_path: Path, prepared: Path, worked: list[str], changed: str
) -> None:
    shutil.copytree(prepared / "tokenizers", tmp_path / "tokenizers")
    prepare(str(tmp_path))
    spec = specification(tmp_path, documents=["curated/text"])
    run_until(spec, 2)
    if changed == "specification":
        spec = specification(tmp_path, documents=["curated/text"], seed=1)
    else:
        publish(f"{tmp_path}/curated/text", [Document((Text(f"number {n}"),)) for n in range(15)])
    old = set(files_below(tmp_path / "tokens"))
    worked.clear()
    run_until(spec, 1)
    assert len(worked) == 1
    assert not old & set(files_below(tmp_path / "tokens"))
    run(spec)
    assert len(worked) == 3
    published = Manifest.read(f"{tmp_path}/tokens")
    published.verify(f"{tmp_path}/tokens", content=True)
    found = set(files_below(tmp_path / "tokens"))
    assert found == {entry.path for entry in published.files} | {"manifest.json", "text/manifest.json"}


def test_what_is_published_stays_whole_until_it_is_replaced(root: Path) -> None:
    run(specification(root))
    before = Manifest.read(f"{root}/tokens/pairs")
    changed = specification(root, seed=1)
    run_until(changed, 3)
    run_until(changed, 2)  # which tidied up after the first
    assert Manifest.read(f"{root}/tokens/pairs") == before
    before.verify(f"{root}/tokens/pairs", content=True)
    run(changed)
    after = Manifest.read(f"{root}/tokens/pairs")
    assert not {entry.path for entry in before.files} & {entry.path for entry in after.files}
    assert {file.name for file in (root / "tokens/pairs").glob("*.parquet")} == {entry.path for entry in after.files}


def test_a_job_killed_between_its_manifest_and_the_end_is_tidied_up(
    root: Path, monkeypatch: pytest.MonkeyPatch, worked: list[str]
) -> None:
    spec = specification(root)

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "delete_stale_shards", stop)
        patched.setattr(receipts, "finished_receipts", lambda *_: {})
        with pytest.raises(Stopped):
            run(spec)
    assert Manifest.find(f"{root}/tokens/pairs")
    assert (root / "tokens/.receipts/pairs").exists()
    unfinished = root / "tokens/pairs" / ".tokens-01234567-00000-00000.parquet.0f0f0f.tmp"
    foreign = root / "tokens/pairs/notes.tmp"
    for file in (unfinished, foreign):
        file.write_bytes(b"x")
    worked.clear()
    run(spec)
    assert len(worked) == 3  # of text; the pairs are published
    assert not (root / "tokens/.receipts").exists()
    assert not unfinished.exists()
    assert foreign.exists()


def test_jobs_on_s3_go_on_as_well(root: Path, s3: str, worked: list[str]) -> None:
    storage.upload(root / "tokenizers", f"{s3}/tokenizers")
    prepare(s3)
    run_until(specification(s3), 4)
    worked.clear()
    manifest, _ = run(specification(s3))
    assert len(worked) == WINDOWS - 4
    local, _ = run(specification(root))
    assert [entry.sha256 for entry in manifest.files] == [entry.sha256 for entry in local.files]
    assert len(storage.list_files(f"{s3}/tokens")) == len(manifest.files) + 3
