"""Adapters of a served model: towards clients each is a model of its own, answered by its model's replicas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from calumma.model import MixedModalModel, load
from calumma.model.adapters.files import write_adapter
from calumma.model.adapters.merging import merge_directory
from calumma.model.ops.adapter import Adapter, LayerAdapter
from calumma.serve.deploy.preparation import ServeError, locate_servable
from calumma.serve.http.app import create_app
from calumma.serve.replica.model_loading import read_adapters
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import ServeSettings


@pytest.fixture(scope="module")
def folder(model: MixedModalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, layers = torch.Generator().manual_seed(0), {}
    for name, module in model.transformer.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            outputs, inputs = module.weight.shape
            down, up = torch.randn(2, inputs, generator=random), torch.randn(outputs, 2, generator=random)
            layers[f"blocks.{name}"] = LayerAdapter(down, up, 0.5)
    place = tmp_path_factory.mktemp("adapters") / "poet"
    write_adapter(place, Adapter(layers))
    return place


@pytest.fixture(scope="module")
def client(model: MixedModalModel, settings: ServeSettings, folder: Path) -> Iterator[TestClient]:
    settings = settings.model_copy(update={"adapters": {"poet": str(folder)}})
    replica = EngineReplica(model, max_sequences=4, adapters=read_adapters(settings, model.config))
    with TestClient(create_app(replica, settings)) as client:
        yield client
    replica.close()


def said(client: TestClient, model: str) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "Which digit?"}], "max_tokens": 12}
    return client.post("/v1/chat/completions", json=body | {"temperature": 0}).json()


def test_a_request_names_an_adapter_as_its_model(
    client: TestClient, folder: Path, model_directory: Path, settings: ServeSettings, tmp_path: Path
) -> None:
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [settings.name, "poet"]
    plain, adapted = said(client, settings.name), said(client, "poet")
    assert adapted["model"] == "poet"
    assert adapted["choices"][0]["message"]["content"] != plain["choices"][0]["message"]["content"]
    merge_directory(model_directory, folder, tmp_path / "merged")
    alone = EngineReplica(load(tmp_path / "merged"), max_sequences=4)
    with TestClient(create_app(alone, settings)) as merged:
        expected = said(merged, settings.name)
    alone.close()
    assert adapted["choices"] == expected["choices"]
    assert said(client, "painter")["error"]["code"] == "model_not_found"


def test_what_is_none_for_the_model_is_refused_before_anything_starts(
    settings: ServeSettings, folder: Path, model_directory: Path, tmp_path: Path
) -> None:
    locate_servable(settings.model_copy(update={"adapters": {"poet": str(folder)}}))
    with pytest.raises(ServeError, match="holds no adapter"):
        locate_servable(settings.model_copy(update={"adapters": {"poet": str(model_directory)}}))
    with pytest.raises(ServeError, match="is an adapter: serve the model that it was trained on, with --adapter"):
        locate_servable(settings.model_copy(update={"model": str(folder)}))
    with pytest.raises(ValueError, match="the name calumma is given more than once"):
        ServeSettings(model="m", adapters={"calumma": str(folder)})
    with pytest.raises(ValueError, match="give tensor_parallel 1, or merge the adapter"):
        ServeSettings(model="m", adapters={"poet": str(folder)}, tensor_parallel=2)
