"""Curations without a cluster (`resources.workers: 0`), from specification to published shards and report: duplicates,
and all steps together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calumma.platform import storage
from calumma.platform.curation import curate, tasks
from calumma.platform.curation.curate import TooMuchBadInput
from calumma.platform.curation.steps import duplicates, staging
from calumma.platform.storage.manifest import MANIFEST, Manifest

from .conftest import (
    PLUGIN,
    Recorder,
    bytes_below,
    everything,
    left_over,
    raw,
    run,
    specification,
    texts_of,
    two_sources,
    write_lines,
)

pytestmark = pytest.mark.usefixtures("plugin")


# -- duplicates --------------------------------------------------------------------------------------------------------


def test_the_earlier_source_wins(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/first/a.jsonl", ["one", "two", "one"])
    write_lines(tmp_path / "raw/first/b.jsonl", ["TWO", "three"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["four", "three", "one"])
    manifest, recorder = run(two_sources(tmp_path))
    assert texts_of(tmp_path, "first") == ["one", "two", "three"]
    assert texts_of(tmp_path, "second") == ["four"]
    reports = manifest.report["sources"]
    assert reports["first"]["dropped"] == reports["second"]["dropped"] == {"exact duplicate": 2}
    assert [(r["read"], r["kept"]) for r in reports.values()] == [(5, 3), (3, 1)]
    assert recorder.metrics["second/dropped_duplicates"] == 2
    assert not left_over(tmp_path)


def test_only_sources_it_applies_to_are_compared(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/first/a.jsonl", ["one", "one"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["one", "one"])
    run(two_sources(tmp_path, duplicates={"sources": ["second"]}))
    assert texts_of(tmp_path, "first") == ["one", "one"]
    assert texts_of(tmp_path, "second") == ["one"]


def test_what_is_dropped_before_keeps_nothing_from_staying(tmp_path: Path) -> None:
    """A document that another step drops is no reason to drop one that is like it."""
    write_lines(tmp_path / "raw/first/a.jsonl", ["one", "a longer text"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["one", "a longer text", "more"])
    run(two_sources(tmp_path, texts={"min_characters": 5, "sources": ["first"]}))
    assert texts_of(tmp_path, "first") == ["a longer text"]
    assert texts_of(tmp_path, "second") == ["one", "more"]

    scorer = {"factory": f"{PLUGIN}:length", "of": "documents", "minimum": 5, "sources": ["first"]}
    run(two_sources(tmp_path, scorers={"length": scorer}))
    assert texts_of(tmp_path, "first") == ["a longer text"]
    assert texts_of(tmp_path, "second") == ["one", "more"]


def test_sources_that_are_compared_are_made_again_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[str] = []
    stage = tasks.stage_files
    monkeypatch.setattr(tasks, "stage_files", lambda task: worked.append(task["source"]) or stage(task))
    write_lines(tmp_path / "raw/first/a.jsonl", ["one", "two"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["two", "three"])
    first, _ = run(two_sources(tmp_path))
    assert run(two_sources(tmp_path))[0] == first
    assert worked == ["first", "second"]
    worked.clear()

    write_lines(tmp_path / "raw/first/b.jsonl", ["three!", "three"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["two", "three", "four"])
    run(two_sources(tmp_path))
    assert worked == ["first", "first", "second"]
    assert texts_of(tmp_path, "second") == ["four"]
    # The second source depends on the first, not the other way round.
    names = [source["name"] for source in Manifest.read(f"{tmp_path}/curated/first").specification["sources"]]
    assert names == ["first"]
    assert len(Manifest.read(f"{tmp_path}/curated/second").inputs) == 2


def test_bad_input_fails_before_anything_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "find_duplicates", None)
    write_lines(tmp_path / "raw/first/a.jsonl", ["one"])
    (tmp_path / "raw/second").mkdir()
    (tmp_path / "raw/second/a.jsonl").write_text('{"text": \n{"text": "x"}\n')
    with pytest.raises(TooMuchBadInput, match=r"source 'second': 50\.00% of the input is unreadable"):
        run(two_sources(tmp_path))
    assert not (tmp_path / "curated" / MANIFEST).exists()
    assert not left_over(tmp_path)


def test_a_source_of_nothing_but_duplicates_is_told_and_others_stand(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/first/a.jsonl", ["one"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["ONE"])
    with pytest.raises(TooMuchBadInput, match=r"'second': no document is left of 1 read \(1 exact duplicate\)"):
        run(two_sources(tmp_path))
    assert texts_of(tmp_path, "first") == ["one"]
    assert Manifest.find(f"{tmp_path}/curated/second") is None


class Killed(BaseException):
    pass


def test_a_killed_run_starts_again_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "killed"):
        write_lines(tmp_path / name / "raw/first/a.jsonl", [f"text {n % 30}" for n in range(40)])
        write_lines(tmp_path / name / "raw/second/a.jsonl", [f"text {n % 50}" for n in range(60)])
    run(two_sources(tmp_path / "whole"))

    write = storage.write_bytes
    delete = storage.delete
    left = 0

    def fails_at_last(uri: str, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        write(uri, data)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_bytes", fails_at_last)
        # A process that is killed deletes nothing.
        patched.setattr(storage, "delete", lambda uri: delete(uri) if left >= 0 else None)
        for writes in range(14):
            left = writes
            with pytest.raises(Killed):
                run(two_sources(tmp_path / "killed"))
            assert Manifest.find(f"{tmp_path}/killed/curated") is None
    assert left_over(tmp_path / "killed")
    run(two_sources(tmp_path / "killed"))
    assert not left_over(tmp_path / "killed")
    assert bytes_below(tmp_path / "killed/curated") == bytes_below(tmp_path / "whole/curated")
    assert bytes_below(tmp_path / "whole/curated")


# -- all steps, and the report -----------------------------------------------------------------------------------------


def test_every_step_is_counted_and_shown(tmp_path: Path) -> None:
    raw(tmp_path)
    progress: list[float] = []
    recorder = Recorder()
    manifest = curate.run(everything(tmp_path), recorder, lambda done, total, note="": progress.append(done / total))  # type: ignore[arg-type]
    pairs, texts = manifest.report["sources"]["pairs"], manifest.report["sources"]["texts"]
    assert pairs["steps"] == {"images": 4, "captions": 1}
    assert pairs["copies"] > 0
    assert texts["steps"] == {"texts": 1, "decontaminate": 1, "scorers": 1, "duplicates": texts["steps"]["duplicates"]}
    assert texts["dropped"]["5 words of evaluation.txt"] == 1
    assert texts["dropped"]["repetition above 20"] == 1
    for report in (pairs, texts):
        assert report["read"] == report["kept"] + sum(report["steps"].values()) == 40
    assert progress == sorted(progress)
    assert progress[-1] == 1
    took = {name: seconds for name, seconds in recorder.metrics.items() if name.startswith("texts/seconds_")}
    steps = ("form", "images", "captions", "texts", "decontaminate", "scrub", "scorers", "duplicates")
    assert took.keys() == {f"texts/seconds_{step}" for step in steps}
    assert min(took.values()) > 0

    page = (tmp_path / "curated/report.html").read_text()
    assert "Time, of all processes together: " in page
    assert recorder.artifacts == {"report.html": page.encode()}
    for words in ("image side below 6 pixels", "caption is boilerplate", "like ", "&lt;SECRET&gt;", "&lt;EMAIL&gt;"):
        assert words in page
    assert "AKIA" not in page
    assert "me@example.org" not in page
    assert "<script" not in page
    assert page.count("data:image/png;base64,") > 10
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not left_over(tmp_path)


def test_what_is_dropped_before_scrubbing_is_shown_scrubbed(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", ["a@b.org", "a text that is long enough"])
    sources = [{"name": "texts", "format": "jsonl", "location": "raw"}]
    spec = specification(tmp_path, sources=sources, texts={"min_characters": 10}, scrub={})
    run(spec)
    page = (tmp_path / "curated/report.html").read_text()
    assert "text below 10 characters" in page
    assert "a@b.org" not in page
    assert json.loads((tmp_path / "curated/report.json").read_text())["texts"]["findings"]["marks"] == {}


def test_the_report_remembers_sources_that_stand(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/first/a.jsonl", ["one", "kept by the first"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["two", "kept by the second"])
    spec = two_sources(tmp_path, duplicates=None, texts={"min_characters": 5})
    run(spec)
    before = (tmp_path / "curated/report.html").read_text()
    write_lines(tmp_path / "raw/second/a.jsonl", ["three", "kept by the second, later"])
    run(spec)
    after = (tmp_path / "curated/report.html").read_text()
    assert "kept by the first" in before
    assert "kept by the first" in after
    assert "kept by the second, later" in after
    # Without those findings there is a report, too.
    (tmp_path / "curated/report.json").write_text("{")
    write_lines(tmp_path / "raw/second/a.jsonl", ["three", "kept by the second, at last"])
    run(spec)
    page = (tmp_path / "curated/report.html").read_text()
    assert "kept by the second, at last" in page
    assert "Nothing is known" in page


def test_a_specification_that_changes_one_step_is_carried_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/first/a.jsonl", ["one", "One", "two, the longer"])
    write_lines(tmp_path / "raw/second/a.jsonl", ["one"])
    run(two_sources(tmp_path, duplicates=None))
    assert texts_of(tmp_path, "first") == ["one", "One", "two, the longer"]
    run(two_sources(tmp_path, duplicates={"sources": ["first"]}))
    assert texts_of(tmp_path, "first") == ["one", "two, the longer"]
    assert texts_of(tmp_path, "second") == ["one"]


def test_changed_evaluation_sets_are_noticed(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", ["to be or not to be", "something else"])
    (tmp_path / "evaluation.txt").write_text("all the world is a stage\n")
    sources = [{"name": "texts", "format": "jsonl", "location": "raw"}]
    rules = {"against": ["evaluation.txt"], "ngram": 5, "shortest": 5}
    spec = specification(tmp_path, sources=sources, decontaminate=rules)
    run(spec)
    assert texts_of(tmp_path, "texts") == ["to be or not to be", "something else"]
    (tmp_path / "evaluation.txt").write_text("to be or not to be\n")
    run(spec)
    assert texts_of(tmp_path, "texts") == ["something else"]


def test_all_steps_work_on_object_storage(tmp_path: Path, s3: str) -> None:
    raw(tmp_path)
    storage.upload(tmp_path / "raw", f"{s3}/raw")
    storage.upload(tmp_path / "evaluation.txt", f"{s3}/evaluation.txt")
    remote, _ = run(everything(s3))
    local, _ = run(everything(tmp_path))
    assert [entry.sha256 for entry in remote.files] == [entry.sha256 for entry in local.files]
    remote.verify(f"{s3}/curated", content=True)
    assert storage.exists(f"{s3}/curated/report.html")
    assert not storage.list_files(f"{s3}/curated/{staging.FOLDER}")
