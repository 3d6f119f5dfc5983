"""What the image and the cluster's description start: it is run as they say, with `ray` and `mlflow` that tell how they
were called, and their words are those that the real ones take."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOKEN = "0123456789abcdef" * 4
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
PROGRAM = """#!{python}
import json, os, sys
if sys.argv[1:] == ["get-auth-token", "--generate"]:
    folder = os.path.expanduser("~/.ray")
    os.makedirs(folder, exist_ok=True)
    with open(folder + "/auth_token", "a") as file:
        file.write("made")
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ)]) + "\\n")
"""
Call = tuple[list[str], dict[str, str]]


class Machine:
    """A home, and programs that note how they are called."""

    def __init__(self, folder: Path) -> None:
        self.home, self._log, programs = folder / "home", folder / "calls", folder / "bin"
        for new in (self.home, programs):
            new.mkdir()
        for name in ("ray", "mlflow"):
            (programs / name).write_text(PROGRAM.format(python=sys.executable, log=str(self._log)))
            (programs / name).chmod(stat.S_IRWXU)
        self.environment = {
            "HOME": str(self.home),
            "TMPDIR": str(folder),
            "PATH": f"{programs}:{os.environ['PATH']}",
        }

    def run(self, command: list[str], **environment: str) -> None:
        done = subprocess.run(
            command, env=self.environment | environment, cwd=self.home, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")

    def calls(self, expected: int) -> list[tuple[str, list[str], dict[str, str]]]:
        """So many; some may be in the background."""
        end = time.monotonic() + 60
        while not self._log.exists() or len(found := self._log.read_text().splitlines()) < expected:
            assert time.monotonic() < end
            time.sleep(0.02)
        return [tuple(json.loads(line)) for line in found]  # type: ignore[misc]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def image() -> tuple[list[str], dict[str, str]]:
    """The command of the image, and the environment that it sets."""
    text = (ROOT / "infra/docker/Dockerfile").read_text().replace("\\\n", "")
    [command] = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    variables = [pair for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for pair in line.split()]
    return json.loads(command), dict(pair.split("=", 1) for pair in variables)


def test_the_images_own_command_opens_no_job_api_without_a_token(machine: Machine) -> None:
    from ray.scripts.scripts import cli

    command, variables = image()
    machine.run(command)
    (_, first, _), (program, words, environment) = machine.calls(2)
    assert (program, first) == ("ray", ["get-auth-token", "--generate"])
    assert (machine.home / ".ray/auth_token").read_text() == "made"
    assert environment["RAY_AUTH_MODE"] == "token"
    options = cli.commands["start"].make_context("start", words[1:]).params
    assert (options["head"], options["dashboard_host"]) == (True, "0.0.0.0")
    assert "RAY_AUTH_MODE" not in variables, "launchers set it as they set tokens"
    callback = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    from ray._common.utils import import_attr

    assert callable(import_attr(callback))


def test_who_says_so_opens_it(machine: Machine) -> None:
    machine.run(image()[0], RAY_AUTH_MODE="disabled")
    assert machine.calls(2)[1][2]["RAY_AUTH_MODE"] == "disabled"


def test_the_clusters_mlflow_asks_for_the_token_that_all_machines_show_it(machine: Machine) -> None:
    import flask_wtf  # noqa: F401  # what MLflow's passwords need
    from mlflow.cli import cli

    (machine.home / ".ray").mkdir()
    (machine.home / ".ray/auth_token").write_text(TOKEN)
    assert "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (machine.home / "mlflow").mkdir()
    commands = [*CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]
    for command in commands:
        machine.run(["bash", "-c", command.replace("/home/calumma", str(machine.home))], RAY_HEAD_IP="10.0.0.1")
    calls = machine.calls(len(commands))
    [(_, words, server)] = [call for call in calls if call[0] == "mlflow"]
    assert words[0] == "server"
    options = cli.commands["server"].make_context("server", words[1:]).params
    assert options["host"] in ("127.0.0.1", "localhost") or options["app_name"] == "basic-auth"
    assert server["MLFLOW_AUTH_ADMIN_PASSWORD"] == server["MLFLOW_FLASK_SERVER_SECRET_KEY"] == TOKEN
    assert server["PWD"] != str(machine.home), "the file of its users is not that of an older token"
    starts = [(words, environment) for name, words, environment in calls if name == "ray" and words[0] == "start"]
    assert ["--head" in words for words, _ in starts] == [True, False]
    for words, environment in starts:
        shown = environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]
        assert shown == ("admin", TOKEN)
        assert not any("0.0.0.0" in word for word in words), "Ray's dashboard is for the head alone"
