"""What all tests share: one Ray cluster for the whole session, and the marks that decide what runs.

`--run-slow` runs also what takes hours. Tests marked `gpu` run where there is a CUDA device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Tiny models gain nothing from a second thread, and lose much where tests share the cores. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is first imported
# Machines that run tests may be slow and busy: nothing depends on how long an example takes.
settings.register_profile("calumma", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calumma")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run also the tests marked slow, which take hours")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="takes hours; run with --run-slow")
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(no_device)
    # Tests without a cluster first: they are quick, and a mistake they find is plainer to read. Then those that start a
    # cluster of their own: beside the session's it would find the port of its job agent taken.
    items.sort(key=lambda item: ("cluster" in item.keywords) + ("ray_cluster" in getattr(item, "fixturenames", ())))


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
