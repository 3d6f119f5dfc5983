"""The page of metrics: what `/metrics` of a server tells Prometheus, from its registry, and what jobs log to MLflow.

The names of a training's metrics are made where they are measured; the table below says what they mean, and
`make docs-check` compares it with what real runs have logged.
"""

from __future__ import annotations

import re

from docs import house
from docs.reference.fields import cell, plain

HEAD = """# Metrics

## Of a server, for Prometheus

`GET /metrics`, as counted by the ingress that answers. What ends in `_total` only grows; a histogram has `_bucket`,
`_sum` and `_count`.
"""
ENGINES = """Of each engine, as `calumma_engine_…` with the labels `model` and `replica`:"""
ANSWERS = """`calumma_answers_total` counts by `end`: `stop` and `length` are whole answers, `declined` by the safety
policy, `refused` a request that could not be answered, `failed` the server's fault, `late` past `limits.seconds`,
`abandoned` a client that has gone."""
LOGGED = """## Of jobs, in MLflow

Parameters of a run are its specification, nested fields with dots. `SOURCE` is a source's name or the last part of its
location. Losses are means in nats a token over all workers and the steps since the last report."""

# what logs it -> (name, or pattern with capitals for what varies, meaning)
RUNS: dict[str, dict[str, str]] = {
    "pretrain, finetune": {
        "loss": "Of all trained tokens, without the z-loss.",
        "loss_text": "Of text tokens.",
        "loss_image": "Of image tokens.",
        "perplexity": "exp(loss).",
        "perplexity_text": "exp(loss_text).",
        "perplexity_image": "exp(loss_image).",
        "z": "Mean of log(Z)², which the z-loss keeps small.",
        "z_loss": "What the z-loss adds to what is minimized.",
        "learning_rate": "Of the newest step.",
        "gradient_norm": "Before clipping, of the newest step.",
        "tokens_per_second": "Trained tokens of all workers, without the time of checkpoints and evaluation.",
        "mfu": "Model FLOP utilization: `flops_per_second` over `peak_flops_per_second`.",
        "flops_per_second": "Model FLOPs a second and worker, forward and backward; recomputation is not counted.",
        "peak_flops_per_second": "The device's data sheet, or the best of a few matrix products.",
        "step": "Steps of this stage.",
        "seconds_left": "At the speed of the last interval.",
        "workers": "In the present group.",
        "epochs.SOURCE": "Passes through a source so far.",
        "held_out/NAME/LOSS": "`loss`, `loss_text`, `loss_image` and their perplexities on held-out shards.",
        "evaluation/TASK_MEASURE": "Measures of the tasks of `evaluation`, as the job `evaluate` has them.",
        "preference/MEASURE": "Of pairs: `accuracy` and `margin` by the loss's own measure, `chosen_logprob` and "
        "`rejected_logprob` means of a token; `held_out/NAME/preference/MEASURE` of held-out ones.",
    },
    "pretrain, finetune: instruments of stability": {
        "stability/layer_NN/query_norm": "Mean norm of a head's query after normalization.",
        "stability/layer_NN/key_norm": "Mean norm of a head's key after normalization.",
        "stability/layer_NN/attention_logit_max": "Largest attention logit of 16 queries of each sequence.",
        "stability/layer_NN/activation_rms": "Root mean square of the residual stream after the block.",
        "stability/logit_norm": "Mean norm of a token's logits.",
        "stability/log_z": "Mean log Z.",
        "stability/log_z_max": "Largest log Z.",
    },
    "every training, the image tokenizer's among them": {
        "checkpoint_step": "Step of the newest checkpoint in storage.",
        "checkpoint/NAME": "Of a checkpoint, which is a logged model of the run: its losses at that step.",
        "faults/skipped": "Bad steps that were skipped.",
        "faults/rolled_back": "Bad steps after which training went back to a checkpoint.",
        "seconds/data": "Waiting for data since the last report.",
        "seconds/compute": "Computing since the last report.",
        "seconds/checkpoint": "Training stood still for a checkpoint.",
        "seconds/evaluation": "Held-out losses and samples.",
        "memory/host_gib": "Peak of the worker's process, which may have run the training before this one.",
        "memory/device_gib": "Peak of its GPU since the last report.",
    },
    "train_image_tokenizer": {
        "loss": "What is minimized; of the newest step.",
        "reconstruction": "Error of the pixels, `loss.pixels`.",
        "codebook_loss": "Distance of the chosen codes from the encoder's output.",
        "commitment_loss": "The same, for the encoder.",
        "perceptual_loss": "Where its weights are given.",
        "adversarial_loss": "Where a discriminator is trained; with `adversarial_weight` and `discriminator_loss`.",
        "adversarial_weight": "See `adversarial_loss`.",
        "discriminator_loss": "See `adversarial_loss`.",
        "learning_rate": "Of the newest step.",
        "gradient_norm": "Before clipping.",
        "images_per_second": "Of all workers.",
        "codes_in_use": "Share of the codebook used in the last fiftieth of the steps.",
        "codebook_used": "Share that the measured images use.",
        "image_reconstruction_error": "Mean squared error on held-out images.",
        "pixel_error": "Mean absolute error on held-out images.",
        "seconds": "The whole training.",
        "step": "Steps so far.",
        "seconds_left": "At the speed of the last interval.",
        "workers": "In the present group.",
    },
    "curate": {
        "SOURCE/read": "Documents read.",
        "SOURCE/kept": "Documents kept.",
        "SOURCE/bad": "Inputs that are no document.",
        "SOURCE/dropped": "Documents that a step dropped.",
        "SOURCE/dropped_STEP": "The same, by step.",
        "SOURCE/images": "Images kept.",
        "SOURCE/characters": "Characters kept.",
        "SOURCE/seconds_STEP": "Time that a step took, over all workers.",
    },
    "tokenize": {
        "SOURCE/documents": "Documents tokenized.",
        "SOURCE/rows": "Packed sequences.",
        "SOURCE/text_tokens": "Tokens that are not of images.",
        "SOURCE/image_tokens": "Tokens of images.",
        "SOURCE/padding_share": "Share of positions that hold nothing.",
        "SOURCE/longer_than_context": "Documents longer than a sequence.",
        "SOURCE/truncated_share": "Their share.",
        "SOURCE/split": "Documents cut into several sequences.",
        "SOURCE/dropped": "Documents that could not be used.",
    },
    "train_text_tokenizer": {
        "vocabulary_size": "All ids.",
        "image_codes": "Ids of images.",
        "documents_text": "Texts read.",
        "characters": "Characters read.",
        "bytes_per_token": "UTF-8 bytes that a token stands for.",
    },
    "evaluate": {
        "judge_accuracy": "Of the independent classifier, on held-out images.",
        "TASK_accuracy": "Share of right answers of a recognition or generation task.",
        "TASK_valid": "Share of interleaved answers whose words and pictures alternate as asked.",
        "TASK_words": "Share whose words are right.",
        "TASK_digits": "Share of pictures that show what their word says.",
        "TASK_distinct": "Share of drawings that no earlier one equals pixel by pixel.",
        "TASK_diversity": "Mean distance of two drawings in 0..1; `TASK_diversity_within`: of those of one word.",
        "TASK_diversity_of_real": "That over the same of the pictures in the expected answers.",
        "TASK/METRIC": "Figures of the benchmarks of `suite`.",
    },
    "evaluate_suite": {"TASK/METRIC": "Each figure of each task: a share in 0..1 unless the page says otherwise."},
    "ablate": {"MEASURE/VARIANT/RATE/SEED": "Each curve: a measure of a variant at a learning rate, by seed."},
    "ladder": {
        "loss/sweep/SIZE/RATE": "Training loss of a short training of the sweep.",
        "loss/size/SIZE/SEED": "Training loss of a size; where a copy cooled down, the mean of that.",
        "learning_rate": "The first size's, which the others' follow from.",
        "predicted": "Held-out loss of the largest size at its longest, by the law of the smaller ones.",
        "measured": "What that came to.",
        "error": "Measured less predicted.",
        "next_predicted": "Of the next size, by the law of all.",
        "law_NUMBER": "The law of all: E, A, alpha, B, beta.",
    },
    "quickstart": {"documents/SOURCE": "Documents written.", "seconds_a_question": "Mean time of an answer over HTTP."},
}


def page() -> str:
    parts = [HEAD.strip(), _prometheus(), ANSWERS, ENGINES, _engines(), LOGGED]
    for who, metrics in RUNS.items():
        rows = [f"| `{name}` | {cell(plain(told))} |" for name, told in metrics.items()]
        parts += [f"### {who}", "\n".join(("| metric | meaning |", "|---|---|", *rows))]
    return "\n\n".join(parts) + "\n"


def unknown(job: str, names: set[str]) -> set[str]:
    """Of the metrics that a run of a job has logged, those that the page does not tell."""
    patterns = [pattern(name) for who, metrics in RUNS.items() if job in who or "training" in who for name in metrics]
    return {name for name in names if not any(one.fullmatch(name) for one in patterns)}


def pattern(name: str) -> re.Pattern[str]:
    """What a metric's name in RUNS stands for: words in capitals are any text."""
    parts = re.split(r"([A-Z]{2,})", name)
    return re.compile("".join(".+" if re.fullmatch(r"[A-Z]{2,}", part) else re.escape(part) for part in parts))


def _prometheus() -> str:
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for name, kind, labels, told in house.prometheus():
        rows.append(f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {told} |")
    return "\n".join(rows)


def _engines() -> str:
    rows = ["| metric | kind | meaning |", "|---|---|---|"]
    for kind, names in (("counter", house.COUNTERS), ("gauge", house.GAUGES)):
        end = "_total" if kind == "counter" else ""
        rows += [f"| `calumma_engine_{name}{end}` | {kind} | {told} |" for name, told in names.items()]
    return "\n".join(rows)
