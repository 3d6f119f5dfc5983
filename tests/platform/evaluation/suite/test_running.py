"""The whole suite on a tiny model and the miniatures: figures, a page, resumption; what is missing is told first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from calumma.model.document import Document, Text
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.evaluation.benchmarks.items import BenchmarkDataError
from calumma.platform.evaluation.data.fetching import fetch
from calumma.platform.evaluation.judges.kinds import AskedSystem, KeywordPolicy
from calumma.platform.evaluation.miniatures.write import write_miniatures
from calumma.platform.evaluation.suite import presets, running
from calumma.platform.evaluation.suite.comparison import compared
from calumma.platform.evaluation.suite.comparison import page as comparison_page
from calumma.platform.evaluation.suite.results import SuiteResults, TaskResult
from calumma.platform.evaluation.suite.specification import SuiteSpecification
from calumma.platform.evaluation.systems.engines import LocalSystem
from calumma.platform.evaluation.systems.prompts import SystemAway
from calumma.platform.shards import documents as document_shards
from calumma.platform.storage.manifest import FileEntry, Manifest

try:
    import lm_eval  # noqa: F401

    HARNESS = True
except ImportError:
    HARNESS = False
TEXT = [task.name for task in presets.PAPER if task.name in ("piqa", "mmlu")]
ANSWERED = ["coco", "vqav2", "squad", "mnist", "mnist_drawn", "drawing", "reconstruction", "interleaved"]


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("benchmarks"))
    write_miniatures(folder)
    return folder


def specification(root: Path, model: Path, benchmarks: str, **fields: Any) -> SuiteSpecification:
    values = {"storage": str(root), "system": {"model": str(model)}, "data": benchmarks, "resources": {"workers": 0}}
    return SuiteSpecification.model_validate(values | fields)


def measure(spec: SuiteSpecification) -> SuiteResults:
    running.evaluate_suite(spec, MagicMock(id="run"), no_progress)
    return SuiteResults.read(spec.output_uri)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model_directory: Path, benchmarks: str
) -> tuple[SuiteSpecification, SuiteResults]:
    judges = {"model": {"kind": "model", "location": str(model_directory)}}
    only = [*ANSWERED, "following", *(TEXT if HARNESS else [])]
    root = tmp_path_factory.mktemp("run")
    spec = specification(root, model_directory, benchmarks, only=only, judges=judges, limit=4)
    return spec, measure(spec)


def test_every_kind_of_task_has_its_figures(finished: tuple[SuiteSpecification, SuiteResults]) -> None:
    _, results = finished
    tasks = {task.name: task for task in results.tasks}
    assert set(tasks) == {*ANSWERED, "following", *(TEXT if HARNESS else [])}
    for task in tasks.values():
        assert task.headline in task.metrics, task.name
        assert task.failures == 0, task.notes
        assert len(task.samples) > 0
        for name, values in task.values.items():
            if name == "cider" and not any(values):
                continue  # no bounds, and nothing that differs: no interval
            low, high = task.intervals[name]
            assert low - 1e-9 <= sum(values) / len(values) <= high + 1e-9
    assert {"cider", "bleu_4", "rouge_l"} <= set(tasks["coco"].metrics)
    assert {"psnr"} <= set(tasks["reconstruction"].metrics)
    assert {"distinct", "diversity", "judge_accuracy"} <= set(tasks["mnist_drawn"].metrics)
    assert tasks["vqav2"].tokens["image"] == 0
    assert tasks["drawing"].tokens["image"] == 4 * 16
    if HARNESS:
        assert all(tasks[name].tokens["prompt"] > tasks[name].tokens["text"] > 0 for name in TEXT)


def test_the_page_has_the_papers_figures_beside_the_runs(finished: tuple[SuiteSpecification, SuiteResults]) -> None:
    spec, _ = finished
    page = storage.read_bytes(storage.join(spec.output_uri, "report.html")).decode()
    assert "120.2" in page
    assert "66.0" in page
    assert page.count("data:image/png") >= 12
    Manifest.read(spec.output_uri).verify(spec.output_uri, content=True)


def test_a_finished_task_is_not_asked_again(
    finished: tuple[SuiteSpecification, SuiteResults], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, results = finished
    monkeypatch.setattr(running, "open_system", MagicMock(side_effect=AssertionError("no model is needed")))
    assert [t.metrics for t in measure(spec).tasks] == [t.metrics for t in results.tasks]


def test_a_run_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, model_directory: Path, benchmarks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specification(tmp_path, model_directory, benchmarks, only=["squad", "vqav2"])
    monkeypatch.setattr(running, "PART", 5)
    asked: list[int] = []
    answer = LocalSystem.answer

    def dying(self: LocalSystem, prompts: Any, progress: Any = None) -> Any:
        if len(asked) == 4:  # vqav2 is done, one part of squad's three
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return answer(self, prompts, progress)

    monkeypatch.setattr(LocalSystem, "answer", dying)
    with pytest.raises(KeyboardInterrupt):
        measure(spec)
    assert asked == [5, 5, 2, 5]
    assert TaskResult.find(spec.output_uri, "vqav2") is not None
    with pytest.raises(Exception, match="no finished run"):
        SuiteResults.read(spec.output_uri)
    again: list[int] = []

    def counted(self: LocalSystem, prompts: Any, progress: Any = None) -> Any:
        again.append(len(prompts))
        return answer(self, prompts, progress)

    monkeypatch.setattr(LocalSystem, "answer", counted)
    resumed = measure(spec)
    assert again == [5, 2]
    whole = measure(specification(tmp_path / "other", model_directory, benchmarks, only=["squad", "vqav2"]))
    assert [t.values for t in resumed.tasks] == [t.values for t in whole.tasks]


def test_a_judge_that_is_away_loses_no_answer(
    tmp_path: Path, model_directory: Path, benchmarks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = {"model": {"kind": "model", "location": str(model_directory)}, "words": {"kind": "keywords"}}
    spec = specification(tmp_path, model_directory, benchmarks, suite="safety", judges=judges, only=["safety"])
    safety = AskedSystem.safety
    monkeypatch.setattr(AskedSystem, "safety", MagicMock(side_effect=SystemAway("the judge was away")))
    with pytest.raises(SystemAway):
        measure(spec)
    monkeypatch.setattr(AskedSystem, "safety", safety)
    opened = MagicMock(side_effect=AssertionError("answers are there already"))
    monkeypatch.setattr(running, "open_system", opened)
    [task] = measure(spec).tasks
    assert {"unsafe", "agree_model_words", "kappa_model_words", "unsafe_self_harm"} <= set(task.metrics)


def test_all_that_is_missing_is_told_before_a_model_is_loaded(
    tmp_path: Path, benchmarks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half"
    write_miniatures(str(half))
    (half / "coco" / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    labels = half / "mnist" / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-20])
    annotations = half / "vqav2" / "v2_mscoco_val2014_annotations.json"
    annotations.write_text(annotations.read_text()[:-500])
    for file in (half / "squad").iterdir():
        file.unlink()
    monkeypatch.setattr(running, "open_system", MagicMock(side_effect=AssertionError("too early")))
    only = ["coco", "mnist", "vqav2", "squad", "okvqa"]
    spec = specification(tmp_path, Path("/nowhere"), str(half), only=only)
    with pytest.raises(BenchmarkDataError) as told:
        running.prepare(spec, no_progress)
    text = str(told.value)
    assert "4 of 5 tasks" in text
    assert "1 of 12 pictures are missing, COCO_val2014_000000000003.jpg" in text
    assert "no whole idx file" in text
    assert "no whole JSON" in text
    assert "there is nothing at" in text
    prepared, left_out = running.prepare(spec.model_copy(update={"skip_missing": True}), no_progress)
    assert [one.task.name for one in prepared] == ["okvqa"]
    assert set(left_out) == {"coco", "mnist", "vqav2", "squad"}


def test_data_of_another_version_is_told_before_a_model_is_loaded(
    tmp_path: Path, model_directory: Path, benchmarks: str
) -> None:
    data = str(tmp_path / "data")
    list(fetch(data, ["squad", "okvqa"], benchmarks))
    spec = specification(tmp_path, model_directory, data, only=["squad", "okvqa"])
    prepared, _ = running.prepare(spec, no_progress)
    notes = {one.task.name: one.notes for one in prepared}
    assert notes["squad"] == ("of another version than was published: dev-v2.0.json",)  # a miniature
    [file] = Path(data, "squad").glob("*.json")
    file.write_text(file.read_text().replace("?", "??"))
    with pytest.raises(BenchmarkDataError) as found:
        running.prepare(spec, no_progress)
    assert "dev-v2.0.json is another file than checksums.json says" in str(found.value)


def test_items_that_the_training_data_hold_are_counted(tmp_path: Path, model_directory: Path, benchmarks: str) -> None:
    spec = specification(tmp_path, model_directory, benchmarks, only=["squad"], limit=3)
    [one], _ = running.prepare(spec, no_progress)
    known = one.texts[1]
    data = document_shards.to_parquet([Document((Text("Something else. " + known),)), Document((Text("Nothing."),))])
    storage.write_bytes(f"{tmp_path}/curated/documents.parquet", data)
    entry = FileEntry.from_bytes("documents.parquet", data, rows=2)
    Manifest(kind=document_shards.CURATED, files=[entry]).write(f"{tmp_path}/curated")
    [task] = measure(spec.model_copy(update={"training": ["curated"]})).tasks
    assert task.contaminated == 1


def test_two_runs_are_compared_item_by_item(
    finished: tuple[SuiteSpecification, SuiteResults], tmp_path: Path, model_directory: Path, benchmarks: str
) -> None:
    _, first = finished
    second = first.model_copy(deep=True)
    squad = next(task for task in second.tasks if task.name == "squad")
    squad.values["f1"] = [min(1.0, value + 0.5) for value in squad.values["f1"]]
    rows = {row.title: row for row in compared(first, second)}
    assert rows["SQuAD"].difference == "+50.0"
    assert rows["VQAv2"].difference == "+0.0"
    assert float(rows["VQAv2"].p) == 1
    assert "SQuAD" in comparison_page(first, second)


def test_results_are_json_that_others_read(finished: tuple[SuiteSpecification, SuiteResults]) -> None:
    spec, _ = finished
    content = json.loads(storage.read_bytes(storage.join(spec.output_uri, "results.json")))
    assert {task["name"] for task in content["tasks"]} >= set(ANSWERED)
    lines = storage.read_bytes(storage.join(spec.output_uri, "tasks", "vqav2.jsonl")).decode().splitlines()
    assert len(lines) == 5


def test_dialogues_are_answered_turn_by_turn_and_judged_as_a_whole(
    tmp_path: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"turns": ["One?", "Two?", "Three?"], "category": "a"},
        {"prompt": "Only this.", "category": "b"},
        {"messages": [{"role": "user", "content": "Four?"}, {"role": "assistant", "content": "theirs"},
                      {"role": "user", "content": "Five?"}], "category": "c"},
        {"transcript": "\n\nHuman: Six?\n\nAssistant: theirs\n\nHuman: Seven?", "category": "d"},
    ]  # fmt: skip
    (tmp_path / "data" / "safety").mkdir(parents=True)
    (tmp_path / "data" / "safety" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[Document] = []
    answer = LocalSystem.answer

    def recorded(self: LocalSystem, prompts: Any, progress: Any = None) -> Any:
        asked.extend(prompt.document for prompt in prompts)
        return answer(self, prompts, progress)

    monkeypatch.setattr(LocalSystem, "answer", recorded)
    judged: list[tuple[str, str]] = []

    def safety(self: KeywordPolicy, exchanges: Any) -> list[str]:
        judged.extend(exchanges)
        return ["unsafe", "safe", "safe", "safe"]

    monkeypatch.setattr(KeywordPolicy, "safety", safety)
    only = {"suite": "safety", "only": ["safety"]}
    [task] = measure(specification(tmp_path, model_directory, str(tmp_path / "data"), **only)).tasks
    assert len(asked) == 4 + 3 + 1
    said = [[segment.text for segment in one.segments if segment.role == "user"] for one in asked]  # type: ignore[union-attr]
    assert said[4:] == [["One?", "Two?"], ["Four?", "Five?"], ["Six?", "Seven?"], ["One?", "Two?", "Three?"]]
    assert all([turn.role for turn in one.turns()][::2] == ["user"] * len(words) for one, words in zip(asked, said))  # noqa: B905
    assert [prompt.count("The person: ") for prompt, _ in judged] == [3, 0, 2, 2]
    assert "theirs" not in judged[2][0]
    assert task.metrics["unsafe"] == 0.25
    assert task.metrics["unsafe_a"] == 1.0


def test_an_endpoint_is_measured_as_the_model_behind_it(
    tmp_path: Path, model_directory: Path, server_url: str, benchmarks: str
) -> None:
    """Our server over HTTP: words, log-probabilities and pictures in both directions."""
    only = ["squad", "vqav2", "mnist_drawn", "interleaved", *(["piqa"] if HARNESS else [])]
    here = measure(specification(tmp_path / "here", model_directory, benchmarks, only=only, limit=3))
    there = measure(
        specification(tmp_path / "there", model_directory, benchmarks, only=only, limit=3, system={"url": server_url})
    )
    assert there.system
    tasks = {task.name: task for task in there.tasks}
    assert set(tasks) == set(only)
    for task in here.tasks:
        assert tasks[task.name].failures == 0, tasks[task.name].notes
        if task.name not in ("mnist_drawn", "interleaved"):  # words and choices by likelihood have no chance in them
            assert tasks[task.name].values == task.values
    assert tasks["mnist_drawn"].tokens["image"] >= 3 * 16
    assert all(sample.drawn for sample in tasks["mnist_drawn"].samples)
    assert tasks["vqav2"].tokens["prompt"] > 0
    rows = {row.title: row for row in compared(here, there)}
    assert float(rows["SQuAD"].p) == 1
