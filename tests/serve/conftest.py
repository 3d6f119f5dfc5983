"""A tiny random model directory, the HTTP application over it in this process, and a backend without a model."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image as PILImage
from starlette.testclient import TestClient

from calumma.model import MixedModalModel, load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.document import Image, Role
from calumma.model.images import to_square
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.http.app import create_app
from calumma.serve.protocol import Finished, GenerationRequest, OutputEvent, Started, TextDelta, TokenCount
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import Batches, ServeSettings

CONTEXT = 128
IMAGE_SIZE = 8  # pixels; 16 codes

Step = OutputEvent | Exception | Callable[[], Awaitable[Any]]


def answered(*events: OutputEvent) -> list[Step]:
    """The steps of an output that is begun and finished: three tokens of prompt, a token of text for each event."""
    return [Started(TokenCount(3)), *events, Finished("stop", TokenCount(len(events)))]


def seen(png: bytes, role: Role) -> Image:
    """An image of a prompt, as a backend gets it."""
    return Image(to_square(Image(png).open(), IMAGE_SIZE, "crop" if role == "assistant" else "pad"), role=role)


class StubBackend:
    """A `Backend` without an engine. A request takes the given steps: events are sent, exceptions raised, and what is
    callable is awaited. `script` gives the steps of a request instead. Without any, it says "seven"."""

    def __init__(
        self, *steps: Step, script: Callable[[GenerationRequest], Iterable[Step]] | None = None, facts: Any = None
    ) -> None:
        fixed = steps or answered(TextDelta("seven"))
        self._script = script or (lambda request: fixed)
        self._facts = {"context": CONTEXT, "image_size": IMAGE_SIZE} if facts is None else facts
        self.healthy = True
        self.requests: list[GenerationRequest] = []
        self.endings: list[str] = []  # "whole" or "stopped", of each request

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[OutputEvent, None]:
        self.requests.append(request)
        ending = "stopped"
        try:
            for step in self._script(request):
                if isinstance(step, Exception):
                    raise step
                if callable(step):
                    await step()
                else:
                    yield step
            ending = "whole"
        finally:
            self.endings.append(ending)

    async def describe(self) -> dict[str, Any]:
        if not self.healthy:
            raise RuntimeError("no replica")
        return dict(self._facts)

    async def statistics(self) -> dict[str, dict[str, float]]:
        if not self.healthy:
            raise RuntimeError("no replica")
        return {"one": {"requests_waiting": 2.0, "text_tokens": 5.0}}

    async def tokenize(self, text: str) -> list[int]:
        return [5]

    async def detokenize(self, ids: list[int]) -> str:
        return "x"


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    texts = ["Which digit is this? seven", "Draw a three.", "Count from two to four, with pictures."] * 20
    vocabulary = train_text_tokenizer(texts, root, vocabulary_size=320, image_codes=16)
    tokenizer = ImageTokenizer(
        ImageTokenizerConfig(
            resolution=IMAGE_SIZE,
            codebook_size=16,
            embedding=8,
            base_channels=8,
            multipliers=[1, 1],
            residual_blocks=1,
        )
    )
    tokenizer.save(root / "image")
    transformer = Transformer(
        ModelConfig(
            vocabulary_size=vocabulary.size, layers=2, width=32, heads=2, kv_heads=2, ffn_width=64, context=CONTEXT
        )
    )
    save_model(root / "model", transformer, root, root / "image")
    return root / "model"


@pytest.fixture(scope="session")
def model(model_directory: Path) -> MixedModalModel:
    return load(model_directory)


@pytest.fixture(scope="session")
def replica(model: MixedModalModel) -> Iterator[EngineReplica]:
    replica = EngineReplica(model, max_sequences=12)
    yield replica
    replica.close()


@pytest.fixture(scope="session")
def settings(model_directory: Path) -> ServeSettings:
    """Of a server under the name by which Starlette's client calls it, too."""
    return ServeSettings(
        model=str(model_directory), name="tiny", max_body_mebibytes=0.25, allowed_hosts=("testserver",)
    )


@pytest.fixture
def client(replica: EngineReplica, settings: ServeSettings) -> Iterator[TestClient]:
    with TestClient(create_app(replica, settings)) as client:
        yield client


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tracking URI of a local model registry; whoever uses it first waits seconds for its database."""
    return str(tmp_path_factory.mktemp("registry"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def listening(app: FastAPI, **options: Any) -> Iterator[str]:
    """The application under a real HTTP server on a thread; its URL. options: uvicorn's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who comes before the server is up waits in line
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def url(replica: EngineReplica, settings: ServeSettings) -> Iterator[str]:
    with listening(create_app(replica, settings)) as address:
        yield address


@pytest.fixture(scope="session")
def roomy_replica(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineReplica]:
    """Of a model whose context has room for tools."""
    root = tmp_path_factory.mktemp("roomy")
    torch.manual_seed(0)
    size = Vocabulary.read(model_directory).size
    transformer = Transformer(
        ModelConfig(vocabulary_size=size, layers=1, width=16, heads=2, kv_heads=2, ffn_width=32, context=2048)
    )
    save_model(root / "model", transformer, model_directory, model_directory / IMAGE_TOKENIZER)
    replica = EngineReplica(load(root / "model"), max_sequences=12)
    yield replica
    replica.close()


@pytest.fixture(scope="session")
def roomy_url(roomy_replica: EngineReplica, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with files and batches, which nobody answers."""
    batches = Batches(location=str(tmp_path_factory.mktemp("batches")))
    settings = ServeSettings(model="roomy", name="tiny", max_body_mebibytes=0.25, batches=batches)
    with listening(create_app(roomy_replica, settings)) as address:
        yield address


@pytest.fixture(scope="session")
def png() -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (12, 9), (200, 30, 60)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
