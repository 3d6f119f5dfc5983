"""The tokenizer over HTTP, as vLLM has it: lm-evaluation-harness needs no copy of it then."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from calumma.serve.http import prompts
from calumma.serve.http.context import ServingContext
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.requests import DetokenizeRequest, TokenizeRequest
from calumma.serve.protocol import BOS, EOS


def add_tokenizer(app: FastAPI, context: ServingContext) -> None:
    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        """Names of the tokens that begin and end a sequence."""
        return {"tokenizer_class": "calumma", "bos_token": BOS, "eos_token": EOS, "pad_token": None}

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text, as `tokens`, and their number, as `count`."""
        backend = context.backends[context.model(request.model).name]
        tokens = await backend.tokenize(prompts.well_formed(request.prompt, "prompt"))
        if request.add_special_tokens:
            tokens = [*(await backend.tokenize(BOS)), *tokens]
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, as `prompt`."""
        backend = context.backends[context.model(request.model).name]
        try:
            return {"prompt": await backend.detokenize(request.tokens)}
        except LookupError as error:
            raise APIError("the tokens hold an id that is none of the model's", param="tokens") from error
