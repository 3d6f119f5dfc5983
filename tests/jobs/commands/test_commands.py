"""The command line: helps, what it loads, what it says about wrong input, `job` and `doctor`."""

import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from calumma.jobs import entry
from calumma.jobs.commands import doctor, job
from calumma.jobs.commands.doctor import State
from calumma.jobs.commands.main import app
from calumma.jobs.specifications.table import JOBS
from calumma.platform.cluster.capacity import ClusterError
from calumma.platform.storage.manifest import Manifest

HEAVY = ("deepspeed", "matplotlib", "mlflow", "ray", "sklearn", "torch", "transformers")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    return CliRunner()


@pytest.fixture
def closed_port() -> str:
    """An address on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def commands() -> Iterator[list[str]]:
    """All commands of `calumma`, as the words that call them."""
    waiting: list[tuple[list[str], object]] = [([], get_command(app))]
    while waiting:
        words, command = waiting.pop()
        yield words
        waiting += [([*words, name], inner) for name, inner in getattr(command, "commands", {}).items()]


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: " ".join(words) or "calumma")
def test_every_command_explains_itself(cli: CliRunner, words: list[str]) -> None:
    result = cli.invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_the_commands_are_those_of_the_design() -> None:
    found = {" ".join(words) for words in commands()}
    assert found >= {"quickstart", "chat", "doctor", "serve start", "serve status", "serve stop"}
    assert found >= {f"job {name}" for name in ("run", "submit", "list", "status", "logs", "stop")}


def test_help_loads_nothing_heavy() -> None:
    script = f"""
        import sys
        from typer.testing import CliRunner
        from calumma.jobs.commands.main import app
        for words in (["--help"], ["job", "run", "--help"], ["serve", "start", "--help"], ["chat", "--help"]):
            assert CliRunner().invoke(app, words).exit_code == 0
        print([name for name in {HEAVY} if name in sys.modules])
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package(cli: CliRunner) -> None:
    from importlib.metadata import version

    assert cli.invoke(app, ["--version"]).output.strip() == f"calumma {version('calumma')}"


# --- job -----------------------------------------------------------------------------------------------------------


def test_help_says_of_every_job_what_it_does(cli: CliRunner) -> None:
    shown = cli.invoke(app, ["job", "run", "--help"]).output
    purposes = {job.purpose(name) for name in JOBS}
    assert len(purposes) == len(JOBS)
    assert all(purposes)
    assert [name for name in JOBS if f"{name}: {job.purpose(name)[:40]}" not in shown] == []


@pytest.mark.parametrize("command", ["run", "submit"])
def test_an_unknown_job_is_told_the_known_ones(cli: CliRunner, curate: Path, command: str) -> None:
    result = cli.invoke(app, ["job", command, "currate", "--config", str(curate)])
    assert result.exit_code == 1
    assert f"no job 'currate'; jobs are: {', '.join(JOBS)}" in result.output


@pytest.mark.parametrize("command", ["run", "submit"])
def test_a_wrong_field_is_told_before_anything_starts(cli: CliRunner, curate: Path, command: str) -> None:
    result = cli.invoke(app, ["job", command, "curate", "--config", str(curate), "--set", "min_txt=3"])
    assert result.exit_code == 1
    assert "min_txt: unknown field (given 3)" in result.output
    assert "min_text" in result.output
    assert "Traceback" not in result.output


def test_too_many_workers_are_told_before_a_cluster_starts(cli: CliRunner, curate: Path) -> None:
    result = cli.invoke(app, ["job", "run", "curate", "--config", str(curate)])
    assert result.exit_code == 1
    assert "resources.workers: asked for 100000" in result.output
    assert "this machine" in result.output


@pytest.mark.parametrize(
    "words", [["submit", "curate"], ["list"], ["status", "x"], ["logs", "x"], ["logs", "x", "--follow"], ["stop", "x"]]
)
def test_a_cluster_that_does_not_answer_is_told(
    cli: CliRunner, curate: Path, closed_port: str, words: list[str]
) -> None:
    config = ["--config", str(curate)] if "submit" in words else []
    result = cli.invoke(app, ["job", *words, *config, "--address", closed_port])
    assert result.exit_code == 1
    assert f"no cluster answers at {closed_port}" in result.output
    assert "Traceback" not in result.output


def test_jobs_are_submitted_to_a_dashboard_and_nothing_else(cli: CliRunner) -> None:
    result = cli.invoke(app, ["job", "list", "--address", "ray://head:10001"])
    assert result.exit_code == 1
    assert "and not to ray://head:10001" in result.output


def test_relative_storage_cannot_be_submitted(cli: CliRunner, curate: Path, closed_port: str) -> None:
    words = ["job", "submit", "curate", "--config", str(curate), "--set", "storage=here", "--address", closed_port]
    result = cli.invoke(app, words)
    assert result.exit_code == 1
    assert "storage: 'here' is relative" in result.output


@pytest.mark.parametrize("uri", ["mlflow", "sqlite:///own.db", "file://own"])
def test_relative_tracking_cannot_be_submitted(cli: CliRunner, curate: Path, closed_port: str, uri: str) -> None:
    words = ["job", "submit", "curate", "--config", str(curate), "--set", f"tracking.uri={uri}"]
    result = cli.invoke(app, [*words, "--address", closed_port])
    assert result.exit_code == 1
    assert f"tracking.uri: '{uri}' is relative" in result.output


@pytest.mark.parametrize(
    ("uri", "warned"),
    [
        ("null", True),
        ("http://mlflow:5000", False),
        ("postgresql://user:word@host/mlflow", False),
        ("sqlite:////shared/mlflow.db", False),
        ("/shared/mlflow", False),
    ],
)
def test_a_submission_that_is_tracked_on_one_node_is_warned_of(
    cli: CliRunner, curate: Path, closed_port: str, uri: str, warned: bool
) -> None:
    words = ["job", "submit", "curate", "--config", str(curate), "--set", f"tracking.uri={uri}"]
    result = cli.invoke(app, [*words, "--address", closed_port])
    assert "no cluster answers" in result.stderr
    assert ("warning: tracking.uri is not given" in result.stderr) is warned


class Agentless:
    """A client of a cluster whose job agent is not up for the first `refusals` submissions."""

    def __init__(
        self, refusals: float, said: str = "No available agent to submit job, please try again later."
    ) -> None:
        self.refusals, self.said, self.asked = refusals, said, 0

    def submit_job(self, **fields: object) -> str:
        self.asked += 1
        if self.asked <= self.refusals:
            raise RuntimeError(f"Request failed with status code 500: {self.said}.")
        return "raysubmit_1"


def submitted(jobs: Agentless, curate: Path) -> str:
    return job.submit_job(jobs, entry.job_specification("curate", curate))  # type: ignore[arg-type]


def test_a_submission_waits_for_the_job_agent(
    curate: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "AGENT_PAUSE", 0.0)
    jobs = Agentless(2)
    assert submitted(jobs, curate) == "raysubmit_1"
    assert jobs.asked == 3
    shown = capsys.readouterr()
    assert shown.err.count("waiting for the cluster's job agent") == 1
    assert shown.out == ""


def test_a_job_agent_that_stays_away_is_told(curate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "AGENT_PAUSE", 0.0)
    monkeypatch.setattr(job, "AGENT_WAIT", 0.0)
    with pytest.raises(ClusterError, match="its job agent does not"):
        submitted(Agentless(float("inf")), curate)


def test_no_other_refusal_is_submitted_again(curate: Path) -> None:
    jobs = Agentless(1, "Traceback: boom")
    with pytest.raises(RuntimeError, match="boom"):
        submitted(jobs, curate)
    assert jobs.asked == 1


def test_a_finished_job_names_the_input_it_skipped(
    cli: CliRunner, curate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"bad": 1, "bad_inputs": [{"name": "a.tar: 7.png", "reason": "not a readable image"}]}
    report = {"seconds": 2.0, "sources": {"pairs": bad, "text": {"bad": 0, "bad_inputs": []}}}
    manifest = Manifest(kind="documents", files=[], specification={}, report=report)
    monkeypatch.setattr(job.runner, "run_on_own_cluster", lambda *arguments: (manifest, False))
    shown = cli.invoke(app, ["job", "run", "curate", "--config", str(curate)]).stdout
    assert "  source 'pairs': 1 unreadable, skipped:\n    a.tar: 7.png: not a readable image\n" in shown
    assert "'text'" not in shown


@pytest.mark.parametrize("columns", ["20", "80"])
def test_jobs_are_listed_with_whole_ids_whatever_the_width(
    cli: CliRunner, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    def submitted(number: int, start: int | None, **metadata: str) -> SimpleNamespace:
        identifier, status = f"raysubmit_{number:016d}", SimpleNamespace(value="SUCCEEDED")
        end = start and start + 65_000
        return SimpleNamespace(
            submission_id=identifier, status=status, start_time=start, end_time=end, metadata=metadata
        )

    storage = f"s3://bucket/{'a-long-prefix/' * 8}"
    jobs = [submitted(1, None), submitted(2, 10_000, job="curate", storage=storage), submitted(3, 90_000, job="ablate")]
    jobs.append(SimpleNamespace(submission_id=None))  # a driver that connected by itself

    @contextmanager
    def client(address: str) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(list_jobs=lambda: jobs)

    monkeypatch.setattr(job, "client", client)
    monkeypatch.setenv("COLUMNS", columns)
    head, *lines = cli.invoke(app, ["job", "list"]).output.splitlines()
    assert head.split() == ["id", "job", "status", "started", "took", "storage"]
    assert [line.split()[0] for line in lines] == [f"raysubmit_{number:016d}" for number in (3, 2, 1)]
    assert lines[1].endswith(f"1 min 5 s  {storage}")
    assert lines[1].index("curate") == head.index("job")
    assert lines[2].split("  ")[1:] == ["(not of calumma)", "SUCCEEDED", "not yet"]
    jobs.clear()
    assert "no job was submitted" in cli.invoke(app, ["job", "list"]).output


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_finds_what_is_there(cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    shown = [line for line in result.output.splitlines() if "│" in line]
    subjects = {line.split("│")[1].strip() for line in shown}
    assert subjects >= {"Python", "cores", "GPUs", "memory", "disk", "C++ compiler", "packages", "storage", "cluster"}
    assert subjects >= {"MLflow"}
    assert list(tmp_path.iterdir()) == []  # it changes nothing


def test_doctor_says_what_gpus_can_serve() -> None:
    told = doctor.servable(int(22.5 * 2**30), 2)
    assert re.fullmatch(
        r"Serves chameleon-7b in int8 on 1, with a cache of 1\d{4} tokens; chameleon-34b in int8 on 2, with a .*", told
    )
    assert doctor.servable(2**34, 1).endswith("chameleon-34b does not fit")


def test_doctor_fails_and_says_what_to_do(cli: CliRunner, tmp_path: Path, closed_port: str) -> None:
    (tmp_path / "file").write_text("no folder")
    words = ["--storage", str(tmp_path / "file" / "below"), "--tracking-uri", closed_port, "--address", closed_port]
    result = cli.invoke(app, ["doctor", *words])
    assert result.exit_code == 1
    missing = [line.split("│") for line in result.output.splitlines() if "missing" in line]
    assert [cells[1].strip() for cells in missing] == ["storage", "cluster", "MLflow"]
    assert all(cells[4].strip() for cells in missing)


def test_doctor_reaches_s3(s3: str) -> None:
    assert doctor.object_storage(s3).state is State.FOUND
    found = doctor.object_storage("s3://no-such-bucket/prefix")
    assert found.state is State.MISSING
    assert "no-such-bucket" in found.details


def test_an_old_python_is_missing() -> None:
    assert doctor.python((3, 10)).state is State.MISSING
    assert doctor.python((3, 11)).state is State.FOUND


def test_a_compiler_is_looked_for_by_its_names() -> None:
    assert doctor.compiler({"clang++": "/usr/bin/clang++"}.get).details == "/usr/bin/clang++"
    none = doctor.compiler(lambda name: None)
    assert none.state is State.POOR
    assert "g++" in none.advice


def test_versions_that_were_not_tested_are_told(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\ntorch==2.13.0\nray==2.60.0\n")
    assert doctor.pinned(pins, {"torch": "2.13.0+cpu", "ray": "2.60.0"}.get).state is State.FOUND
    other = doctor.pinned(pins, {"torch": "2.13.0"}.get)
    assert other.state is State.POOR
    assert "ray none (tested: 2.60.0)" in other.details


def test_little_of_something_is_told() -> None:
    assert (
        doctor.quantity("disk", 2e9, 10e9, " free", "free some space").advice == "free some space (10 GB recommended)"
    )
    assert doctor.quantity("disk", 20e9, 10e9, " free", "free some space").state is State.FOUND


def test_doctor_survives_a_missing_package() -> None:
    def look() -> doctor.Finding:
        raise ModuleNotFoundError("No module named 'boto3'")

    found = doctor.checked("storage", look)
    assert found.state is State.MISSING
    assert "boto3" in found.details
