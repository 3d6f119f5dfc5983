"""Curations with scores and duplicates, from specification to published shards and report.

All but the last test run without a cluster (`resources.workers: 0`).
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.curation import curate, tasks
from calumma.platform.curation.curate import TooMuchBadInput
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps import duplicates, scorers, staging
from calumma.platform.curation.steps.scoring import ScorerFailed
from calumma.platform.shards.documents import read_documents
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import MANIFEST, Manifest

PLUGIN = "scorers_of_the_test"


class Recorder:
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.artifacts: dict[str, bytes] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_image(self, image: PILImage.Image, path: str) -> None: ...

    def log_artifact(self, local_path: Path, folder: str | None = None) -> None:
        self.artifacts[local_path.name] = local_path.read_bytes()


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLUGIN, sys.modules[__name__])


def red() -> Any:
    """Scores an image by its red."""
    return lambda images: [float(image.getpixel((0, 0))[0]) for image in images]


def length(unit: float = 1.0) -> Any:
    return lambda documents: [len(document.text) / unit for document in documents]


def too_few() -> Any:
    return lambda images: [1.0] * (len(images) - 1)


def nothing() -> Any:
    return lambda images: [float("nan")] * len(images)


def png(shade: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (side, side), (shade % 256, shade // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_pairs(path: Path, pairs: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (caption, image) in enumerate(pairs):
            for name, data in ((f"{number:04d}.png", image), (f"{number:04d}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def texts_of(root: Path, source: str) -> list[str]:
    return [document.text for document in read_documents(f"{root}/curated/{source}")]


def specification(root: Path | str, **fields: Any) -> CurateSpecification:
    values: dict[str, Any] = {"storage": str(root), "resources": {"workers": 0}, "documents_per_shard": 10, **fields}
    return CurateSpecification.model_validate(values)


def two_sources(root: Path | str, **fields: Any) -> CurateSpecification:
    sources = [{"name": name, "format": "jsonl", "location": f"raw/{name}"} for name in ("first", "second")]
    return specification(root, **{"sources": sources, "duplicates": {}, **fields})


def run(spec: CurateSpecification) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return curate.run(spec, recorder, no_progress), recorder  # type: ignore[arg-type]


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Content by name, without the part of shards' names that tells where they were made."""
    files = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}
    return {f"{path.parent}/{path.name.partition('-')[2].partition('-')[2]}": data for path, data in files.items()}


def left_over(root: Path) -> list[Path]:
    return list((root / "curated").glob(f"{staging.FOLDER}*"))


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


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_choose_and_repeat_documents(tmp_path: Path) -> None:
    write_pairs(tmp_path / "raw/pairs/a.tar", [(f"number {n}", png(n)) for n in range(100)])
    sources = [{"name": "pairs", "format": "webdataset", "location": "raw/pairs"}]
    scorer = {
        "factory": f"{PLUGIN}:red",
        "minimum": 20,
        "maximum": 89,
        "upsample": {"above": 69, "times": 2.5},
        "batch": 7,
    }
    manifest, _ = run(specification(tmp_path, sources=sources, scorers={"red": scorer}))
    numbers = Counter(int(text.split()[1]) for text in texts_of(tmp_path, "pairs"))
    assert set(numbers) == set(range(20, 90))
    assert {numbers[n] for n in range(20, 70)} == {1}
    assert {numbers[n] for n in range(70, 90)} == {2, 3}
    report = manifest.report["sources"]["pairs"]
    assert report["dropped"] == {"red below 20": 20, "red above 89": 10}
    assert report["copies"] == sum(numbers.values()) - 70
    assert sum(entry.rows for entry in manifest.files) == sum(numbers.values())
    # Copies stand behind all documents, in the same order of image and caption.
    documents = list(read_documents(f"{tmp_path}/curated/pairs"))
    assert [d.text for d in documents[:70]] == [f"number {n}" for n in range(20, 90)]
    assert set(documents[70:]) < set(documents[:70])
    assert 0 < report["image_first"] < 70


def test_a_fraction_of_copies_is_a_share_of_the_documents() -> None:
    from calumma.model.document import Text
    from calumma.platform.curation.specification import Scorer
    from calumma.platform.curation.steps.scoring import copies

    rules = {
        "a": Scorer.model_validate({"factory": "x:y", "upsample": {"above": 0, "times": 1.3}}),
        "b": Scorer.model_validate({"factory": "x:y", "upsample": {"above": 0, "times": 2}}),
    }
    documents = [Document((Text(f"text {n}"),)) for n in range(1000)]
    assert {copies(d, 0, rules, {"a": 0.0, "b": 1.0}) for d in documents} == {2}
    drawn = Counter(copies(d, 0, rules, {"a": 1.0, "b": 1.0}) for d in documents)
    assert set(drawn) == {2, 3}
    assert abs(drawn[3] / 1000 - 0.6) < 0.08  # five standard deviations
    assert [copies(d, 0, rules, {"a": 1.0}) for d in documents] == [copies(d, 0, rules, {"a": 1.0}) for d in documents]
    assert [copies(d, 0, rules, {"a": 1.0}) for d in documents] != [copies(d, 1, rules, {"a": 1.0}) for d in documents]


@pytest.mark.parametrize(("reduce", "kept"), [("mean", {0, 2}), ("min", {2}), ("max", {0, 1, 2})])
def test_scores_of_a_documents_images_are_reduced(tmp_path: Path, reduce: str, kept: set[int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "raw").mkdir()
    rows = [[png(200), png(50)], [png(150), png(0)], [png(180), png(120)]]
    table = pa.table(
        {
            "texts": [[f"page {n}", None, None] for n in range(3)] + [["page 3"]],
            "images": [[None, *images] for images in rows] + [pa.scalar([None], pa.list_(pa.binary())).as_py()],
        }
    )
    pq.write_table(table, tmp_path / "raw/pages.parquet")
    sources = [{"name": "pages", "format": "interleaved", "location": "raw/pages.parquet"}]
    scorer = {"factory": f"{PLUGIN}:red", "reduce": reduce, "minimum": 110, "batch": 2}
    run(specification(tmp_path, sources=sources, scorers={"red": scorer}))
    # The page without images has no score, and stays.
    assert texts_of(tmp_path, "pages") == [f"page {n}" for n in sorted({*kept, 3})]


@pytest.mark.parametrize(
    ("factory", "said"),
    [("too_few", "gave 2 scores for 3 images"), ("nothing", "gave the score nan; it must be finite")],
)
def test_scorers_that_fail_are_named(tmp_path: Path, factory: str, said: str) -> None:
    write_pairs(tmp_path / "raw/a.tar", [(f"number {n}", png(n)) for n in range(3)])
    sources = [{"name": "pairs", "format": "webdataset", "location": "raw"}]
    spec = specification(tmp_path, sources=sources, scorers={"mine": {"factory": f"{PLUGIN}:{factory}"}})
    with pytest.raises(ScorerFailed, match=rf"scorers\.mine: {PLUGIN}:{factory} {said}"):
        run(spec)
    assert not left_over(tmp_path)


def test_scorers_of_ours_measure_what_they_say() -> None:
    import numpy as np

    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    blurred, flat = noise.resize((4, 4)).resize((64, 64), PILImage.Resampling.BICUBIC), PILImage.new("RGB", (64, 64))
    sharp = scorers.sharpness()([noise, blurred, flat, PILImage.new("RGB", (2, 2))])
    assert sharp[0] > 100 * sharp[1] > sharp[2] == sharp[3] == 0
    colour = scorers.colourfulness()([noise, noise.convert("L").convert("RGB"), PILImage.new("RGB", (9, 9), "red")])
    assert colour[0] > 80
    assert colour[1] == 0
    assert abs(colour[2] - 0.3 * np.hypot(255, 127.5)) < 1e-9
    from calumma.model.document import Text

    prose, again = Document((Text(json.__doc__ or ""),)), Document((Text("buy now " * 200),))
    ratios = scorers.compressibility()([prose, again, Document(())])
    assert ratios[0] < 4 < 20 < ratios[1]
    assert ratios[2] == 0


# -- all steps, and the report -----------------------------------------------------------------------------------------


def everything(root: Path | str, workers: Any = 0) -> CurateSpecification:
    return specification(
        root,
        resources={"workers": workers},
        sources=[
            {"name": "pairs", "format": "webdataset", "location": "raw/pairs"},
            {"name": "texts", "format": "jsonl", "location": "raw/texts"},
        ],
        images={"min_side": 6},
        captions={},
        texts={"min_characters": 10},
        decontaminate={"against": ["evaluation.txt"], "ngram": 5, "shortest": 5},
        scrub={},
        duplicates={"near": {"words": 3, "similarity": 0.7}},
        scorers={
            "colour": {
                "factory": "calumma.platform.curation.steps.scorers:colourfulness",
                "upsample": {"above": 45, "times": 1.5},
            },
            "repetition": {
                "factory": "calumma.platform.curation.steps.scorers:compressibility",
                "of": "documents",
                "sources": ["texts"],
                "maximum": 20,
                "resources": {"workers": workers},
            },
        },
    )


def raw(root: Path) -> None:
    pairs = [(f"caption of number {n}", png(7 * n, 5 if n % 9 == 8 else 8)) for n in range(40)]
    pairs[3] = ("IMG_0003.png", png(3))
    pairs[5] = ("mail me@example.org <b>", png(5))
    for part in range(4):
        write_pairs(root / f"raw/pairs/{part}.tar", pairs[part * 10 : part * 10 + 10])
    texts = [f"this is text {n // 2} of many, and here {'and there ' * 3}it ends" for n in range(40)]
    texts[7] = "as they said: to be or not to be, that is it"
    texts[8] = "token AKIAIOSFODNN7EXAMPLE <script>alert(1)</script>"
    texts[9] = "buy now " * 400
    texts[10] = "short"
    for part in range(3):
        write_lines(root / f"raw/texts/{part}.jsonl", texts[part * 14 : part * 14 + 14])
    (root / "evaluation.txt").write_text("To be, or not to be\n")


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


def test_scorers_that_the_cluster_has_no_room_for_are_told_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", ["one"])
    sources = [{"name": "texts", "format": "jsonl", "location": "raw"}]
    scorer = {"factory": f"{PLUGIN}:length", "of": "documents", "resources": {"workers": 50_000}}
    spec = specification(tmp_path, sources=sources, scorers={"big": scorer}, resources={"workers": 1})
    with pytest.raises(SpecificationError, match=r"50,?000"):
        run(spec)


@pytest.mark.cluster
def test_the_cluster_makes_the_same_with_one_worker_and_two(ray_cluster: None, tmp_path: Path) -> None:
    made = []
    for name, workers in (("none", 0), ("one", 1), ("two", 2)):
        raw(tmp_path / name)
        manifest, _ = run(everything(tmp_path / name, workers))
        reports = manifest.report["sources"].values()
        counts = [{k: v for k, v in r.items() if k != "fingerprint"} for r in reports]
        made.append((bytes_below(tmp_path / name / "curated"), counts))
    assert made[0] == made[1] == made[2]
    assert len(made[0][0]) > 6
