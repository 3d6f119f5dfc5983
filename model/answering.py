"""Documents in, documents out: answers to many prompts through one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calumma.model.document import Document
from calumma.model.generation.admission import positions_of
from calumma.model.generation.cache.block_manager import BLOCK_SIZE
from calumma.model.generation.engine import Engine
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.request import Request, SamplingParams
from calumma.model.tokenizers.grammar import GrammarCompiler

if TYPE_CHECKING:
    from calumma.model.directory import MixedModalModel


def supported_params(params: SamplingParams, model: MixedModalModel) -> SamplingParams:
    """The parameters as a model can fulfil them: where it has no decoder of images, free alternation becomes text.

    Raises MissingDecoder when it must draw and cannot.
    """
    if model.image_tokenizer.config.decoder or params.mode == "text":
        return params
    if params.mode == "image":
        model.image_tokenizer.require_decoder()
    return replace(params, mode="text")


def generate(
    model: MixedModalModel,
    prompts: list[Document],
    params: SamplingParams | list[SamplingParams],
    max_sequences: int = 16,
    progress: Callable[[float, float], object] | None = None,
    decoder: Decoder | None = None,
    beat: Callable[[], object] = lambda: None,
) -> list[Document]:
    """Continue each prompt, with the same parameters or its own; the answers only, in the prompts' order.

    At most `max_sequences` are answered at once, in a cache as large as those that need most of it fill.
    `decoder`: in place of the model's own (see Engine). `beat` is called after every pass.
    An answer to a conversation has the role "assistant". progress(done, total) counts finished answers. The
    transformer's training mode is as before when it returns. Raises ValueError (PromptTooLong for one) that names the
    prompt by its number, from 1, before anything is computed; MissingDecoder as `drawable` does; FloatingPointError
    where the model's logits are no numbers, RuntimeError on another failure (see Failure).
    """
    each = params if isinstance(params, list) else [params] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts have {len(each)} sampling parameters; give one for all, or one each")
    each = [supported_params(own, model) for own in each]
    encoded = model.encoder.encode_many(prompts, complete=False)
    trained = model.transformer.training
    compiler = GrammarCompiler(model.text_tokenizer, model.vocabulary)
    options: dict[str, Any] = {} if decoder is None else {"decoder": decoder, "cuda_graphs": False}
    requests = [
        Request(str(number), prompt.ids, own) for number, (prompt, own) in enumerate(zip(encoded, each, strict=True), 1)
    ]
    together = max(1, min(max_sequences, len(requests)))
    room = positions_of(requests, together, model.vocabulary, model.image_length, model.config.context)
    engine = Engine(
        model.transformer,
        model.vocabulary,
        model.image_length,
        together,
        cache_tokens=max(BLOCK_SIZE, room),
        constraints=compiler,
        **options,
    )
    try:
        for request in requests:
            try:
                engine.add(request)
            except ValueError as error:
                raise type(error)(f"prompt {request.id} of {len(prompts)}: {error}") from error
        answers: dict[str, list[int]] = {str(number): [] for number in range(1, len(prompts) + 1)}
        done = 0
        while engine.has_work:
            events = engine.step()
            beat()
            for event in events:
                answers[event.request_id] += event.tokens
                if event.failure is not None:
                    wrong = FloatingPointError if event.failure.kind == "not finite" else RuntimeError
                    raise wrong(f"prompt {event.request_id} of {len(prompts)}: {event.failure.message}")
                if event.finish:
                    done += 1
                    if progress is not None:
                        progress(done, len(prompts))
    finally:
        model.transformer.train(trained)
    return [
        model.encoder.decode(tokens, role="assistant" if prompt.is_conversation else None)
        for prompt, tokens in zip(prompts, answers.values(), strict=True)
    ]
