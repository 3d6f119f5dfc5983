"""A server that others made, `transformers serve` over a tiny random Llama, and the words for what it cannot do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import tokenizers
import torch
import transformers
import uvicorn
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.cli.serving import chat_completion, completion, model_manager, server, utils

from calumma.model.document import Document, Text
from calumma.platform.cluster.progress import no_progress
from calumma.platform.evaluation.benchmarks import harness
from calumma.platform.evaluation.benchmarks.harness import require_harness
from calumma.platform.evaluation.miniatures.write import write_miniatures
from calumma.platform.evaluation.suite import running
from calumma.platform.evaluation.suite.results import SuiteResults
from calumma.platform.evaluation.suite.specification import SuiteSpecification
from calumma.platform.evaluation.systems.abilities import lacking
from calumma.platform.evaluation.systems.endpoint import EndpointSystem
from calumma.platform.evaluation.systems.prompts import Prompt, Sampling, UnusableSystem
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import SpecificationError

try:
    require_harness()
    CONTINUED = ["gsm8k"]
except SpecificationError:
    CONTINUED = []
CHOICES = ["piqa", "mmlu"] if CONTINUED else []
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("rival_benchmarks"))
    write_miniatures(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, benchmarks: str) -> str:
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [file.read_text() for file in sorted(Path(benchmarks, "gsm8k").rglob("*.jsonl"))]
    tokenizer.train_from_iterator(texts, trainer)
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(model: str) -> Iterator[str]:
    """As `transformers serve MODEL` assembles it, with an empty cache of the hub."""
    manager = model_manager.ModelManager(device="cpu", force_model=model)
    state = utils.GenerationState()
    other = MagicMock()
    app = server.build_server(
        manager,
        chat_completion.ChatCompletionHandler(manager, state),
        completion.CompletionHandler(manager, state),
        *(other, other, other),
        generation_state=state,
    )
    manager.get_gen_models = lambda: []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        running_server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=running_server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            running_server.should_exit = True
            thread.join()


def specification(root: Path, url: str, model: str, benchmarks: str, **fields: object) -> SuiteSpecification:
    values = {
        "storage": str(root), "system": {"url": url, "served_model": model, "images": "chat"}, "data": benchmarks,
        "only": [*CONTINUED, *CHOICES, "squad", "vqav2", "mnist_drawn"], "limit": 2, "resources": {"workers": 0},
    }  # fmt: skip
    return SuiteSpecification.model_validate(values | fields)


def measure(spec: SuiteSpecification) -> SuiteResults:
    running.evaluate_suite(spec, MagicMock(id="run"), no_progress)
    return SuiteResults.read(spec.output_uri)


def test_a_server_that_names_no_model_is_told_of(url: str) -> None:
    with pytest.raises(UnusableSystem, match="--served-model"):
        EndpointSystem(SystemSpecification.of(url))


def test_an_answer_ends_before_a_stop_text_though_the_server_leaves_it_in(url: str, model: str) -> None:
    with EndpointSystem(SystemSpecification.of(url, served_model=model)) as system:
        [whole] = system.answer([Prompt(Document((Text("Question: "),)), Sampling(max_tokens=8))])
        stop = whole.document.text[2:4]
        [cut] = system.answer([Prompt(Document((Text("Question: "),)), Sampling(max_tokens=8, stop=(stop,)))])
    assert cut.document.text == whole.document.text.partition(stop)[0]


def test_what_it_cannot_is_told_by_task_before_anything_is_asked(
    tmp_path: Path, url: str, model: str, benchmarks: str
) -> None:
    spec = specification(tmp_path, url, model, benchmarks)
    with pytest.raises(SpecificationError) as found:
        measure(spec)
    text = str(found.value)
    assert f"{len(CHOICES) + 2} of {len(spec.only)} tasks" in text
    assert "vqav2: it does not look at pictures: it counts the same tokens with one and without" in text
    assert "mnist_drawn: it draws nothing" in text
    if CHOICES:
        assert "piqa, mmlu: it gives no log-probabilities" in text
    assert not Path(tmp_path, "evaluations", "suite", "tasks").exists()


def test_what_it_can_is_measured(
    tmp_path: Path, url: str, model: str, benchmarks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "LONGEST", 8)
    results = measure(specification(tmp_path, url, model, benchmarks, skip_missing=True))
    assert set(results.left_out) == {*CHOICES, "vqav2", "mnist_drawn"}
    assert {task.name: len(task.ids) for task in results.tasks} == dict.fromkeys(["squad", *CONTINUED], 2)
    [squad] = [task for task in results.tasks if task.name == "squad"]
    assert squad.failures == 0
    assert squad.tokens["prompt"] > 0


def test_it_can_chat_and_continue(url: str, model: str) -> None:
    with EndpointSystem(SystemSpecification.of(url, served_model=model)) as system:
        assert lacking(system, {"chat", "continue"}) == {}
