"""Clusters: what a job gets of them, and that an embedded one leaves nothing behind, however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.cluster import capacity, connection
from calumma.platform.cluster.capacity import Capacity, ClusterError
from calumma.platform.specification import Resources, SpecificationError, WorkerRange

SMALL = Capacity(cpus=4, gpus=0, description="this machine (2 cores, used as 4 logical CPUs)")
NODE = Capacity(cpus=64, gpus=8, description="the cluster")


# --- what fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "logical"), [(1, 4), (2, 4), (3, 4), (4, 5), (64, 65)])
def test_small_machines_are_oversubscribed_and_large_ones_are_not(machine: int, logical: int) -> None:
    assert capacity.logical_cpus(machine) == logical


@pytest.mark.parametrize("machine", range(1, 9))
def test_two_workers_and_a_worker_for_every_core_run_on_any_machine(machine: int) -> None:
    there = Capacity(capacity.logical_cpus(machine), 0, "this machine")
    assert capacity.workers_that_fit(Resources(workers=2), there) == 2
    assert capacity.workers_that_fit(Resources(workers=machine), there) == machine


def test_a_range_adapts_to_what_there_is() -> None:
    assert capacity.workers_that_fit(Resources(workers=WorkerRange(min=1, max=64)), SMALL) == 3
    assert capacity.workers_that_fit(Resources(workers=WorkerRange(min=1, max=64), gpus_per_worker=1), NODE) == 8
    assert capacity.workers_that_fit(Resources(workers=WorkerRange(min=1, max=2)), NODE) == 2


def test_too_many_workers_are_refused_with_what_exists() -> None:
    with pytest.raises(SpecificationError) as raised:
        capacity.workers_that_fit(Resources(workers=8), SMALL)
    said = str(raised.value)
    assert said.startswith("resources.workers: asked for 8 with 1 CPU each")
    assert "2 cores" in said
    assert "at most 3" in said


def test_gpus_that_do_not_exist_are_refused() -> None:
    with pytest.raises(SpecificationError, match=r"1 CPU and 1 GPU each.*0 GPUs, enough for 0: ask for less"):
        capacity.workers_that_fit(Resources(workers=2, gpus_per_worker=1), SMALL)


def test_a_range_whose_least_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecificationError, match="asked for at least 9 "):
        capacity.workers_that_fit(Resources(workers=WorkerRange(min=9, max=20), gpus_per_worker=1), NODE)


@given(
    least=st.integers(1, 20),
    more=st.integers(0, 20),
    cpus_per_worker=st.floats(0.1, 8),
    gpus_per_worker=st.sampled_from([0, 0.1, 0.25, 0.5, 1, 2]),
    cpus=st.integers(1, 64),
    gpus=st.integers(0, 8),
)
def test_what_is_started_fits_and_nothing_that_fits_is_refused(
    least: int, more: int, cpus_per_worker: float, gpus_per_worker: float, cpus: int, gpus: int
) -> None:
    workers = WorkerRange(min=least, max=least + more)
    asked = Resources(workers=workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)

    def fits(number: int) -> bool:
        return number * cpus_per_worker <= cpus - 1 + 1e-6 and number * gpus_per_worker <= gpus + 1e-6

    try:
        started = capacity.workers_that_fit(asked, Capacity(cpus, gpus, "the cluster"))
    except SpecificationError:
        assert not fits(least)
    else:
        assert least <= started <= least + more
        assert fits(started)
        assert started == least + more or not fits(started + 1)


def test_without_a_cluster_the_machine_is_what_there_is() -> None:
    there = capacity.cluster_capacity()
    assert there.cpus == capacity.logical_cpus(capacity.cores())
    assert capacity.require_workers(Resources(workers=2)) == 2


# --- starting and ending -------------------------------------------------------------------------------------------


@pytest.fixture
def stubborn() -> Iterator[psutil.Process]:
    """A process that takes no notice of SIGTERM, with a child of its own."""
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen(['sleep', '1000']); print('ready', flush=True); time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    yield family[0]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def test_processes_that_do_not_end_are_ended(stubborn: psutil.Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SHUTDOWN_TIMEOUT", 0.2)
    family = connection._process_tree([stubborn])
    assert len(family) == 2
    connection.terminate(family)
    assert not any(alive(process) for process in family)


def test_a_start_that_fails_is_tried_twice_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started: list[psutil.Process] = []

    def half_a_start(**settings: object) -> None:
        started.append(psutil.Process(subprocess.Popen(["sleep", "1000"]).pid))
        raise RuntimeError("the node did not appear within 30 s")

    monkeypatch.setattr(ray, "init", half_a_start)
    monkeypatch.setattr(connection, "SHUTDOWN_TIMEOUT", 0.2)
    monkeypatch.setattr(connection, "SHUTDOWN_TIMEOUT", 0.2)
    with (
        pytest.raises(ClusterError, match=r"did not start in 2 attempts \(the node did not appear"),
        connection.embedded(),
    ):
        pass
    assert len(started) == 2
    assert not any(alive(process) for process in started)


def test_an_interrupted_start_is_not_tried_again_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started: list[psutil.Process] = []

    def interrupted(**settings: object) -> None:
        started.append(psutil.Process(subprocess.Popen(["sleep", "1000"]).pid))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", interrupted)
    monkeypatch.setattr(connection, "SHUTDOWN_TIMEOUT", 0.2)
    with pytest.raises(KeyboardInterrupt), connection.embedded():
        pass
    assert len(started) == 1
    assert not alive(started[0])


def test_ctrl_c_ends_a_cluster_with_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started: list[psutil.Process] = []
    sleep = ["sleep", "1000"]
    monkeypatch.setattr(ray, "init", lambda **settings: started.append(psutil.Process(subprocess.Popen(sleep).pid)))
    monkeypatch.setattr(connection, "SHUTDOWN_TIMEOUT", 0.2)
    with pytest.raises(KeyboardInterrupt), connection.embedded():
        raise KeyboardInterrupt
    assert len(started) == 1
    assert not alive(started[0])


def test_the_environment_and_signal_handlers_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "0")
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with connection._environment(connection.QUIET), connection._exit_on_sigterm():
        assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "0"  # the user's choice
        assert connection.QUIET.items() - os.environ.items() == {("RAY_DATA_DISABLE_PROGRESS_BARS", "1")}
        with pytest.raises(SystemExit) as raised:
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.code == connection.TERMINATED
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) == handler


def test_an_address_of_a_dashboard_is_explained() -> None:
    with pytest.raises(ClusterError, match="calumma job submit"), connection.connected("http://127.0.0.1:8265"):
        pass


def test_a_cluster_that_does_not_answer_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refused(**settings: object) -> None:
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray, "init", refused)
    with (
        pytest.raises(ClusterError, match=r"no Ray cluster answers at 'ray://nowhere:10001' \(ray client conn"),
        connection.connected("ray://nowhere:10001"),
    ):
        pass


@pytest.mark.cluster
def test_an_embedded_cluster_offers_what_was_promised(ray_cluster: None) -> None:
    import ray

    assert capacity.cluster_capacity().cpus == capacity.logical_cpus(capacity.cores())
    with connection.embedded():  # inside a running one: the same
        there, niceness = ray.get(ray.remote(lambda: (os.getpid(), os.nice(0))).options(num_cpus=0.1).remote())
    assert there != os.getpid()
    assert niceness == os.nice(0), "workers of a small machine count as much as what else runs there"
    assert ray.is_initialized()
    with pytest.raises(SpecificationError, match="the cluster has"):
        capacity.require_workers(Resources(workers=1000))


@pytest.mark.cluster
def test_sigterm_ends_the_cluster_with_all_its_processes(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        import psutil
        from calumma.platform.cluster import connection
        with connection.embedded(lean=True, logs=Path(sys.argv[1])):
            import ray
            ray.get(ray.remote(lambda: print("a worker was here")).remote())
            family = psutil.Process().children(recursive=True)
            print(*(f"{process.pid}:{process.create_time()}" for process in family), flush=True)
            time.sleep(1000)
        """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        family = process.stdout.readline().split()
        assert len(family) >= 3, process.communicate()
        process.terminate()
        _, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == connection.TERMINATED, errors
    assert not [entry for entry in family if runs(entry)]
    logs = "".join(file.read_text(errors="replace") for file in tmp_path.glob("session_*/worker*.out"))
    assert "a worker was here" in logs
    assert "a worker was here" not in errors


def runs(entry: str) -> bool:
    pid, created = entry.split(":")
    try:
        process = psutil.Process(int(pid))
        return process.create_time() == float(created) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_kind_of_gpu_that_the_cluster_has_none_of_is_told() -> None:
    asked = Resources(workers=2, gpus_per_worker=1, accelerator="H100")
    mixed = Capacity(64, 8, "the cluster", frozenset({"H100", "L40S"}))
    assert capacity.workers_that_fit(asked, mixed) == capacity.workers_that_fit(asked, NODE) == 2
    with pytest.raises(SpecificationError, match=r"^resources\.accelerator: the cluster has no H100, but L40S$"):
        capacity.workers_that_fit(asked, Capacity(64, 8, "the cluster", frozenset({"L40S"})))
