"""A text model that none of our code has made, taught the quickstart's images: what `calumma extend` and its recipe
come to, beside the quickstart's own model, which was made for both from its first step.

    python benchmarks/extend.py quickstart/storage --workdir extend              # all of it, or what is not done yet
    python benchmarks/extend.py quickstart/storage --workdir extend --until text # the text model alone
    python benchmarks/extend.py quickstart/storage --workdir extend --quick      # a few steps of everything

The text model is a Qwen 3 of about 10 million parameters, trained by transformers alone on the quickstart's text and
code, with a tokenizer of Hugging Face's. It is extended, then trained by the two steps of jobs/recipes/extend on the
quickstart's images and conversations, with text mixed in. Recognition, drawing and counting are what the job evaluate
makes of them, for both models on the same held-out scans; the loss of held-out text is measured document by document,
by transformers before and by calumma after.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import calumma.jobs
from calumma.jobs.specifications.reading import read_specification
from calumma.jobs.specifications.table import JOBS, job_function
from calumma.model import load
from calumma.model.convert import extend_hugging_face
from calumma.platform.cluster import connection, runner
from calumma.platform.evaluation.specification import EvaluateSpecification
from calumma.platform.specification import JobSpecification
from calumma.platform.storage.manifest import Manifest

RECIPE = Path(calumma.jobs.__file__).parent / "recipes/extend"
STEPS = ("text", "extend", "tokenize", "rows", "all", "measure")
TASKS = {"recognition": "ask_recognition", "generation": "ask_drawing", "interleaved": "ask_counting"}
SOURCES = (
    "pairs", "text", "text_held_out", "code", "pages", "chat_recognition", "chat_drawing", "chat_counting", "chat_text",
)  # fmt: skip
# As in the recipe, with the quickstart's names: pairs, what is interleaved, and a fifth of text so that text stays.
ROWS_MIXTURE = {"tokens/pairs": 0.6, "tokens/pages": 0.15, "tokens/text": 0.15, "tokens/code": 0.1}
ALL_MIXTURE = {
    "tokens/chat_recognition": 0.45, "tokens/chat_drawing": 0.1, "tokens/chat_counting": 0.25, "tokens/text": 0.12,
    "tokens/code": 0.04, "tokens/chat_text": 0.04,
}  # fmt: skip
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDS, CONTEXT, ROWS = 12_288, 256, 16
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
}  # fmt: skip


class Sizes(NamedTuple):
    """Passes over the text; steps of the text model (None: as many as that takes), and of the two steps of the recipe,
    of 4,096 tokens; questions of each kind."""

    epochs: int
    text: int | None
    rows: int
    all: int
    limit: int | None


FULL, QUICK = Sizes(6, None, 150, 900, None), Sizes(1, 3, 2, 2, 8)


def texts_of(storage: Path, *sources: str) -> list[str]:
    """The quickstart's own texts, as it has written them."""
    files = [file for source in sources for file in sorted((storage / "documents" / source).glob("*.jsonl"))]
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


# -- the text model ----------------------------------------------------------------------------------------------------


def train_text_model(storage: Path, folder: Path, epochs: int, steps: int | None) -> None:
    """With tokenizers and transformers alone; the weights of the epoch with the lowest held-out loss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    training, held_out = texts_of(storage, "text", "code"), texts_of(storage, "text_held_out")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=IDS, min_frequency=2, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(training, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens = [token for text in training for token in [*tokenizer.encode(text).ids, 0]]
    rows_NT = torch.tensor(tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)]).view(-1, CONTEXT + 1)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=IDS, bos_token_id=None, eos_token_id=0, pad_token_id=0, **SHAPE)
    model = Qwen3ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows_NT):,} rows of {CONTEXT} tokens")
    total = steps or epochs * len(rows_NT) // ROWS
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / total))
    )
    best, order = math.inf, torch.randperm(len(rows_NT))
    for step in range(total):
        first = step * ROWS % len(rows_NT)
        rows = rows_NT[order[first : first + ROWS]]
        loss = model(input_ids=rows[:, :-1], labels=rows[:, 1:], shift_labels=rows[:, 1:].contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if first + 2 * ROWS > len(rows_NT) or step + 1 == total:
            order = torch.randperm(len(rows_NT))
            ids = [tokenizer.encode(text).ids for text in held_out]
            found = text_loss(lambda row_BT: model(input_ids=row_BT).logits, ids)
            print(f"step {step + 1} of {total}: loss {loss.item():.3f}, held out {found:.4f}", flush=True)
            if found < best:
                best = found
                model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@torch.no_grad()
def text_loss(logits_of: Any, documents: Sequence[Sequence[int]]) -> float:
    """Nats a token of documents of ids, each alone, cut at the context. logits_of: [1, T] -> [1, T, V]."""
    total, count = 0.0, 0
    for ids in documents:
        row_T = torch.tensor(ids[: CONTEXT + 1])
        logits_TV = logits_of(row_T[None, :-1])[0].float()
        total += F.cross_entropy(logits_TV, row_T[1:], reduction="sum").item()
        count += len(row_T) - 1
    return total / count


# -- what becomes of it ------------------------------------------------------------------------------------------------


def specifications(storage: Path, work: Path, sizes: Sizes) -> dict[str, JobSpecification]:
    """The recipe's three jobs, with the quickstart's documents, on this machine; and the evaluation."""
    extended = str(work / "extended")
    place = {
        "storage": str(work), "tracking": {"uri": f"sqlite:///{work}/mlflow.db", "experiment": "extend"},
        "text_tokenizer": extended, "image_tokenizer": f"{extended}/image_tokenizer",
    }  # fmt: skip
    resources = {"workers": 1, "cpus_per_worker": 2}
    documents = [f"{storage}/curated/{name}" for name in SOURCES]
    training = {
        "resources": resources, "held_out": {"text": "tokens/text_held_out"}, "micro_batches": 4, "max_epochs": 100,
        "precision": "float32", "zero_stage": 1, "checkpoint_activations": False, "log_every": 5, "dropout": 0.1,
        "mask_documents": True,
    }  # fmt: skip
    given = {
        "tokenize": place | {
            "resources": {"workers": 0}, "documents": documents, "context": CONTEXT, "micro_batch": 4,
            "micro_batches_per_shard": 64, "image_batch": 64,
        },
        "rows": place | training | {
            "mixture": ROWS_MIXTURE, "initial": extended, "steps": sizes.rows, "checkpoint_every": sizes.rows,
            "held_out_every": sizes.rows, "schedule.warmup_steps": 10, "optimizer.learning_rate": 3e-3,
        },
        "all": place | training | {
            "mixture": ALL_MIXTURE, "initial": "stages/rows", "steps": sizes.all, "checkpoint_every": 50,
            "held_out_every": max(1, sizes.all // 4), "schedule.warmup_steps": 10, "schedule.final": 0.02,
            "optimizer.learning_rate": 1e-3, "register_as": None,
        },
    }  # fmt: skip
    found: dict[str, JobSpecification] = {}
    for name, values in given.items():
        kind = JOBS["tokenize" if name == "tokenize" else "pretrain"]
        overrides = [f"{field}={json.dumps(value)}" for field, value in values.items()]
        found[name] = read_specification(kind, RECIPE / f"{name}.yaml", overrides)
    return found


def evaluation(storage: Path, work: Path, model: Path, name: str, limit: int | None) -> EvaluateSpecification:
    """The quickstart's own three tasks."""
    tasks = [
        {"name": kind, "kind": kind, "documents": f"{storage}/curated/{documents}", "limit": limit}
        for kind, documents in TASKS.items()
    ]
    return EvaluateSpecification.model_validate(
        {
            "storage": str(work), "tracking": {"uri": f"sqlite:///{work}/mlflow.db", "experiment": "extend"},
            "resources": {"workers": 1, "cpus_per_worker": 2}, "model": str(model), "tasks": tasks, "batch": 48,
            "judge_training": f"{storage}/curated/scans_train", "judge_held_out": f"{storage}/curated/scans_held_out",
            "output": f"evaluation-{name}",
        }
    )  # fmt: skip


def losses_of_text(storage: Path, work: Path) -> tuple[float, float]:
    """Of held-out text: the text model's, by transformers, and the tuned model's, over all its ids, by calumma."""
    from tokenizers import Tokenizer
    from transformers import Qwen3ForCausalLM

    tokenizer = Tokenizer.from_file(str(work / "text-model/tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in texts_of(storage, "text_held_out")]
    before = Qwen3ForCausalLM.from_pretrained(work / "text-model").eval()
    after = load(work / "stages/all/model").transformer.eval()
    return (
        text_loss(lambda row_BT: before(input_ids=row_BT).logits, ids),
        text_loss(lambda row_BT: after(row_BT), ids),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("storage", type=Path, help="the storage of a finished quickstart")
    parser.add_argument("--workdir", type=Path, required=True, help="where everything is kept, and gone on with")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step that is done")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--rows", type=int, help="steps of the first stage; default: 150")
    parser.add_argument("--all", type=int, help="steps of the second; default: 900")
    given = parser.parse_args()
    storage, work, sizes = given.storage.absolute(), given.workdir.absolute(), QUICK if given.quick else FULL
    sizes = sizes._replace(rows=given.rows or sizes.rows, all=given.all or sizes.all)
    work.mkdir(parents=True, exist_ok=True)
    wanted = STEPS[: STEPS.index(given.until) + 1]
    if not (work / "text-model/chat_template.jinja").is_file():
        train_text_model(storage, work / "text-model", sizes.epochs, sizes.text)
    if "extend" in wanted and not (work / "extended").is_dir():
        made = extend_hugging_face(work / "text-model", work / "extended", storage / "tokenizers/image")
        print(f"extended: {made.further} ids follow the text model's {IDS}", *made.told, sep="\n  ")
    specs = specifications(storage, work, sizes) if "tokenize" in wanted else {}
    if specs:
        run(specs["tokenize"])
    if "rows" not in wanted:
        return
    with connection.embedded(lean=True):
        for name in ("rows", "all"):
            if name in wanted:
                report(name, run(specs[name]))
        if "measure" in wanted:
            measure(storage, work, sizes)


def measure(storage: Path, work: Path, sizes: Sizes) -> None:
    models = {"extended": work / "stages/all/model", "quickstart": storage / "stages/finetuned/model"}
    for name, model in models.items():
        if model.is_dir():
            found = run(evaluation(storage, work, model, name, sizes.limit)).report
            print(f"{name:11}{json.dumps(found)}")
    before, after = losses_of_text(storage, work)
    print(f"held-out text: {before:.4f} nats a token before, {after:.4f} after ({after / before - 1:+.1%})")


def report(name: str, manifest: Manifest) -> None:
    found = manifest.report
    before, after = found.get("held_out_before", {}).get("text", {}), found["held_out"].get("text", {})
    print(f"{name}: {found['seconds']:.0f} s, tokens {found['tokens']}; text {before} -> {after}", flush=True)


def run(spec: JobSpecification) -> Manifest:
    """A job's result, or that of a former call."""
    done = runner.reusable_result(spec)
    if done is not None:
        return done
    began = time.monotonic()
    manifest: Manifest = runner.run_job(spec, job_function(spec.job))[0]
    print(f"{spec.run_name or spec.job}: {time.monotonic() - began:.0f} s", flush=True)
    return manifest


if __name__ == "__main__":
    main()
