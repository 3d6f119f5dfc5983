"""Running one job: skipping, checking, tracking, and what the user is told when it goes wrong."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from calumma.jobs import entry
from calumma.jobs.specifications import table
from calumma.platform import specification, storage
from calumma.platform.cluster import runner
from calumma.platform.cluster.progress import Progress
from calumma.platform.specification import JobSpecification, Recovery, Resources, SpecificationError, Tracking
from calumma.platform.storage import StorageError, lease
from calumma.platform.storage.manifest import FileEntry, Manifest


class CountSpecification(JobSpecification):
    """Writes a number into a file: the smallest job there is."""

    job: Literal["count"] = "count"
    output: str = "counted"
    number: int = 1


class Count:
    """The job's module, and a list of the numbers it was run with."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.error: BaseException | None = None

    def run(self, spec: CountSpecification, run: Any, progress: Progress) -> Manifest:
        self.ran.append(spec.number)
        progress(1, 2, "half")
        if self.error is not None:
            raise self.error
        run.log_metrics({"number": spec.number})
        place, content = spec.locate(spec.output), str(spec.number).encode()
        storage.write_bytes(storage.join(place, "number.txt"), content)
        manifest = Manifest(
            kind="count",
            files=[FileEntry.from_bytes("number.txt", content)],
            specification=spec.model_dump(mode="json"),
        )
        manifest.write(place)
        return manifest


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    job = Count()
    module = ModuleType("calumma.jobs.count")
    module.run = job.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "calumma.jobs.count", module)
    monkeypatch.setitem(table.JOBS, "count", CountSpecification)
    return job


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return Tracking(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}", experiment="runner")


@pytest.fixture
def spec(tmp_path: Path, tracking: Tracking) -> CountSpecification:
    return CountSpecification(storage=str(tmp_path / "storage"), tracking=tracking, number=7)


def statuses(tracking: Tracking) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    return [run.info.status for run in client.search_runs([experiment.experiment_id])] if experiment else []


def test_a_job_is_run_and_tracked_and_its_manifest_returned(count: Count, spec: CountSpecification) -> None:
    reports: list[tuple[float, float, str]] = []
    manifest, skipped = runner.run_job(
        spec, count.run, lambda done, total, note="": reports.append((done, total, note))
    )
    assert not skipped
    assert [entry.path for entry in manifest.files] == ["number.txt"]
    assert reports == [(1, 2, "half")]
    assert statuses(spec.tracking)[0] == "FINISHED"


def test_a_result_of_an_equal_specification_is_kept(count: Count, spec: CountSpecification) -> None:
    first, _ = runner.run_job(spec, count.run)
    again, skipped = runner.run_on_own_cluster(
        spec.model_copy(update={"run_name": "again", "resources": Resources(workers=2)}), count.run
    )
    assert skipped
    assert again == first
    assert count.ran == [7]


def test_a_result_of_another_specification_is_made_again(count: Count, spec: CountSpecification) -> None:
    runner.run_job(spec, count.run)
    _, skipped = runner.run_job(spec.model_copy(update={"number": 8}), count.run)
    assert not skipped
    assert count.ran == [7, 8]


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_result_whose_files_are_gone_or_cut_short_is_made_again(
    count: Count, spec: CountSpecification, harm: Callable[[Path], object]
) -> None:
    runner.run_job(spec, count.run)
    file = Path(spec.output_uri, "number.txt")
    harm(file)
    assert runner.reusable_result(spec) is None
    assert runner.run_job(spec, count.run)[1] is False
    assert file.read_bytes() == b"7"
    assert runner.run_job(spec, count.run)[1] is True


def test_force_discards_what_was_made_and_only_that(count: Count, spec: CountSpecification) -> None:
    runner.run_job(spec, count.run)
    place = Path(spec.output_uri)
    (place / "checkpoints").mkdir()
    (place / "checkpoints" / "old.bin").write_bytes(b"old")
    (place / ".receipts").mkdir()
    (place / ".receipts" / "tokens-00000000-00000.json").write_text("{}")
    (place / "mine.txt").write_text("not made by the job")
    _, skipped = runner.run_job(spec, count.run, force=True)
    assert not skipped
    assert count.ran == [7, 7]
    assert sorted(file.name for file in place.rglob("*") if file.is_file()) == [
        "manifest.json",
        "mine.txt",
        "number.txt",
    ]


def test_a_job_without_workers_needs_no_cluster(
    count: Count, spec: CountSpecification, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(**_: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(runner.connection, "embedded", started)
    monkeypatch.setattr(specification, "IN_PROCESS", ("count",))
    _, skipped = runner.run_on_own_cluster(spec.model_copy(update={"resources": Resources(workers=0)}), count.run)
    assert not skipped
    assert count.ran == [7]


def test_a_job_that_asks_for_too_much_is_refused_before_anything_happens(
    count: Count, spec: CountSpecification
) -> None:
    runner.run_job(spec, count.run)
    before = statuses(spec.tracking)
    greedy = spec.model_copy(update={"resources": Resources(workers=10_000), "number": 9})
    for run in (runner.run_job, runner.run_on_own_cluster):
        with pytest.raises(SpecificationError, match="asked for 10000"):
            run(greedy, count.run, force=True)
    assert statuses(spec.tracking) == before
    assert runner.reusable_result(spec) is not None
    assert count.ran == [7]


@pytest.mark.parametrize(("error", "status"), [(ValueError("disk full"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_job_that_fails_is_marked_and_publishes_nothing(
    count: Count, spec: CountSpecification, error: BaseException, status: str
) -> None:
    count.error = error
    with pytest.raises(type(error)):
        runner.run_job(spec, count.run)
    assert statuses(spec.tracking)[0] == status
    assert runner.reusable_result(spec) is None
    count.error = None
    assert runner.run_job(spec, count.run)[1] is False


def test_an_unknown_job_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SpecificationError, match=r"no job 'tokenise'; jobs are: curate, .*tokenize"):
        entry.job_specification("tokenise", tmp_path / "x.yaml")


# --- what the user is told -----------------------------------------------------------------------------------------


def told(error: BaseException) -> tuple[int, str]:
    """Exit code and last words of a command that ends with this error."""
    words: list[str] = []

    def act() -> None:
        raise error

    code = entry.exit_code_of(act, "calumma job run count", words.append)
    return code, "\n".join(words)


def test_errors_in_the_users_terms_come_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(SpecificationError("steps: required")) == (1, "steps: required")
    assert told(StorageError("cannot read s3://b/k: no such bucket")) == (1, "cannot read s3://b/k: no such bucket")
    assert capsys.readouterr().err == ""


def test_bugs_come_with_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(ZeroDivisionError("division by zero")) == (1, "ZeroDivisionError: division by zero")
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_how_to_resume() -> None:
    code, words = told(KeyboardInterrupt())
    assert code == 130
    assert words.endswith("resume by the same command: calumma job run count")


def test_errors_of_the_user_are_found_inside_those_of_ray(capsys: pytest.CaptureFixture[str]) -> None:
    from ray.exceptions import RayTaskError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    cause = StorageError("cannot write /data: disk full")
    task = RayTaskError("write", "Traceback …", cause).as_instanceof_cause()
    wrapped = UserExceptionWithTraceback(cause, "Traceback …")
    for error in (task, WorkerGroupError("rank 1 failed", {1: wrapped}), ControllerError(task)):
        assert told(error) == (1, "cannot write /data: disk full")
    outer = RuntimeError("the dataset failed")
    outer.__cause__ = cause
    assert told(outer) == (1, "cannot write /data: disk full")
    assert capsys.readouterr().err == ""


def test_a_job_file_exits_with_a_code_and_names_the_wrong_field(
    tmp_path: Path, count: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "count.yaml"
    file.write_text(f"storage: {tmp_path}\nnumbr: 3\n")
    assert entry.main("count", ["--config", str(file)]) == 1
    errors = capsys.readouterr().err
    assert "numbr: unknown field (given 3)" in errors
    assert "Traceback" not in errors


def test_a_job_file_skips_what_stands_without_a_cluster(
    spec: CountSpecification, tmp_path: Path, count: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.run_job(spec, count.run)
    file = tmp_path / "count.yaml"
    file.write_text(f"storage: {spec.storage}\ntracking: {{uri: '{spec.tracking.uri}'}}\n")
    assert entry.main("count", ["--config", str(file), "--set", "number=7"]) == 0
    assert "count: already done" in capsys.readouterr().err
    assert count.ran == [7]


@pytest.mark.cluster
def test_a_job_file_runs_on_the_cluster_of_the_session(
    ray_cluster: None, spec: CountSpecification, tmp_path: Path, count: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "count.yaml"
    file.write_text(f"storage: {spec.storage}\ntracking: {{uri: '{spec.tracking.uri}'}}\nnumber: 5\n")
    assert entry.main("count", ["--config", str(file)]) == 0
    assert (Path(spec.output_uri) / "number.txt").read_text() == "5"
    assert "count:  50%  half" in capsys.readouterr().err


def test_an_output_that_another_run_writes_to_is_refused_before_anything_is_tracked_or_deleted(
    spec: CountSpecification, count: Count, tmp_path: Path
) -> None:
    tracking = Tracking(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="taken")
    own = spec.model_copy(update={"tracking": tracking})
    runner.run_job(own, count.run)
    runs = statuses(tracking)
    with lease.held(spec.output_uri) as other:
        other.tell("run-7")
        with pytest.raises(lease.OutputTaken, match="is being written by the run run-7"):
            runner.run_job(own, count.run, force=True)
        assert runner.run_job(own, count.run)[1] is True, "what is finished can be read by everybody"
    assert Manifest.find(spec.output_uri) is not None
    assert count.ran == [7]
    assert statuses(tracking) == runs


def test_a_job_that_has_lost_its_output_fails_and_says_to_whom(
    spec: CountSpecification, count: Count, tracking: Tracking
) -> None:
    """What it has begun is not published: the other's stands."""
    fields = {"resources": Resources(recovery=Recovery(lease_seconds=0.6))}

    def slow(spec: CountSpecification, run: Any, progress: Progress) -> Manifest:
        later = lease.Owner.here(60).model_dump_json().encode()
        assert storage.create(f"{spec.output_uri}.lease/{run.fence.epoch + 1:08d}.json", later)
        time.sleep(60)
        return count.run(spec, run, progress)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in several processes ignore
    try:
        with pytest.raises(lease.OutputTaken, match="belongs to another run"):
            runner.run_job(spec.model_copy(update=fields), slow)
    finally:
        signal.signal(signal.SIGINT, before)
    assert count.ran == []
    assert Manifest.find(spec.output_uri) is None
    assert "KILLED" in statuses(tracking) or "FAILED" in statuses(tracking)
