"""Tiny random text models of transformers, saved as Hugging Face folders with tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from calumma.model.config import ImageTokenizerConfig
from calumma.model.tokenizers.image import ImageTokenizer

TEXTS = [
    "Which digit is this? Draw a seven. Count from two to four, with pictures. user assistant system Grüße 三\n",
    "def f(x):\n    return x\n",
] * 5
CODES = 16
SMALL: dict[str, Any] = dict(
    vocab_size=420, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32)

# As the families' tokenizers have them, without tools.
LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>' + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def families() -> dict[str, dict[str, Any]]:
    """Name -> transformers' model class, its configuration, the kind of tokenizer."""
    llama, mistral, qwen2, qwen3 = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    return {
        "llama2": dict(of=llama, kind="llama2", bos_token_id=1, eos_token_id=2),
        "llama3": dict(of=llama, kind="llama3", rope_parameters=LLAMA3_ROPE, bos_token_id=0, eos_token_id=1),
        "biased": dict(of=llama, kind="llama3", attention_bias=True, mlp_bias=True, head_dim=12),
        "mistral": dict(of=mistral, kind="llama2", sliding_window=24, head_dim=16),
        "qwen2": dict(of=qwen2, kind="qwen", tie_word_embeddings=True, rope_parameters=YARN),
        "qwen3": dict(of=qwen3, kind="qwen", head_dim=16, tie_word_embeddings=True),
    }


def make_text_model(folder: Path, family: str, dtype: torch.dtype | None = None, **changes: Any) -> Any:
    """A folder of a family, with weights far from their initial ones; returns transformers' model."""
    import transformers

    settings = SMALL | families()[family] | changes
    of, kind = getattr(transformers, settings.pop("of")), settings.pop("kind")
    torch.manual_seed(0)
    model = of(of.config_class(**settings)).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        if "norm" in name:
            parameter.data += 1
    model = model if dtype is None else model.to(dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder, kind)
    return model


def save_tokenizer(folder: Path, kind: str) -> None:
    tokenizer = llama2_tokenizer() if kind == "llama2" else byte_level_tokenizer(LLAMA3 if kind == "llama3" else QWEN)
    if kind == "qwen":  # Qwen 3's thinking and tool names are added, and no special ones
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {
        "llama2": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": {"__type": "AddedToken", "content": "<unk>", "special": True},
        },
        "llama3": {"bos_token": LLAMA3[0], "eos_token": LLAMA3[4]},
        "qwen": {"bos_token": None, "eos_token": QWEN[2], "pad_token": QWEN[0]},
    }[kind]
    if kind == "llama3":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    template = {"llama2": LLAMA2_TEMPLATE, "llama3": LLAMA3_TEMPLATE, "qwen": QWEN_TEMPLATE}[kind]
    if kind == "qwen":
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_level_tokenizer(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(_pattern(), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def llama2_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *names], max_token_length=12, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(document))


def _pattern() -> Any:
    from tokenizers import Regex

    return Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def save_image_tokenizer(folder: Path) -> Path:
    torch.manual_seed(1)
    shape = ImageTokenizerConfig(
        resolution=16, codebook_size=CODES, embedding=8, base_channels=8, multipliers=[1, 2], residual_blocks=1
    )
    ImageTokenizer(shape).save(folder)
    return folder
