"""Models in object storage are served as those in a folder are."""

from __future__ import annotations

from pathlib import Path

import pytest

from calumma.model import Document, Text, generate, load
from calumma.model.generation import SamplingParams
from calumma.platform import storage
from calumma.platform.tracking import registry
from calumma.serve.deploy.preparation import ServeError, locate_servable
from calumma.serve.settings import ModelSettings


def test_a_model_in_a_bucket_answers_as_its_copy_in_a_folder(s3: str, model_directory: Path) -> None:
    place = storage.join(s3, "model")
    with pytest.raises(ServeError, match="there is no model directory at s3://"):
        locate_servable(ModelSettings(model=place))
    for file in model_directory.rglob("*"):
        if file.is_file():
            storage.write_bytes(storage.join(place, str(file.relative_to(model_directory))), file.read_bytes())
    source = locate_servable(ModelSettings(model=place, tensor_parallel=2))
    assert source == place
    with pytest.raises(ServeError, match=r"3 of s3://.* heads"):
        locate_servable(ModelSettings(model=place, tensor_parallel=3))
    with registry.resolve_model(source) as directory:
        fetched = load(directory)
    assert not directory.exists(), "a replica leaves no copy behind"
    question = [Document((Text("Draw a three.", "user"),))]
    params = [SamplingParams(mode="image", seed=1)]
    assert generate(fetched, question, params) == generate(load(model_directory), question, params)
