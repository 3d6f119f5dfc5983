"""Fields of requests that this server does not have: those that would change the answer are refused by name, those
without effect on it are taken, and of all others the answer's headers tell.

OpenAI's names (platform.openai.com/docs/api-reference), vLLM's (docs.vllm.ai, "OpenAI-Compatible Server"), and those
of SGLang, llama.cpp, TGI and Ollama that their clients send here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from calumma.serve.http.wire.errors import APIError

# field -> values that leave the answer as it is. Where an endpoint has the field after all, this does not count there.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "allowed_token_ids": (),
    "audio": (),
    "background": (False, "auto", "opaque"),
    "best_of": (1,),
    "conversation": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "input": (),
    "input_fidelity": ("low",),
    "instructions": ("",),
    "logit_bias": ({},),
    "logprobs": (False,),
    "mask": (),
    "max_completion_tokens": (),
    "max_output_tokens": (),
    "max_tokens": (),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "moderation": ("auto",),
    "n": (1,),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "quality": ("auto", "standard"),
    "reasoning": ({}, {"effort": "none"}),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "stop": ([], ""),
    "stream": (False,),
    "style": ("natural", "vivid"),
    "suffix": ("",),
    "text": ({},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structural_tag": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    # SGLang, llama.cpp, TGI, Ollama
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "ebnf": (),
    "grammar": ("",),
    "json_schema": ({},),
    "lora_path": (),
    "min_new_tokens": (0,),
    "mirostat": (0,),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "num_predict": (-1,),
    "regex": (),
    "repeat_penalty": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}

# Taken without a word: they change who pays, what is kept or how fast it goes, and not what is answered.
WITHOUT_EFFECT = frozenset(
    {
        "add_special_tokens",
        "guided_decoding_backend",
        "include",
        "include_reasoning",
        "kv_transfer_params",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "stream_options",
        "truncation",
        "user",
    }
)
MOST_NAMED = 10  # unknown fields in a warning
LONGEST_NAME = 40


def require_supported(values: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises APIError that names a field which would change the answer; `known` are the endpoint's own."""
    own = set(known)
    for field, given in values.items():
        if field not in UNSUPPORTED_FIELDS or field in own or given is None:
            continue
        if isinstance(given, dict):
            given = {name: value for name, value in given.items() if value is not None}
        # of True and 1, which are equal in Python, each stands for itself alone
        if any(type(given) is type(one) and given == one for one in _harmless(field)):
            continue
        raise APIError(f"this server has no `{field}`; leave it out", param=field, code="unsupported")


def _harmless(field: str) -> list[Any]:
    values = UNSUPPORTED_FIELDS[field]
    numbers = [one for one in values if isinstance(one, int) and not isinstance(one, bool)]
    return [*values, *map(float, numbers)]


def warning_headers(unknown: Iterable[str]) -> dict[str, str]:
    """The headers of an answer to a request with fields that nobody knows (RFC 7234, section 5.5: code 299)."""
    names = sorted(set(unknown) - UNSUPPORTED_FIELDS.keys() - WITHOUT_EFFECT)
    if not names:
        return {}
    shown = [re.sub(r"[^A-Za-z0-9_.\-]", "?", name)[:LONGEST_NAME] for name in names[:MOST_NAMED]]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return {"Warning": f'299 calumma "fields that this server does not know were ignored: {", ".join(shown)}{more}"'}
