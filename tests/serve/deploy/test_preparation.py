"""What cannot be served is told before anything starts."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path

import pytest

from calumma.serve.deploy.endpoint import unsent_bytes
from calumma.serve.deploy.preparation import (
    NodeGroup,
    ServeError,
    locate_directory,
    locate_servable,
    require_port,
    require_room,
)
from calumma.serve.settings import ModelSettings

from ..conftest import free_port


def test_more_processes_than_heads_are_refused_before_anything_starts(model_directory: Path) -> None:
    fits = ModelSettings(model=str(model_directory), tensor_parallel=2)
    assert locate_servable(fits) == str(model_directory)
    with pytest.raises(ServeError, match=r"tensor_parallel 5 of /.*2 heads cannot be cut into 5 parts: use at most 2"):
        locate_servable(fits.model_copy(update={"tensor_parallel": 5}))


def test_a_cluster_without_a_node_for_a_replica_is_told() -> None:
    settings = ModelSettings(
        model="m", gpus_per_replica=4, cpus_per_replica=4, tensor_parallel=4, min_replicas=2, max_replicas=2
    )
    large, small = {"CPU": 16.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 2.0}
    require_room(settings, [NodeGroup(large)])
    require_room(settings, [NodeGroup(small), NodeGroup(large, math.inf)])  # an autoscaler may add some
    with pytest.raises(ValueError, match="need 4 CPU and 4 GPU on one node each, and the cluster has room for 0 "):
        require_room(settings, [NodeGroup(small)] * 8)
    with pytest.raises(ValueError, match=r"room for 1 \(its nodes: 16 CPU and 4 GPU; 64 CPU and 2 GPU\)"):
        require_room(settings, [NodeGroup(large | {"GPU": 4.0}), NodeGroup(small)])
    require_room(settings.model_copy(update={"tensor_parallel": 1}), [])  # Ray waits for room, as it always did


def test_a_whole_model_directory_is_located(model_directory: Path) -> None:
    assert locate_directory(str(model_directory)) == str(model_directory)
    assert locate_directory(os.path.relpath(model_directory)) == str(model_directory)


def test_a_model_directory_that_misses_a_file_is_not(model_directory: Path, tmp_path: Path) -> None:
    for file in model_directory.rglob("*"):
        if file.is_file() and file.name != "vocabulary.json":
            target = tmp_path / file.relative_to(model_directory)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    with pytest.raises(ServeError, match=r"not a whole model directory: vocabulary\.json missing"):
        locate_directory(str(tmp_path))


def test_a_free_port_is_fine() -> None:
    require_port("127.0.0.1", free_port())


def test_what_a_client_has_not_taken_is_known() -> None:
    """Of which a server that ends says that it is sent."""
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        server, _ = listener.accept()
        with server:
            assert unsent_bytes(port) == 0
            server.setblocking(False)
            sent = server.send(bytes(1 << 20))
            assert unsent_bytes(port) > 0
            while sent:
                sent -= len(client.recv(sent))
            until = time.monotonic() + 60
            while unsent_bytes(port):
                assert time.monotonic() < until
