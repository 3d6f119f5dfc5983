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

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDS, CONTEXT, ROWS = 12_288, 256, 16
SHAPE = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
}  # fmt: skip


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
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
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
