"""langchain-openai, LiteLLM, llm, lm-evaluation-harness and schemathesis, unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from calumma.model import MixedModalModel

from .conftest import Run

Told = Callable[..., dict[str, Any]]


def test_langchain(told: Told, roomy_url: str) -> None:
    found = told("langchain_loop.py", roomy_url)
    assert found["image"] == "", "LangChain sends an answer of images back empty"
    assert found["answer"] == found["again"]
    assert found["streamed"] == found["whole"]
    assert found["usage"] > 0
    assert len(found["batch"]) == 2
    assert all(isinstance(found[name], str) for name in ("completion", "responses"))
    for name in ("chat", "responses"):
        tools = found["tools"][name]
        assert (tools["call"]["name"], tools["call"]["args"]) in (
            ("Digit", {"value": 1}), ("Digit", {"value": 7}), ("now", {}),
        )  # fmt: skip
        assert [call["name"] for call in tools["streamed"]] == ["Digit"] or tools["streamed"]
    assert found["tools"]["structured"] in (1, 7)


def test_litellm(told: Told, url: str) -> None:
    found = told("litellm_calls.py")
    assert found["whole"] == found["streamed"]
    assert found["usage"] > 0
    assert found["image"]
    assert "this server has 'tiny'" in found["error"]
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        plain = client.completions.create(model="tiny", prompt="The", max_tokens=6, seed=5)
    assert found["completion"] == plain.choices[0].text


def test_llm(run: Run, url: str, tmp_path: Path) -> None:
    """Simon Willison's command, with its own log of the conversation."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f'- {{model_id: tiny, model_name: tiny, api_base: "{url}/v1"}}\n'
        f'- {{model_id: tiny-text, model_name: tiny, api_base: "{url}/v1", completion: true}}\n'
    )
    variables = {"LLM_USER_PATH": str(tmp_path)}
    asked = ("-m", "tiny", "-o", "seed", "5", "-o", "max_tokens", "12")
    streamed = run("llm", "prompt", "Draw a three.", *asked, **variables)
    whole = run("llm", "prompt", "Draw a three.", *asked, "--no-stream", **variables)
    assert streamed.strip() == whole.strip()
    run("llm", "prompt", "And a four.", "--continue", *asked, **variables)
    run("llm", "prompt", "The", "-m", "tiny-text", "-o", "max_tokens", "4", **variables)
    assert len(json.loads(run("llm", "logs", "list", "--json", "-n", "0", **variables))) == 4


TASK = """
task: digits
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["seven", "three", "four é", "two to four, with pictures"]
metric_list: [{metric: acc}]
"""
QUESTIONS = ["Which digit is this?", "Draw a", "Count from", "What is", "And"]


def test_lm_evaluation_harness_with_batches_of_four(run: Run, url: str, tmp_path: Path, model: MixedModalModel) -> None:
    """Its own multiple choice over our endpoint scores as one plain pass of the model does."""
    rows = [{"question": question, "answer": number % 4} for number, question in enumerate(QUESTIONS)]
    data = tmp_path / "digits.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "digits.yaml").write_text(TASK.replace("DATA", str(data)))
    arguments = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=1,max_length=128"
    run(
        "lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--batch_size", "4",
        "--tasks", "digits", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples",
    )  # fmt: skip
    [samples] = (tmp_path / "out").rglob("samples_digits_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == len(QUESTIONS)
    for sample in found:
        for argument, response in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            expected = likelihood(model, argument["arg_0"], argument["arg_1"])
            assert float(response[0]) == pytest.approx(expected, abs=1e-3)


def likelihood(model: MixedModalModel, context: str, continuation: str) -> float:
    before = model.text_tokenizer.encode(context)
    after = model.text_tokenizer.encode(context + continuation)[len(before) :]
    ids = torch.tensor([[model.vocabulary.bos, *before, *after]])
    with torch.inference_mode():
        logprobs_TV = model.transformer(ids).log_softmax(-1)[0, len(before) : -1]
    return float(logprobs_TV.gather(1, torch.tensor(after)[:, None]).sum())


def test_schemathesis_finds_nothing_that_the_document_does_not_tell(run: Run, roomy_url: str) -> None:
    """Requests made from the OpenAPI document, and others that break it; of files and batches, too."""
    run(
        "st", "run", f"{roomy_url}/openapi.json", "--max-examples", "15", "--seed", "1",
        "--phases", "examples,coverage,fuzzing",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--request-timeout", "60",
    )  # fmt: skip
