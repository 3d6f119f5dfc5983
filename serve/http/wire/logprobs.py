"""Log-probabilities as chat and completions each write them."""

from __future__ import annotations

from calumma.serve.http.wire.responses import Alternative, ChatLogprobs, ChatToken, TextLogprobs
from calumma.serve.protocol import Token


def spelled(token: int, surface: bytes) -> str:
    """A token as a string: its text; part of a character as OpenAI writes it; one without a text by its number."""
    if not surface:
        return f"token_id:{token}"
    try:
        return surface.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in surface)


def chat_logprobs(tokens: list[Token]) -> ChatLogprobs:
    def alternative(token: int, surface: bytes, logprob: float) -> Alternative:
        return Alternative(token=spelled(token, surface), bytes=list(surface), logprob=logprob)

    return ChatLogprobs(
        content=[
            ChatToken(
                **alternative(token.id, token.surface, token.logprob or 0.0).model_dump(),
                top_logprobs=[alternative(*one) for one in token.top],
            )
            for token in tokens
        ]
    )


def text_logprobs(tokens: list[Token], offset: int = 0) -> TextLogprobs:
    """`offset`: characters before the text that the tokens' positions count from."""
    return TextLogprobs(
        tokens=[spelled(token.id, token.surface) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_named(token) for token in tokens],
        text_offset=[offset + token.begin for token in tokens],
    )


def _named(token: Token) -> dict[str, float] | None:
    """Alternatives by their strings, the token itself among them; of two with one string the likelier."""
    if token.logprob is None:
        return None
    named: dict[str, float] = {}
    for identity, surface, logprob in (*token.top, (token.id, token.surface, token.logprob)):
        name = spelled(identity, surface)
        named[name] = max(logprob, named.get(name, logprob))
    return named
