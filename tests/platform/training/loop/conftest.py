"""The training loop without a cluster: scenarios, and what became of them.

One process of its own takes the part of a worker for every scenario, so that libraries are imported once; two more are
two workers.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calumma import model
from calumma.model import load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.document import Document, Text
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.row_groups import RowGroupReader, all_micro_batches
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training import loop, preparation
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine, held_out

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32)
CODES, STEPS = 16, 20


def publish_tokens(uri: str, vocabulary: Vocabulary, number: int, chaos: bool = False) -> None:
    """Row groups of two rows that count upwards, half of them over image ids; with `chaos` the ids are random."""
    random = np.random.default_rng(number)
    ids = np.array([vocabulary.image_ids, vocabulary.text_ids[:CODES]])
    rows = []
    for row in range(2 * number):
        order = random.integers(0, CODES, 33) if chaos else (random.integers(0, CODES) + np.arange(33)) % CODES
        rows.append(ids[row % 2][order].tolist())
    table = pa.table(
        {
            "tokens": pa.array(rows, pa.list_(pa.int32())),
            "loss_mask": pa.nulls(len(rows), pa.list_(pa.bool_())),
            "segments": pa.array([[0] * 33] * len(rows), pa.list_(pa.int32())),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=2)
    data = file.getvalue()
    storage.write_bytes(f"{uri}/tokens.parquet", data)
    entry = FileEntry.from_bytes("tokens.parquet", data, rows=len(rows), row_groups=number, sequences_per_row_group=2)
    Manifest(kind="tokens", files=[entry]).write(uri)


def publish_packed(uri: str, vocabulary: Vocabulary) -> None:
    """Row groups of two rows of documents of any length, images and texts, some of their tokens untrained, with
    padding: what the job tokenize writes."""
    random = np.random.default_rng(3)
    rows = []
    for _ in range(24):
        sizes = random.multinomial(random.integers(24, 34), [0.5, 0.3, 0.2])
        tokens, mask = np.full(33, vocabulary.pad, np.int32), np.zeros(33, np.bool_)
        segments, filled = np.full(33, -1, np.int32), int(sizes.sum())
        for number, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
            ids = np.array(vocabulary.image_ids if random.random() < 0.4 else vocabulary.text_ids[:CODES])
            tokens[end - size : end] = ids[(random.integers(0, CODES) + np.arange(size)) % CODES]
            segments[end - size : end] = number
        mask[:filled] = random.random(filled) < random.uniform(0.2, 1)
        rows.append(PackedRow(tokens, mask, segments))
    data = token_shards.to_parquet(rows, 2)
    storage.write_bytes(f"{uri}/tokens.parquet", data)
    entry = FileEntry.from_bytes(
        "tokens.parquet",
        data,
        rows=24,
        row_groups=12,
        sequences_per_row_group=2,
        footer=token_shards.footer_digest(data),
    )
    Manifest(kind="tokens", files=[entry], specification={"context": 32}).write(uri)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Storage with tokenizers and token shards."""
    root = str(tmp_path_factory.mktemp("storage"))
    text = Path(root, "tokenizers/text")
    text.mkdir(parents=True)
    vocabulary = train_text_tokenizer(["one two three four five six seven"] * 20, str(text), 310, CODES, 1)
    torch.manual_seed(0)
    shape = ImageTokenizerConfig(
        resolution=16, codebook_size=CODES, embedding=4, base_channels=4, multipliers=[1, 1, 1], residual_blocks=1
    )
    ImageTokenizer(shape).save(f"{root}/tokenizers/image")
    for name, number, chaos in (("train", 40, False), ("held-out", 4, False), ("chaos", 4, True)):
        publish_tokens(f"{root}/tokens/{name}", vocabulary, number, chaos)
    publish_packed(f"{root}/tokens/packed", vocabulary)
    asked = [Document((Text("one two", "user"), Text(word, "assistant"))) for word in ("three", "four")]
    data = document_shards.to_parquet(asked)
    storage.write_bytes(f"{root}/curated/asked/shard.parquet", data)
    entry = FileEntry.from_bytes("shard.parquet", data, rows=2, row_groups=1)
    Manifest(kind=document_shards.CURATED, files=[entry]).write(f"{root}/curated/asked")
    for kind in ("text", "image"):
        Manifest(kind=f"{kind}_tokenizer").write(f"{root}/tokenizers/{kind}")
    return root


def specification(root: str, name: str, **fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": root,
        "tracking": {"uri": f"{root}/mlflow", "project": "chameleons"},
        "mixture": {"tokens/train": 1.0},
        "output": f"stages/{name}",
        "run_name": name,
        "model": SHAPE.model_dump(exclude={"vocabulary_size"}),
        "steps": STEPS,
        "micro_batches": 2,
        "optimizer": {"learning_rate": 0.02},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "precision": "float32",
        "checkpoint_every": 4,
        "log_every": 2,
    }
    return PretrainSpecification.model_validate(values | fields)


# What goes wrong: at which steps (from 1) the loss is no number, the gradient is none, or the data is chaos; and before
# which step the worker dies.
Script = dict[str, Any]
SPIKE = {"spike_factor": 2.0, "window": 4}
# Nothing is as the libraries have it by default, so that what is not handed on to them shows.
PLAIN: dict[str, Any] = {
    "mixture": {"tokens/packed": 1.0},
    "model": SHAPE.model_copy(update={"mask_documents": True}).model_dump(exclude={"vocabulary_size"}),
    "micro_batches": 3,
    "steps": 10,
    "optimizer": {
        "learning_rate": 0.02,
        "beta1": 0.6,
        "beta2": 0.7,
        "eps": 1e-3,
        "weight_decay": 0.5,
        "gradient_clip": 0.2,
    },
    "schedule": {"kind": "cosine", "warmup_steps": 4, "total_steps": 24, "final": 0.1},
    "z_loss": 0.03,
    "log_every": 1,
}
DROPOUT = {
    "mixture": {"tokens/packed": 1.0},
    "micro_batches": 4,
    "steps": 4,
    "dropout": 0.3,
    "held_out": {"packed": "tokens/packed"},
    "log_every": 1,
}
QUANTIZED: dict[str, Any] = {
    "lora": {"rank": 4, "quantize": 4},
    "initial": "stages/straight",
    "model": None,
    "held_out": {"counting": "tokens/held-out"},
    "held_out_every": 20,
    "samples": ["one two"],
}
AS_TEXT_MODELS = {"query_key_norm": "rms", "own_head_size": 12, "query_key_value_bias": True, "tied": True}
SCENARIOS: dict[str, list[tuple[dict[str, Any], Script]]] = {
    "plain": [(PLAIN | {"held_out": {"packed": "tokens/packed"}}, {})],
    "continued": [(PLAIN | {"initial": "stages/plain", "model": None, "continue_schedule": True}, {})],
    "dropout": [(DROPOUT, {})],
    "straight": [
        (
            {
                "held_out": {"counting": "tokens/held-out"},
                "held_out_every": 8,
                "samples": ["one two"],
                "samples_every": 10,
                "register_as": "counting",
            },
            {},
        )
    ],
    "skip": [({"faults": SPIKE}, {"loss": [7], "gradient": [11], "chaos": [15]})],
    "back": [({"faults": SPIKE | {"action": "roll_back", "around": 2}}, {"chaos": [11]})],
    "back, killed": [
        ({"faults": SPIKE | {"action": "roll_back", "around": 2}}, {"chaos": [11], "dies": 15}),
        ({"faults": SPIKE | {"action": "roll_back", "around": 2}}, {"chaos": [11]}),
    ],
    "back to the start": [({"faults": {"action": "roll_back"}}, {"loss": [2]})],
    "too many": [({"faults": {"in_a_row": 2}}, {"loss": [5, 6, 7]})],
    "too often back": [({"faults": {"action": "roll_back", "in_a_row": 1}, "checkpoint_every": 10}, {"loss": [3, 6]})],
    "diverged": [
        ({"faults": {"in_a_row": 2}}, {"loss": [9, 10, 11]}),
        (
            {
                "faults": {"in_a_row": 2},
                "optimizer": {"learning_rate": 0.01},
                "resume": {"from": 8, "allow": ["learning_rate"]},
            },
            {},
        ),
    ],
    "best": [
        (
            {
                "held_out": {"counting": "tokens/held-out"},
                "held_out_every": 2,
                "publish": "best",
                "steps": 10,
                "schedule": {"kind": "constant", "warmup_steps": 0},
            },
            {"chaos": [9, 10]},
        )
    ],
    "early": [
        (
            {
                "held_out": {"counting": "tokens/held-out"},
                "held_out_every": 2,
                "early_stopping": {"patience": 9},
                "evaluation": {"tasks": [{"name": "next", "kind": "recognition", "documents": "curated/asked"}]}
                | {"every": 4},
                "samples": ["one two"],
                "steps": 10,
                "zero_stage": 3,
                "schedule": {"kind": "constant", "warmup_steps": 0},
            },
            {"chaos": [9, 10]},
        )
    ],
    "from a checkpoint": [
        ({"initial": "stages/straight/checkpoints/step-00000016", "model": None, "steps": 4, "log_every": 1}, {})
    ],
    "lora": [({"lora": {"rank": 4}, "initial": "stages/straight", "model": None, "zero_stage": 3}, {})],
    "lora, killed": [
        ({"lora": {"rank": 4}, "initial": "stages/straight", "model": None, "zero_stage": 3}, {"dies": 15}),
        ({"lora": {"rank": 4}, "initial": "stages/straight", "model": None, "zero_stage": 3}, {}),
    ],
    "quantized": [(QUANTIZED, {})],
    "quantized, killed": [(QUANTIZED | {"zero_stage": 3}, {"dies": 15}), (QUANTIZED | {"zero_stage": 3}, {})],
    "text model": [
        (
            {
                "model": SHAPE.model_dump(exclude={"vocabulary_size"}) | AS_TEXT_MODELS,
                "held_out": {"counting": "tokens/held-out"},
                "samples": ["one two"],
            },
            {},
        )
    ],
    "text model, rows": [
        (
            {"trainable": "image_rows", "lora": {"rank": 4}, "initial": "stages/text model", "model": None}
            | {"zero_stage": 3, "precision": "bfloat16", "steps": 4},
            {},
        )
    ],
    "image head": [
        ({"trainable": "image_head", "initial": "stages/straight", "model": None, "precision": "bfloat16"}, {})
    ],
}


TOGETHER: dict[str, list[tuple[dict[str, Any], Script]]] = {
    "skip, two workers": SCENARIOS["skip"],
    "back, two workers": SCENARIOS["back"],
    "dropout, two workers": SCENARIOS["dropout"],
    "quantized, two workers": SCENARIOS["quantized"],
    "early, two workers": SCENARIOS["early"],
    "plain, shared by two workers": [
        (
            PLAIN
            | {"sequence_parallel": 2, "resources": {"workers": 2}, "zero_stage": 3}
            | {"held_out": {"packed": "tokens/packed"}, "samples": ["one two"]},
            {},
        )
    ],
}


def refuse_loading(*given: Any) -> None:
    raise AssertionError("a second model is loaded beside the training state")


class Died(Exception):
    """What stands for kill -9."""


def work(rank: int, world: int, root: str, folder: str, runs: dict[str, list[Run]]) -> None:
    """All scenarios for so many workers; their reports and errors go to a file."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ["CALUMMA_OUTBOX"] = f"{folder}/outbox"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import ray.train.v2._internal.execution.context  # noqa: F401 -- in a worker it is there before any thread is

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),  # a worker that fails alone fails the others
    )
    model.load = refuse_loading  # type: ignore[assignment]
    loop.set_up_worker = lambda: Worker(rank, world, torch.device("cpu"))
    beats, beat = list[int](), Watchdog.beat
    Watchdog.beat = lambda dog: beats.append(1) or beat(dog)  # type: ignore[func-returns-value, method-assign]
    places, enter = list[str](), Watchdog.enter
    Watchdog.enter = lambda dog, place: places.append(place) or enter(dog, place)  # type: ignore[func-returns-value, method-assign]
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for name, parts in (SCENARIOS if world == 1 else TOGETHER).items():
        outcomes[name] = []
        for (fields, script), run in zip(parts, runs[name], strict=True):
            spec = specification(root, name, **fields)
            outcome: dict[str, Any] = {}
            beats.clear()
            places.clear()
            try:
                assignment = preparation.prepare(spec, run)
                scripted(spec, script)
                outcome["report"] = loop.train({"assignment": assignment})
            except Exception as error:
                outcome["error"] = f"{type(error).__name__}: {error}"
            outcomes[name].append(outcome | {"beats": len(beats), "places": list(dict.fromkeys(places))})
    Path(folder, f"{rank} of {world}.json").write_text(json.dumps(outcomes))


USUAL = engine.losses


def scripted(spec: PretrainSpecification, script: Script) -> None:
    """Let the data and the forward pass do what the script says."""
    now = [0]
    (usual,) = spec.mixture
    places = {"usual": spec.locate(usual), "chaos": spec.locate("tokens/chaos")}
    rows = {name: all_micro_batches(uri, Manifest.read(uri)) for name, uri in places.items()}

    def data(worker: Worker, first: int) -> Iterator[tuple[int, list[Any]]]:
        for step in range(first, spec.steps):
            now[0] = step + 1
            if now[0] == script.get("dies"):
                raise Died(f"before step {now[0]}")
            found = rows["chaos" if now[0] in script.get("chaos", ()) else "usual"]
            reader, begin = RowGroupReader(), step * spec.micro_batches
            group_of, groups = worker.rank // spec.sequence_parallel, worker.world // spec.sequence_parallel
            numbers = range(group_of, spec.micro_batches, groups)
            group = [held_out.read_row_group(reader, found[(begin + number) % len(found)]) for number in numbers]
            yield step, [replace(batch, number=number) for batch, number in zip(group, numbers, strict=True)]

    def losses(run: Any, batch: Any, image_mask_V: torch.Tensor, **given: Any) -> Any:
        found = USUAL(run, batch, image_mask_V, **given)
        one = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1  # and the others hear of it
        if run.module.training and now[0] in script.get("loss", ()) and one:
            broken = {name: getattr(found.sums, name) * math.nan for name in ("text_nll", "image_nll")}
            return found._replace(sums=found.sums._replace(**broken), total=found.total * math.nan)
        if run.module.training and now[0] in script.get("gradient", ()):
            return found._replace(total=found.total * math.inf)
        return found

    loop._micro_batches = data
    engine.losses = losses


@dataclass(frozen=True)
class Outcomes:
    """What became of the scenarios, by their names."""

    root: str
    outcomes: dict[str, list[dict[str, Any]]]
    """What each of its parts returned (report) or raised (error), and how often the watchdog heard of it (beats)."""
    runs: dict[str, list[Run]]

    def specification(self, name: str, **fields: Any) -> PretrainSpecification:
        """Of a scenario, or of another stage."""
        own = SCENARIOS[name][-1][0] if name in SCENARIOS else {}
        return specification(self.root, name, **(own | fields))

    def report(self, name: str) -> dict[str, Any]:
        last = self.outcomes[name][-1]
        assert "error" not in last, last
        found: dict[str, Any] = last["report"]
        return found

    def history(self, name: str, metric: str) -> dict[int, float]:
        """Step -> value, over all runs of a scenario."""
        return {m.step: m.value for run in self.runs[name] for m in run.client.get_metric_history(run.id, metric)}

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load(Path(self.root, "stages", name, "model")).transformer.state_dict()

    def incidents(self, name: str) -> list[tuple[int, str, int | None, int | None]]:
        """(step, cause, back to, resumed after) of each, as the report has them; MLflow has the same."""
        found = self.report(name)["incidents"]
        artifacts = {a.path for part in self.runs[name] for a in part.client.list_artifacts(part.id, "faults")}
        assert artifacts == {f"faults/step-{incident['step']:08d}.json" for incident in found}
        return [(i["step"], i["cause"], i["back_to"], i["resumed_after"]) for i in found]


@pytest.fixture(scope="session")
def scenarios(root: str, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = str(tmp_path_factory.mktemp("work"))
    runs = {}
    for name, parts in (SCENARIOS | TOGETHER).items():
        runs[name] = []
        for fields, _ in parts:
            with job_run(specification(root, name, **fields)) as run:
                runs[name].append(run)
    for world in (1, 2):
        torch.multiprocessing.spawn(work, (world, root, folder, runs), nprocs=world)
    assert not list(Path(folder, "outbox").glob("*/*")), "something was not sent"
    alone, first, second = (
        json.loads(Path(folder, f"{who}.json").read_text()) for who in ("0 of 1", "0 of 2", "1 of 2")
    )
    for name, (outcome,) in second.items():
        assert outcome["report"]["incidents"] == first[name][0]["report"]["incidents"]
    return Outcomes(root, alone | first, runs)
