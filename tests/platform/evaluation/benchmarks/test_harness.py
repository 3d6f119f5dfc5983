"""lm-evaluation-harness with our engine as its model, beside its own `hf` backend on the same imported weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from calumma.model.convert import import_hugging_face
from calumma.model.document import Document, Text
from calumma.platform.evaluation.benchmarks import harness
from calumma.platform.evaluation.benchmarks.harness import TASKS, TextTask, harness_model
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.miniatures.write import write_miniatures
from calumma.platform.evaluation.suite.presets import PAPER
from calumma.platform.evaluation.systems.engines import LocalSystem
from calumma.platform.evaluation.systems.prompts import Answer, Prompt
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import Tracking

try:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
except ImportError:
    pytest.skip("the harness's own `hf` backend is not installed: pip install 'lm-eval[hf]'", allow_module_level=True)

CODES = 16
LENGTH = 2048
TEXTS = [
    "Question: What keeps bread soft? Answer: a closed box.\n",
    "Ice melts in a warm room; the moon sends sunlight back.",
]
PAIRS = [
    ("Question: What keeps bread soft? Answer:", " a closed box."),
    ("Question: What keeps bread soft? Answer:", " a warm room."),
    ("Question: What keeps bread soft? Answer: ", "the moon"),
    ("Ice", " melts in a warm room; the moon sends sunlight back."),
]


class Both(NamedTuple):
    theirs: Any
    theirs_without_bos: Any
    ours: Any
    image_ids: list[int]
    system: LocalSystem
    miniatures: Path


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("t", number, 1))
        for number, each in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    import transformers

    folder = tmp_path_factory.mktemp("imported")
    images = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z" for code in range(CODES)]
    reserved = [f"<reserved{number:05d}>" for number in range(8704, 8712)]
    special = ["<s>", "<pad>", "</s>", "<unk>", *images, "<eoss>", "<racm3:break>", *reserved]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    write_miniatures(str(folder / "miniatures"))
    texts = [file.read_text() for name in TASKS for file in sorted((folder / "miniatures" / name).rglob("*.*"))]
    tokenizer.train_from_iterator([*TEXTS * 5, *texts], trainer)
    (folder / "hf").mkdir()
    config = transformers.ChameleonConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=2,
        pad_token_id=1, vocabulary_map=tokenizer.get_vocab(),
        vq_config=dict(resolution=16, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1, embed_dim=8,
                       latent_channels=8, num_embeddings=CODES),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder / "hf")
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    import_hugging_face(folder / "hf", folder / "ours")
    # transformers' forward sets the logits of image codes to the least number; the scores of ours are among all ids.
    model.model.vocabulary_mapping.__dict__["image_tokens"] = torch.empty(0, dtype=torch.long)
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    with_bos = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    options: dict[str, Any] = dict(pretrained=model, max_length=LENGTH, batch_size=4, device="cpu")
    system = LocalSystem(SystemSpecification(model=str(folder / "ours"), batch=4), Tracking())
    return Both(
        HFLM(tokenizer=with_bos, add_bos_token=True, **options),
        HFLM(tokenizer=plain, prefix_token_id=0, **options),
        harness_model(system),
        [
            tokenizer.token_to_id(name)
            for name in [*images, "<s>", "<eoss>", "<racm3:break>", "<pad>", "<unk>", *reserved]
        ],
        system,
        folder / "miniatures",
    )


def test_loglikelihoods_are_those_of_the_hf_backend(both: Both) -> None:
    theirs = both.theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    ours = both.ours.loglikelihood(instances("loglikelihood", PAIRS))
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, rel=1e-6)
        assert greedy == expected_greedy


def test_rolling_loglikelihoods_are_those_of_the_hf_backend(both: Both) -> None:
    texts = [(TEXTS[0],), (TEXTS[1] * 2,)]
    theirs = both.theirs_without_bos.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    ours = both.ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_greedy_answers_are_those_of_the_hf_backend(both: Both) -> None:
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "suppress_tokens": both.image_ids}
    asked = [(context, options) for context, _ in PAIRS[:4]]
    theirs = both.theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    ours = both.ours.generate_until(instances("generate_until", asked))
    assert ours == theirs


PLAIN = [task for task in PAPER if task.benchmark in TASKS and task.votes == (1,)]


@pytest.mark.parametrize("task", PLAIN, ids=lambda task: task.name)
def test_every_text_benchmark_has_the_hf_backends_figures(
    both: Both, task: SuiteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the paper's shots, four items of each miniature: item by item the same, answers and choices alike."""
    assert {one.benchmark for one in PLAIN} == set(TASKS)
    monkeypatch.setattr(harness, "LONGEST", 12)
    asked = TextTask(task.model_copy(update={"limit": 4}), str(both.miniatures / task.benchmark))
    ours = asked.measure(both.system)
    both.theirs.model.generation_config.suppress_tokens = both.image_ids
    monkeypatch.setattr(harness, "harness_model", lambda *_: both.theirs)
    theirs = asked.measure(both.system)
    assert (ours.values, ours.metrics) == (theirs.values, theirs.metrics)
    assert [one.said for one in ours.graded] == [one.said for one in theirs.graded]
    assert len(ours.graded) >= 4


class Voter:
    """Of each question's answers the first `right` of `of` end in the right number."""

    def __init__(self, right: int, of: int, answers: dict[str, str]) -> None:
        self._right, self._of, self._answers = right, of, answers
        self.seeds: dict[str, set[int]] = {}

    def answer(self, prompts: Sequence[Prompt], progress: object = None) -> list[Answer]:
        said, seen = [], dict.fromkeys((prompt.document.text for prompt in prompts), 0)
        for prompt in prompts:
            text = prompt.document.text
            self.seeds.setdefault(text, set()).add(prompt.sampling.seed)
            question = text.rpartition("Question: ")[2].partition("\n")[0]
            right = seen[text] % self._of < self._right
            seen[text] += 1
            number = self._answers[question] if right else str(1000 + seen[text] % 2)
            said.append(Answer(Document((Text(f" It is so.\n#### {number}"),))))
        return said


@pytest.mark.parametrize(("right", "first", "second"), [(8, 1.0, 0.0), (17, 1.0, 1.0), (2, 0.0, 0.0)])
def test_the_most_frequent_of_8_and_of_32_answers_count(both: Both, right: int, first: float, second: float) -> None:
    """Wrong answers are of two kinds: 8 right ones of 32 lose against twelve."""
    [task] = [one for one in PAPER if one.name == "gsm8k_votes"]
    asked = TextTask(task, str(both.miniatures / "gsm8k"))
    rows = asked._subjects[""]["asked"]
    voter = Voter(right, 32, {row["question"]: row["answer"].rpartition("#### ")[2] for row in rows})
    found = asked.measure(voter)  # type: ignore[arg-type]
    assert found.metrics["exact_match_maj@8"] == first
    assert found.metrics["exact_match_maj@32"] == second
    assert all(len(seeds) == 32 for seeds in voter.seeds.values())
    assert len(voter.seeds) == len(rows) == 12


def test_votes_of_math_are_drawn_from_the_engine(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "LONGEST", 8)
    [task] = [one for one in PAPER if one.name == "math_votes"]
    found = TextTask(task.model_copy(update={"limit": 1}), str(both.miniatures / "math")).measure(both.system)
    assert set(found.values) == {"exact_match_maj@4"}
