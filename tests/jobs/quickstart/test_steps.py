"""The quickstart around its steps: ports, remembered seconds, the display, resuming after Ctrl-C. No cluster."""

from __future__ import annotations

import io
import itertools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from calumma.jobs import entry
from calumma.jobs.commands.quickstart import quickstart
from calumma.jobs.emoji.course import COLOUR
from calumma.jobs.quickstart import display, documents, questions, steps
from calumma.jobs.quickstart.course import Course
from calumma.jobs.quickstart.digits import read_scans, split
from calumma.jobs.quickstart.display import Board, Row
from calumma.jobs.quickstart.documents import FAST, DocumentsSpecification, Sizes
from calumma.jobs.quickstart.steps import Options
from calumma.platform.cluster import runner
from calumma.platform.cluster.progress import Progress
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.training.specification import FinetuneSpecification

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(quickstart)


# -- ports


def test_a_taken_port_gives_the_next_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < steps.free_port(port) < port + steps.PORTS


def test_no_free_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PORTS", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SpecificationError, match="choose another with --port"):
            steps.free_port(taken.getsockname()[1])


# -- the display


def test_time_left_follows_the_running_step_and_the_speed_so_far() -> None:
    done = Row("a", "A", usual=10, started=0, seconds=20)
    running = Row("b", "B", usual=10, started=20, done=1, total=4)
    waiting = Row("c", "C", usual=5)
    assert display.left_of(running, now=30) == pytest.approx(30)
    assert display.left([done, running, waiting], now=30) == pytest.approx(30 + 10)  # this machine takes twice as long
    assert display.left([done], now=30) is None
    fresh = Row("b", "B", usual=10, started=20)
    assert display.left([done, fresh], now=25) == pytest.approx(15)


def test_the_live_display_names_every_step_from_the_start() -> None:
    out = io.StringIO()
    rows = [Row("a", "First step", 1), Row("b", "Second step", 1), Row("c", "Third step", 1)]
    with Board(rows, Console(file=out, force_terminal=True, width=120)) as board:
        board.skip("a", 12.0)
        with board.step("b") as progress:
            progress(1, 2, "half [way]")
    shown = out.getvalue()
    for text in ("First step", "Second step", "Third step", "Everything", "already done", "12 s", "half [way]"):
        assert text in shown
    assert board.seconds("b") >= 0


def test_without_a_terminal_steps_are_lines() -> None:
    out = io.StringIO()
    with Board([Row("a", "First", 1), Row("b", "Second", 1)], Console(file=out)) as board:
        with board.step("a") as progress:
            progress(1, 4, "reading")
        board.skip("b", None)
    assert out.getvalue().splitlines()[0] == "First …"
    assert "First:  25%  reading" in out.getvalue()
    assert "First: 0 s" in out.getvalue()
    assert "Second: already done" in out.getvalue()


# -- questions


def test_questions_are_of_three_kinds_and_show_held_out_scans() -> None:
    held_out = split(read_scans(), seed=0)[1]
    asked = questions.questions(held_out)
    assert [q.kind for q in asked] == ["recognition"] * 3 + ["generation"] * 3 + ["interleaved"] * 3
    shown = [q.picture.number for q in asked if q.picture]
    assert set(shown) <= {s.number for s in held_out}
    body = asked[0].body("m", seed=1)
    text, picture = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Which digit is this?"}
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert [q.body("m", 1)["modalities"] for q in asked[::3]] == [["text"], ["image"], ["text", "image"]]


def test_a_server_that_is_not_there_is_told() -> None:
    (question, *_) = questions.questions(split(read_scans(), seed=0)[1])
    with pytest.raises(questions.NoAnswer, match="did not answer 'Which digit is this"):
        questions.ask("http://127.0.0.1:9", "m", question, seed=0)


# -- order, resuming


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that ran, in order; each publishes an empty result, made from the step before's, and computes nothing. No
    cluster starts."""
    ran: list[str] = []
    numbers = itertools.count()
    registered: dict[str, str] = {}

    def publish(spec: steps.JobSpecification, options: Options, progress: Progress) -> Manifest:
        name = spec.run_name or spec.job
        if name in failing:
            raise failing[name]
        ran.append(name)
        order = [steps.step_specification(step, options).output_uri for step in NAMES]
        before = order[max(0, order.index(spec.output_uri) - 1) : order.index(spec.output_uri)]
        values = {"specification": spec.model_dump(mode="json"), "report": {"run": next(numbers)}}
        manifest = Manifest(kind="test", inputs=fingerprints(before), **values)
        manifest.write(spec.output_uri)
        if isinstance(spec, FinetuneSpecification):
            registered[f"models:/{spec.register_as}@{spec.alias}"] = f"{spec.output_uri}/model"
        return manifest

    @contextmanager
    def no_cluster(**given: object) -> Iterator[None]:
        ran.append("cluster")
        yield
        ran.append("cluster stopped")

    monkeypatch.setattr(steps, "_run", publish)
    monkeypatch.setattr(steps.connection, "embedded", no_cluster)
    monkeypatch.setattr("calumma.platform.tracking.registry.model_source", lambda uri, tracking=None: registered[uri])
    return ran


failing: dict[str, BaseException] = {}


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    failing.clear()
    yield
    failing.clear()


def run(workdir: Path) -> steps.QuickstartResult:
    return steps.quickstart(Options(workdir, fast=True), Console(file=io.StringIO()))


NAMES = [step.name for step in steps.STEPS]


def test_steps_run_once_in_one_cluster_and_are_skipped_after(tmp_path: Path, jobs: list[str]) -> None:
    first = run(tmp_path)
    assert jobs == [NAMES[0], "cluster", *NAMES[1:], "cluster stopped"]
    jobs.clear()
    second = run(tmp_path)
    assert jobs == []  # not even a cluster
    assert second.seconds == first.seconds
    assert set(second.seconds) == {*NAMES, "cluster"}


def test_a_lost_step_and_all_after_it_run_again(tmp_path: Path, jobs: list[str]) -> None:
    run(tmp_path)
    jobs.clear()
    spec = steps.step_specification("stage1", Options(tmp_path, fast=True))
    runner.delete_result(spec)
    run(tmp_path)
    after = NAMES.index("stage1")
    assert jobs == ["cluster", *NAMES[after:], "cluster stopped"]


def test_a_changed_kind_of_document_leaves_what_is_not_made_from_it(tmp_path: Path) -> None:
    def source(name: str, sizes: Sizes) -> str:
        spec = DocumentsSpecification(storage=str(tmp_path), sizes=sizes)
        written = documents.write(spec)
        assert written.specification["sizes"]["counting"] == sizes.counting
        return fingerprints([f"{spec.output_uri}/{name}"])[f"{spec.output_uri}/{name}"]

    more = FAST.model_copy(update={"counting": FAST.counting + 5})
    for name, changes in (("pairs", False), ("chat_counting", True)):
        assert (source(name, FAST) != source(name, more)) == changes


@pytest.mark.parametrize("course", [steps.DIGITS, COLOUR])
def test_answers_depend_on_the_sampling_that_was_measured(course: Course, tmp_path: Path) -> None:
    served, measured = (
        steps.step_specification(step, Options(tmp_path, course=course)).model_dump() for step in ("serve", "evaluate")
    )
    assert served["pictures"] == measured["pictures"]


def test_a_step_that_is_killed_is_not_found_whole(tmp_path: Path, jobs: list[str]) -> None:
    run(tmp_path)
    spec = steps.step_specification("curate", Options(tmp_path, fast=True))
    runner.delete_result(steps.step_specification("documents", Options(tmp_path, fast=True)))
    failing["curate"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert Manifest.find(spec.output_uri) is None


@pytest.mark.parametrize("changed", [False, True])
def test_an_unfinished_training_goes_on_only_after_equal_steps(tmp_path: Path, jobs: list[str], changed: bool) -> None:
    failing["stage1"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    failing.clear()
    options = Options(tmp_path, fast=True)
    checkpoint = Path(steps.step_specification("stage1", options).checkpoints) / "step-00000002" / "state"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("half")
    if changed:
        runner.delete_result(steps.step_specification("tokenize", options))
    run(tmp_path)
    assert checkpoint.exists() != changed


def test_ctrl_c_says_how_to_resume_and_the_next_call_does(
    tmp_path: Path, jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing["tokenize"] = KeyboardInterrupt()
    work = tmp_path / "my work"
    done = CliRunner().invoke(app, ["--fast", "--workdir", str(work), "--port", "8005"])
    assert done.exit_code == entry.INTERRUPTED == 130
    assert f"calumma quickstart --workdir '{work}' --fast --port 8005" in done.output
    assert runner.reusable_result(steps.step_specification("tokenize", Options(work, fast=True))) is None
    failing.clear()
    jobs.clear()
    run(work)
    assert jobs == ["cluster", *NAMES[NAMES.index("tokenize") :], "cluster stopped"]


def test_an_error_of_a_step_is_told_without_a_traceback(tmp_path: Path, jobs: list[str]) -> None:
    failing["curate"] = SpecificationError("source 'pairs': nothing there")
    done = CliRunner().invoke(app, ["--fast", "--workdir", str(tmp_path)])
    assert done.exit_code == 1
    assert "source 'pairs': nothing there" in done.output
    assert "Traceback" not in done.output


def test_a_shared_storage_brings_its_model_into_a_new_registry(
    tmp_path: Path, jobs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(tmp_path / "shared")
    options = Options(tmp_path / "one", storage=storage, fast=True)
    console = Console(file=io.StringIO())
    steps.quickstart(options, console)
    monkeypatch.undo()  # a registry that is asked for real
    other = Options(tmp_path / "two", storage=storage, fast=True)
    spec = steps.step_specification("finetune", other)
    assert steps._reusable_result(spec) is not None
    from calumma.platform.tracking import registry
    from calumma.platform.tracking.job_run import job_run

    champion, model = "models:/calumma-quickstart@champion", f"{storage}/stages/finetuned/model"
    assert registry.model_source(champion, other.tracking) == model
    with job_run(spec) as current:
        registry.register(other.tracking, "calumma-quickstart", "/another/model", current.id, "champion")
    assert steps._reusable_result(spec) is not None
    assert registry.model_source(champion, other.tracking) == model, "the alias led elsewhere"
    versions = current.client.search_model_versions("name = 'calumma-quickstart'")
    assert steps._reusable_result(spec) is not None
    assert len(current.client.search_model_versions("name = 'calumma-quickstart'")) == len(versions) == 3
