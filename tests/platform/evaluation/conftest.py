"""A tiny random model whose context has room for examples, and our HTTP server over it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn

from calumma.model import load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.transformer import Transformer
from calumma.serve.http.app import create_app
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import ServeSettings

CODES = 16
TEXTS = [
    "Question: Which of these keeps bread from going dry? Answer: a closed box.",
    "A red square lies on a blue ground. Caption: a small green circle in the middle.",
    "What colour is the circle? yellow. How many shapes are there? two. #### 12 The answer is B.",
]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measured")
    torch.manual_seed(0)
    vocabulary = train_text_tokenizer(TEXTS * 20, root, vocabulary_size=360, image_codes=CODES)
    shape = ImageTokenizerConfig(
        resolution=8, codebook_size=CODES, embedding=8, base_channels=8, multipliers=[1, 1], residual_blocks=1
    )
    ImageTokenizer(shape).save(root / IMAGE_TOKENIZER)
    config = ModelConfig(
        vocabulary_size=vocabulary.size, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=1024
    )
    save_model(root / "model", Transformer(config).initialize(0), root, root / IMAGE_TOKENIZER)
    return root / "model"


@pytest.fixture(scope="session")
def server_url(model_directory: Path) -> Iterator[str]:
    """The API's address, of our own application under a real HTTP server."""
    replica = EngineReplica(load(model_directory), max_sequences=8)
    settings = ServeSettings(model=str(model_directory), name="tiny")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(create_app(replica, settings), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
            replica.close()
