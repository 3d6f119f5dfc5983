"""Text benchmarks through lm-evaluation-harness, with any system as its model; items from their publishers' own files.

The harness asks, divides into tokens and counts as everybody's figures are counted; it loads nothing from a hub here.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

from calumma.model.document import Document, Text
from calumma.platform.evaluation.benchmarks import text_files
from calumma.platform.evaluation.benchmarks.items import BenchmarkDataError, Graded, Measured, measured
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.systems.prompts import Progress, Prompt, Sampling, System
from calumma.platform.specification import SpecificationError

SHOTS_SEED = 1234  # which examples: the harness's own command line has this one
LONGEST = 512  # tokens of an answer, where the harness's task says nothing
# Benchmark -> the harness's tasks; of those with several, each subject is one.
TASKS: dict[str, str] = {
    "piqa": "piqa", "siqa": "social_iqa", "hellaswag": "hellaswag", "winogrande": "winogrande", "arc_easy": "arc_easy",
    "arc_challenge": "arc_challenge", "openbookqa": "openbookqa", "boolq": "boolq", "gsm8k": "gsm8k",
    "math": "hendrycks_math", "mmlu": "mmlu",
}  # fmt: skip
GENERATED = ("gsm8k", "math")  # answered in words; of the others the likeliest choice is taken
# Where the harness has them, below its own tasks.
FOLDERS = ("piqa", "siqa", "hellaswag", "winogrande", "arc", "openbookqa", "super_glue", "gsm8k", "hendrycks_math",
           "mmlu/default")  # fmt: skip


def require_harness() -> None:
    """Raises SpecificationError where the extra is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise SpecificationError(
            "text benchmarks are measured through lm-evaluation-harness, which is not installed: "
            "pip install 'calumma[evaluation]', or leave these tasks out by `only`"
        ) from error


def harness_model(system: System, progress: Progress | None = None, tokens: Counter[str] | None = None) -> Any:
    """The system as lm-evaluation-harness's own class of models. `tokens` counts those of prompts and texts."""
    from lm_eval.api.model import LM

    counted: Counter[str] = Counter() if tokens is None else tokens

    class SystemModel(LM):
        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [_divided(*request.args) for request in requests]
            scores = system.score(pairs, progress)
            for score in scores:
                counted.update(prompt=score.prompt_tokens, text=score.tokens)
            return [(score.value, score.greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return [score.value for score in system.score_whole([request.args[0] for request in requests], progress)]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            seen: Counter[str] = Counter()
            prompts = []
            for request in requests:
                context, options = request.args
                prompts.append(_prompt(context, options, seen[context]))
                seen[context] += 1
            answers = system.answer(prompts, progress)
            for answer in answers:
                counted.update(prompt=answer.prompt_tokens, text=answer.text_tokens)
            return [answer.document.text for answer in answers]

    return SystemModel()


def _divided(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at a context's end belong to what follows, as the harness has it."""
    spaces = len(context) - len(context.rstrip())
    return (context[:-spaces], context[-spaces:] + continuation) if spaces else (context, continuation)


def _prompt(context: str, options: dict[str, Any], number: int) -> Prompt:
    """number: how many requests of the same words came before; each has a seed of its own."""
    until = options.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
    sampling = Sampling(
        max_tokens=int(options.get("max_gen_toks") or LONGEST),
        temperature=temperature,
        top_p=float(options.get("top_p") or 1.0),
        seed=zlib.crc32(context.encode()) + number,
        stop=tuple(stop for stop in stops if stop),
        cut_front=True,
    )
    return Prompt(Document((Text(context),)), sampling)


class TextTask:
    """A benchmark's rows, checked before any model is loaded. Raises BenchmarkDataError, SpecificationError."""

    def __init__(self, task: SuiteTask, location: str) -> None:
        require_harness()
        self._task = task
        self._subjects = text_files.read_rows(task.benchmark, location, task.shots)
        self.texts = [
            text_files.text_of(row) for splits in self._subjects.values() for row in splits["asked"][: task.limit]
        ]

    @property
    def needs(self) -> Literal["continue", "score"]:
        """Whether the harness asks for texts or for log-probabilities."""
        return "continue" if self._task.benchmark in GENERATED else "score"

    def measure(self, system: System, progress: Progress | None = None) -> Measured:
        import logging

        from lm_eval import evaluator

        for name in ("lm_eval", "lm-eval"):
            logging.getLogger(name).setLevel(logging.ERROR)
        manager = _manager()
        graded: list[Graded] = []
        subjects: dict[str, float] = {}
        tokens: Counter[str] = Counter()
        for subject, splits in self._subjects.items():
            specs = [_published(manager, self._specification(subject, splits))]
            loaded = manager.load(specs)
            for one in loaded["tasks"].values():
                one.set_fewshot_seed(SHOTS_SEED)  # without it every run is shown other examples
            found = evaluator.evaluate(
                lm=harness_model(system, progress, tokens),
                task_dict=loaded,
                limit=self._task.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
            assert found is not None
            [samples] = found["samples"].values()
            own = _graded(samples)
            graded += own
            if subject and own:
                name = next(iter(own[0].values))
                subjects[f"{name}_{subject}"] = sum(one.values[name] for one in own) / len(own)
        return replace(measured(graded, subjects), tokens=dict(tokens))

    def _specification(self, subject: str, splits: dict[str, list[text_files.Row]]) -> dict[str, Any]:
        from datasets import Dataset, DatasetDict

        asked, examples = Dataset.from_list(splits["asked"]), splits["examples"]
        names = {"test_split": "test", "validation_split": None, "training_split": None, "fewshot_split": None}
        parts = {"test": asked}
        if examples:
            parts["train"] = Dataset.from_list(examples)
            names |= {"training_split": "train", "fewshot_split": "train"}
        harness_name = TASKS[self._task.benchmark] + (f"_{subject}" if subject else "")
        spec: dict[str, Any] = {
            "task": harness_name,
            "dataset_name": None,
            "custom_dataset": lambda **_: DatasetDict(parts),
            "num_fewshot": self._task.shots,
            **names,
        }
        if self._task.benchmark in GENERATED:
            spec |= self._votes()
        return spec

    def _votes(self) -> dict[str, Any]:
        """maj@k for every k asked for; one answer is the likeliest, several are drawn."""
        most, gsm8k = max(self._task.votes), self._task.benchmark == "gsm8k"
        options: dict[str, Any] = {
            "until": ["Question:" if gsm8k else "Problem:"],
            "do_sample": most > 1,
            "temperature": self._task.temperature if most > 1 else 0.0,
            "max_gen_toks": LONGEST,
        }
        # MATH's answers stand alone behind its examples; GSM8K's are the last number of a calculation.
        number = {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}
        extract = [number] if gsm8k else []
        filters = [
            {
                "name": f"maj@{votes}",
                "filter": [
                    {"function": "take_first_k", "k": votes}, *extract, {"function": "majority_vote"},
                    {"function": "take_first"},
                ],
            }
            for votes in self._task.votes
        ]  # fmt: skip
        return {"generation_kwargs": options, "repeats": most, "filter_list": filters}


@cache
def _manager() -> Any:
    """The index of the harness's tasks, read once: of those that are asked, not of its fourteen thousand files."""
    from importlib.util import find_spec
    from pathlib import Path

    from lm_eval.tasks import TaskManager

    found = find_spec("lm_eval.tasks")
    assert found is not None
    assert found.origin is not None
    folders = [Path(found.origin).parent / folder for folder in FOLDERS]
    return TaskManager(include_defaults=False, include_path=[folder for folder in folders if folder.is_dir()])


def _published(manager: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The harness's own configuration of a task, with other data. Raises BenchmarkDataError where it has no such task,
    say a subject of MMLU that is none."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index.get(changes["task"])
    if entry is None:
        raise BenchmarkDataError(f"lm-evaluation-harness has no task {changes['task']}: is a folder or file misnamed?")
    own = {name: value for name, value in load_yaml(entry.yaml_path).items() if name not in ("tag", "group", "include")}
    return own | changes


def _graded(samples: Sequence[dict[str, Any]]) -> list[Graded]:
    """An item for each document; the values of several filters (votes) beside each other."""
    items: dict[int, Graded] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f"_{sample['filter']}"
        values = {
            f"{metric}{suffix}": float(sample[metric])
            for metric in sample["metrics"]
            if isinstance(sample.get(metric), int | float | bool)
        }
        said = sample["filtered_resps"]
        before = items.get(sample["doc_id"])
        items[sample["doc_id"]] = Graded(
            {**(before.values if before else {}), **values}, _said(said), str(sample["target"])[:300]
        )
    if not items:
        raise BenchmarkDataError("the harness asked nothing: the benchmark has no items")
    return [items[key] for key in sorted(items)]


def _said(responses: Any) -> str:
    if isinstance(responses, list) and responses and isinstance(responses[0], list | tuple):  # log-likelihoods
        values = [float(response[0]) for response in responses]
        return f"choice {values.index(max(values))}"
    return str(responses[0] if isinstance(responses, list) and responses else responses)[:300]
