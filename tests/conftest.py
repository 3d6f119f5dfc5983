"""What all tests share: one Ray cluster for the whole session, and the marks that decide what runs.

`--run-slow` runs also what takes hours. Tests marked `gpu` run where there is a CUDA device.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from a second thread, and lose much where tests share the cores. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is first imported
# Machines that run tests may be slow and busy: nothing depends on how long an example takes.
settings.register_profile("calumma", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calumma")

BUCKET = "calumma-tests"


def _leave_garbage_to_parent() -> None:
    """Before a fork: Ray's objects among it would call the cluster from a child that has none of its threads."""
    gc.collect()
    gc.freeze()


os.register_at_fork(before=_leave_garbage_to_parent, after_in_parent=gc.unfreeze)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run also the tests marked slow, which take hours")
    parser.addoption("--fuzz", type=int, default=300, help="how many requests tests/serve/http/test_fuzz.py sends")
    parser.addoption("--damages", type=int, default=300, help="how many tests/platform/sources/test_damage.py tries")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="takes hours; run with --run-slow")
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(no_device)
    # Tests without a cluster first: they are quick, and a mistake they find is plainer to read. Then those that start a
    # cluster of their own: beside the session's it would find the port of its job agent taken. Where processes test
    # side by side, one begins with those that need a cluster, as they take longest.
    alone = not hasattr(config, "workerinput")

    def order(item: pytest.Item) -> int:
        if not _starts_cluster(item.path):
            return 0 if alone else 3
        if "cluster" not in item.keywords:
            return 0
        return 1 + ("ray_cluster" in getattr(item, "fixturenames", ()))

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes that test side by side: one has all files that need a cluster, the others what does not, by folders,
    whose tests share fixtures. (pytest-xdist's groups by marks do nothing with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = config.rootpath / nodeid.partition("::")[0]
            return "cluster" if _starts_cluster(path) else str(path.parent)

    return ByFolder(config, log)


@cache
def _starts_cluster(path: Path) -> bool:
    return "mark.cluster" in path.read_text()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def outbox_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What waits for a tracking server waits here, not in the home of the person who starts the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALUMMA_OUTBOX", str(tmp_path_factory.mktemp("outbox")))
        yield


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never write to the tracking server or run on the cluster that the person who starts them works with."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One lean Ray cluster in this process for all tests that ask for it, started by the first of them.

    Mark such tests with `cluster`. `calumma.platform.cluster.connection.embedded()` inside them uses this cluster.
    """
    from calumma.platform.cluster import connection

    with connection.embedded(lean=True):
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a new, empty folder in S3."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}/some/folder"
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)
