"""`calumma job` against the dashboard of a cluster."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The address of a whole cluster in a process of its own: the session's has no dashboard."""
    script = """
        import sys
        from calumma.platform.cluster import connection
        with connection.embedded():
            import ray
            print(ray.get_runtime_context().gcs_address, ray._private.worker.get_dashboard_url(), flush=True)
            sys.stdin.read()
        """
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield f"http://{process.stdout.readline().split()[1]}"
    finally:
        process.stdin.close()
        process.wait()


@pytest.mark.cluster
def test_a_job_is_submitted_followed_listed_and_stopped(dashboard: str, curate: Path) -> None:
    variables = os.environ | {"RAY_AUTH_MODE": "token", "COLUMNS": "200"}

    def calumma(*words: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", "from calumma.jobs.commands.main import main; main()"]
        return subprocess.run([*program, *words, "--address", dashboard], capture_output=True, text=True, env=variables)

    # The specification and its override travel: the job ends by what it says of them, on the cluster.
    sent = calumma("job", "submit", "curate", "--config", str(curate), "--set", "resources.workers=50000", "--follow")
    assert sent.returncode == 1, sent.stderr
    assert sent.stdout, sent.stderr
    identifier, *log = sent.stdout.splitlines()
    assert "resources.workers: asked for 50000" in "\n".join(log)
    assert f"{identifier}: FAILED" in sent.stderr
    listed = calumma("job", "list").stdout
    assert [word for word in (identifier, "curate", "FAILED", str(curate.parent)) if word not in listed] == []
    assert calumma("job", "status", identifier).stdout.startswith(f"{identifier}: FAILED")
    assert "asked for 50000" in calumma("job", "logs", identifier).stdout
    assert "had ended already" in calumma("job", "stop", identifier).stdout
    unknown = calumma("job", "status", "raysubmit_unknown")
    assert unknown.returncode == 1
    assert "knows no such job" in unknown.stderr
