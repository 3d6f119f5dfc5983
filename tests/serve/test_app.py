"""The Ray Serve application on a real cluster: deployed, asked over HTTP, replaced, taken down."""

from __future__ import annotations

import base64
import io
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from PIL import Image as PILImage

from calumma.serve.app import ServeError, deploy, undeploy
from calumma.serve.settings import ServeSettings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_is_served_and_taken_down(model_directory: Path) -> None:
    from ray import serve

    settings = ServeSettings(model=str(model_directory), name="tiny", port=free_port(), cpus_per_replica=0.5)
    url = deploy(settings)
    try:
        assert requests.get(f"{url}/health", timeout=300).json()["model"] == "tiny"
        body = {"messages": [{"role": "user", "content": "Draw a three."}], "modalities": ["image"], "seed": 7}

        def ask(seed: int) -> str:
            reply = requests.post(f"{url}/v1/chat/completions", json=body | {"seed": seed}, timeout=300)
            assert reply.status_code == 200, reply.text
            return str(reply.json()["choices"][0]["message"]["images"][0]["image_url"]["url"])

        with ThreadPoolExecutor(6) as pool:
            images = list(pool.map(ask, [1, 2, 3, 1, 2, 3]))
        assert images[:3] == images[3:], "an answer does not depend on who else is served"
        data = base64.b64decode(images[0].partition(",")[2])
        assert PILImage.open(io.BytesIO(data), formats=["PNG"]).size == (8, 8)

        stream = requests.post(f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=300)
        assert stream.text.rstrip().endswith("data: [DONE]")
        assert images[0].startswith("data:image/png")
        refused = requests.post(f"{url}/v1/chat/completions", json=body | {"model": "other"}, timeout=300)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")

        with pytest.raises(ServeError, match="runs in this cluster already and listens"):
            deploy(settings.model_copy(update={"port": free_port()}))
        assert requests.get(f"{url}/health", timeout=300).ok, "a refused second deployment disturbs nobody"
    finally:
        undeploy("tiny")
    with pytest.raises(requests.RequestException):
        requests.get(f"{url}/health", timeout=300).raise_for_status()
    assert not serve.status().applications
