"""Two stages of one schedule beside the same training in plain PyTorch, with transformers' learning rates and every
document in a forward pass of its own; and the same steps by two workers as by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.specification import PretrainSpecification

STEPS = 10  # of each stage


class Document(NamedTuple):
    tokens: Tensor  # LongTensor [T]
    targets: Tensor  # LongTensor [T], the next tokens
    trained: Tensor  # BoolTensor [T], of the targets


def row_groups(root: str) -> list[list[Document]]:
    """The documents of each micro-batch, read with pyarrow alone."""
    (entry,) = Manifest.read(f"{root}/tokens/packed").files
    file = pq.ParquetFile(f"{root}/tokens/packed/{entry.path}")
    return [
        [document for row in file.read_row_group(number).to_pylist() for document in documents(row)]
        for number in range(file.num_row_groups)
    ]


def documents(row: dict[str, Any]) -> list[Document]:
    tokens, segments = torch.tensor(row["tokens"]), torch.tensor(row["segments"])
    trained = torch.tensor(row["loss_mask"]) & (segments >= 0)
    found = []
    for number in range(int(segments.max()) + 1):
        (places,) = torch.nonzero(segments[:-1] == number, as_tuple=True)
        found.append(Document(tokens[places], tokens[places + 1], trained[places + 1]))
    return found


def transformers_rates(spec: PretrainSpecification) -> list[float]:
    """Of the steps of the whole schedule. Where ours warms up from the first step on, transformers' begins with 0."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    o, warmup, total = spec.optimizer, spec.schedule.warmup_steps, spec.schedule.total_steps
    assert total is not None
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], o.learning_rate)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, num_warmup_steps=warmup, num_training_steps=total, min_lr_rate=spec.schedule.final
    )
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates[1 : warmup + 1] + rates[warmup:]


class Plain(NamedTuple):
    losses: list[float]  # nats a token, of each step
    norms: list[float]  # of the gradients
    weights: dict[str, Tensor]  # at the end
    halfway: dict[str, Tensor]


@pytest.fixture(scope="module")
def spec(scenarios: Any) -> PretrainSpecification:
    found: PretrainSpecification = scenarios.specification("plain")
    return found


@pytest.fixture(scope="module")
def plain(scenarios: Any, spec: PretrainSpecification) -> Plain:
    """Both stages, in a loop that has nothing of ours but the model's forward pass."""
    vocabulary = Vocabulary.read(f"{scenarios.root}/tokenizers/text")
    assert spec.model is not None
    config: ModelConfig = spec.model.model_copy(update={"vocabulary_size": vocabulary.size, "mask_documents": False})
    model = Transformer(config).initialize(spec.seed)
    o, rates, batches = spec.optimizer, transformers_rates(spec), row_groups(scenarios.root)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": o.weight_decay},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.beta1, o.beta2), eps=o.eps)
    losses, norms, halfway = list[float](), list[float](), {}
    for step in range(2 * STEPS):
        numbers = range(step % STEPS * spec.micro_batches, (step % STEPS + 1) * spec.micro_batches)
        global_batch = [document for number in numbers for document in batches[number % len(batches)]]
        count = sum(int(document.trained.sum()) for document in global_batch)
        nll_of_step = 0.0
        for document in global_batch:
            logits = model(document.tokens[None])[0][document.trained]
            log_z = torch.logsumexp(logits, dim=-1)
            nll = torch.nn.functional.cross_entropy(logits, document.targets[document.trained], reduction="sum")
            ((nll + spec.z_loss * (log_z**2).sum()) / count).backward()
            nll_of_step += nll.item()
        losses.append(nll_of_step / count)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.gradient_clip)))
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == STEPS:
            halfway = {name: value.clone() for name, value in model.state_dict().items()}
    return Plain(losses, norms, model.state_dict(), halfway)


def test_learning_rates_are_those_of_transformers_over_both_stages(scenarios: Any, spec: PretrainSpecification) -> None:
    expected = transformers_rates(spec)
    for offset, name in ((0, "plain"), (STEPS, "continued")):
        found = scenarios.history(name, "learning_rate")
        assert found == pytest.approx({step: expected[offset + step - 1] for step in range(1, STEPS + 1)})
    assert scenarios.report("continued")["schedule_step"] == 2 * STEPS


def test_losses_and_gradient_norms_are_those_of_plain_pytorch(scenarios: Any, plain: Plain) -> None:
    for metric, expected in (("loss", plain.losses), ("gradient_norm", plain.norms)):
        for offset, name in ((0, "plain"), (STEPS, "continued")):
            found = scenarios.history(name, metric)
            assert found == pytest.approx({step: expected[offset + step - 1] for step in range(1, STEPS + 1)}, rel=1e-3)
    assert plain.losses[-1] < plain.losses[0] - 0.5


def test_weights_are_those_of_plain_pytorch(scenarios: Any, plain: Plain, spec: PretrainSpecification) -> None:
    """AdamW with its betas and weight decay, every gradient clipped, z-loss, documents that do not see each other; and
    in the second stage the optimizer of the first."""
    assert min(plain.norms) > spec.optimizer.gradient_clip
    for name, expected in (("plain", plain.halfway), ("continued", plain.weights)):
        for weight, value in scenarios.weights(name).items():
            torch.testing.assert_close(value, expected[weight], rtol=0, atol=1e-4, msg=lambda m, w=weight: f"{w}: {m}")


def test_two_workers_that_share_every_row_come_to_the_losses_and_weights_of_one(scenarios: Any) -> None:
    """The whole loop, with packed documents apart: what it reports, measures on held-out rows and publishes."""
    one, two = "plain", "plain, shared by two workers"
    for metric in ("loss", "loss_text", "loss_image", "gradient_norm", "z", "stability/layer_01/query_norm"):
        assert scenarios.history(two, metric) == pytest.approx(scenarios.history(one, metric), rel=1e-4), metric
    assert scenarios.report(two)["tokens"] == scenarios.report(one)["tokens"]
    assert scenarios.report(two)["held_out"]["packed"] == pytest.approx(
        scenarios.report(one)["held_out"]["packed"], rel=1e-4
    )
    expected = scenarios.weights(one)
    for weight, value in scenarios.weights(two).items():
        torch.testing.assert_close(value, expected[weight], rtol=0, atol=1e-4)


def test_dropout_and_held_out_losses_are_the_same_by_two_workers(scenarios: Any) -> None:
    alone, together = (scenarios.history(name, "loss") for name in ("dropout", "dropout, two workers"))
    assert together == pytest.approx(alone, rel=1e-4)
    one, two = (scenarios.report(name)["held_out"]["packed"] for name in ("dropout", "dropout, two workers"))
    assert two == pytest.approx(one, rel=1e-4)
    assert set(one) == {"loss", "loss_text", "loss_image"}
