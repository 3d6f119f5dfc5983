"""Models of Hugging Face's hub, through its own client against a server of its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from calumma.platform import storage
from calumma.platform.storage import hub as ours

from .model_hub import COMMIT, Hub, model_hub

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "pytorch_model.bin": b"no",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is no open protocol: Git LFS is
    with model_hub(Hub({"org/name": dict(FILES)})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.mark.parametrize("uri", ["hf://org/name", f"hf://org/name@{COMMIT}", "hf://models/org/name@main"])
def test_a_model_is_downloaded_without_weights_in_other_formats(hub: Hub, uri: str) -> None:
    folder = ours.download_model(uri)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: data for name, data in FILES.items() if name != "pytorch_model.bin"
    }


def test_a_second_download_loads_nothing_again(hub: Hub) -> None:
    ours.download_model("hf://org/name")
    hub.asked.clear()
    ours.download_model("hf://org/name")
    assert not [asked for asked in hub.asked if asked.startswith("GET /org/name/resolve")]


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("hf://org/nothing", "no such repository, or it is not yours to see.*HF_TOKEN"),
        ("hf://org/name@v9", "no such revision"),
        ("hf://name", "'name' is no repository's name; give org/name"),
        ("hf://../name/x", "no repository's name"),
    ],
)
def test_what_is_not_there_is_told(hub: Hub, uri: str, told: str) -> None:
    with pytest.raises(storage.StorageError, match=told):
        ours.download_model(uri)


def test_a_server_that_cannot_be_reached_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(storage.StorageError, match=r"cannot download hf://org/name: .*HF_ENDPOINT"):
        ours.download_model("hf://org/name")


def test_a_folder_is_uploaded_twice_to_one_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    with pytest.raises(storage.StorageError, match=r"cannot upload .*HF_TOKEN"):
        ours.upload_model(folder, "org/new")
    monkeypatch.setenv("HF_TOKEN", "secret")
    for content in (b"{}", b"{1}"):
        (folder / "config.json").write_bytes(content)
        assert ours.upload_model(folder, "org/new").startswith(f"{hub.endpoint}/org/new")
        assert hub.repositories["org/new"] == {"config.json": content, "model.safetensors": b"weights" * 1000}
    assert hub.private["org/new"]
