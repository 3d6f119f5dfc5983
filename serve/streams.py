"""How the pieces of an answer look as server-sent events of each endpoint."""

from __future__ import annotations

import base64
from collections.abc import Callable

from calumma.serve import responses, wire
from calumma.serve.answer import Label, total, usage
from calumma.serve.pictures import converted
from calumma.serve.pieces import Declined, Drawing, Finished, ImagePiece, Piece, Started, TextPiece, TokenCount
from calumma.serve.responses import Reason

Chunks = Callable[[int, Piece], list[bytes]]
Tail = Callable[[TokenCount], list[bytes]]


def chat(label: Label, started: list[Started], request: wire.ChatRequest) -> tuple[list[bytes], Chunks, Tail]:
    """chat.completion.chunk events: the first of each answer, those of its pieces, the last of all. The order of
    chunks is the order of text and images."""
    options = request.options

    def chunk(
        index: int,
        delta: responses.Delta,
        reason: Reason | None = None,
        logprobs: responses.ChatLogprobs | None = None,
    ) -> bytes:
        choice = responses.ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)
        return responses.event(
            responses.ChatChunk(id=label.id, created=label.created, model=label.model, choices=[choice])
        )

    def chunks(index: int, piece: Piece) -> list[bytes]:
        match piece:
            case TextPiece(text, tokens):
                logprobs = responses.chat_logprobs(list(tokens)) if request.logprobs else None
                return [chunk(index, responses.Delta(content=text), logprobs=logprobs)]
            case ImagePiece(png):
                return [chunk(index, responses.Delta(images=[responses.image_part(png)]))]
            case Drawing(done, of, preview) if options.include_progress or preview:
                shown = responses.data_url(preview) if preview else None
                progress = responses.Progress(done=done, total=of, preview=shown)
                return [chunk(index, responses.Delta(drawing=progress))]
            case Finished(reason):
                return [chunk(index, responses.Delta(), reason)]
            case Declined(message):
                return [
                    chunk(index, responses.Delta(refusal=message)),
                    chunk(index, responses.Delta(), "content_filter"),
                ]
        return []

    def tail(answers: TokenCount) -> list[bytes]:
        if not options.include_usage:
            return []
        last = responses.ChatChunk(
            id=label.id,
            created=label.created,
            model=label.model,
            choices=[],
            usage=usage(started[0].prompt, answers),
        )
        return [responses.event(last)]

    first = [chunk(index, responses.Delta(role="assistant", content="")) for index in range(len(started))]
    return first, chunks, tail


def completion(
    label: Label, started: list[Started], request: wire.CompletionRequest
) -> tuple[list[bytes], Chunks, Tail]:
    """text_completion events; an echo comes first."""
    shifts = [len(one.echo.text) if one.echo else 0 for one in started]

    def chunk(index: int, piece: TextPiece, shift: int, reason: Reason | None = None) -> bytes:
        logprobs = responses.text_logprobs(list(piece.tokens), shift) if request.logprobs is not None else None
        choice = responses.TextChoice(index=index, text=piece.text, finish_reason=reason, logprobs=logprobs)
        return _completion([choice])

    def _completion(choices: list[responses.TextChoice], count: responses.Usage | None = None) -> bytes:
        return responses.event(
            responses.Completion(id=label.id, created=label.created, model=label.model, choices=choices, usage=count)
        )

    def chunks(index: int, piece: Piece) -> list[bytes]:
        match piece:
            case TextPiece():
                return [chunk(index, piece, shifts[index])]
            case Finished(reason):
                return [chunk(index, TextPiece(""), 0, reason)]
            case Declined():
                return [chunk(index, TextPiece(""), 0, "content_filter")]
        return []

    def tail(answers: TokenCount) -> list[bytes]:
        if not request.options.include_usage:
            return []
        return [_completion([], usage(total([one.prompt for one in started[:: request.n]]), answers))]

    first = [chunk(index, one.echo, 0) for index, one in enumerate(started) if one.echo]
    return first, chunks, tail


def images(label: Label, started: list[Started], request: wire.ImageRequest, size: int) -> tuple[Chunks, Tail]:
    """image_generation events: partial images while one is drawn, and it when it is there."""
    form, quality = request.output_format, request.output_compression
    shown = [0] * len(started)

    def encoded(png: bytes) -> str:
        return base64.b64encode(converted(png, form, quality)).decode()

    def chunks(index: int, piece: Piece) -> list[bytes]:
        match piece:
            case Drawing(preview=bytes(png)):
                shown[index] += 1
                event = responses.ImageEvent(
                    type="image_generation.partial_image",
                    b64_json=encoded(png),
                    created_at=label.created,
                    size=f"{size}x{size}",
                    output_format=form,
                    partial_image_index=shown[index] - 1,
                )
                return [responses.image_event(event)]
            case ImagePiece(png):
                held[index] = png
            case Finished(_, count):
                counted = usage(started[index].prompt, count)
                event = responses.ImageEvent(
                    type="image_generation.completed",
                    b64_json=encoded(held[index]),
                    created_at=label.created,
                    size=f"{size}x{size}",
                    output_format=form,
                    usage=responses.ImageUsage(
                        input_tokens=counted.prompt_tokens,
                        output_tokens=counted.completion_tokens,
                        total_tokens=counted.total_tokens,
                        input_tokens_details=counted.prompt_tokens_details,
                    ),
                )
                return [responses.image_event(event)]
            case Declined(message):
                error = wire.WireError(message, code="content_policy_violation", param="prompt")
                return [responses.error_event(error.body)]
        return []

    held: dict[int, bytes] = {}
    return chunks, lambda counts: []
