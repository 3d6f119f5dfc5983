"""Answers of a model in training, and answers as pictures."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage

from calumma.model.config import ModelConfig
from calumma.model.document import Document, Image, Text
from calumma.model.generation import Engine, SamplingParams
from calumma.model.generation.passes.streamed import StreamedDecoder
from calumma.model.generation.request import Request
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.training import samples
from calumma.platform.training.checkpoints.fragments import OwnedState
from calumma.platform.training.construction import build
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine as engines
from calumma.platform.training.trainable import parameters

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=40, vocabulary_size=50)
VOCABULARY = Vocabulary(
    size=50, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(40, 50))
)
LORA: dict[str, Any] = {"lora": {"rank": 4}, "trainable": "image_head"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 3": {"zero_stage": 3},
    "adapters, ZeRO 3": {"zero_stage": 3, **LORA},
    "adapters, ZeRO 2": {"zero_stage": 2, **LORA},
}


def drawn(engine: Engine) -> dict[str, list[int]]:
    """Three answers: a text, an image, and one that may alternate."""
    for number, mode in enumerate(("text", "interleaved", "image")):
        params = SamplingParams(max_tokens=12, mode=mode, seed=number)  # type: ignore[arg-type]
        engine.add(Request(str(number), [1, 10 + number, 20], params))
    answers: dict[str, list[int]] = {str(number): [] for number in range(3)}
    while engine.has_work:
        for event in engine.step():
            assert event.failure is None, event.failure
            answers[event.request_id] += event.tokens
    return answers


def draw(rank: int, world: int, folder: str) -> None:
    """Draw from engines in training, and from plain models with the same weights."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for name, fields in VARIANTS.items():
        values = {"storage": "/nowhere", "mixture": {"tokens": 1.0}, "output": "stage", "steps": 10, "micro_batches": 2}
        values |= {"model": SHAPE.model_dump(exclude={"vocabulary_size"}), "precision": "float32", **fields}
        spec = PretrainSpecification.model_validate(values)
        described = build.describe(SHAPE, spec, VOCABULARY)
        run = build.initialize(described, spec, world, torch.device("cpu"))
        build.fill(run, described.source(SHAPE, build.Base(None, 0), torch.device("cpu")))
        owned = OwnedState(run)
        for fragment in next(owned.opened()):  # adapters begin as nothing: let whatever is trained do something
            places = torch.arange(fragment.offset, fragment.offset + fragment.numel)
            fragment.states["fp32"].add_(0.05 * torch.sin(places))
        owned.settle()
        decoder = StreamedDecoder(SHAPE, samples.TrainedWeights(run, spec, VOCABULARY), run.device)
        ours = drawn(Engine(decoder.transformer, VOCABULARY, 4, 3, decoder=decoder))
        weights = engines.gathered_weights(run, keep=True)
        plain = Transformer(SHAPE)
        plain.load_state_dict(parameters.plain_weights(weights, spec, VOCABULARY))
        found[name] = (ours, drawn(Engine(plain, VOCABULARY, 4, 3)))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def test_workers_answer_from_the_weights_that_they_hold_as_a_model_loaded_whole_would(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(draw, (2, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (json.loads(Path(tmp_path, f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for name, (ours, plain) in first.items():
        assert ours == plain, name
        assert len({tuple(answer) for answer in ours.values()}) == 3


def test_an_answer_is_drawn_with_all_of_its_parts() -> None:
    red = PILImage.new("RGB", (8, 8), "red")
    answer = Document((Text("here is one\nand more"), Image(red), Text("")))
    drawn = samples.render_answer("Draw a red square.", answer)
    colors = {color for _, color in drawn.getcolors(1 << 20) or []}
    assert (255, 0, 0) in colors  # the image
    assert (0, 0, 0) in colors  # the text
    assert drawn.height > samples.render_answer("Draw a red square.", Document((Text("here is one"),))).height
