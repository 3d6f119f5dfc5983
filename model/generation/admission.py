"""What a request may use at most, known before it starts; and what is wrong with those that can never be answered."""

from __future__ import annotations

from dataclasses import dataclass

from calumma.model.config import ModelConfig
from calumma.model.generation.cache.block_manager import BLOCK_SIZE
from calumma.model.generation.guidance import GuidanceWeights
from calumma.model.generation.request import PromptTooLong, Request, SamplingParams
from calumma.model.vocabulary import Vocabulary


def whole_images(tokens: list[int], vocabulary: Vocabulary, image_length: int) -> list[int]:
    """The images of a context, each from begin_image to end_image. Raises ValueError on one that is not whole."""
    found: list[int] = []
    position = 0
    while vocabulary.begin_image in tokens[position:]:
        start = tokens.index(vocabulary.begin_image, position)
        position = start + image_length + 2
        image = tokens[start:position]
        if len(image) < image_length + 2 or image[-1] != vocabulary.end_image:
            raise ValueError(
                f"the image at token {start} of the prompt is not whole: begin_image, {image_length} codes, end_image"
            )
        found += image
    return found


@dataclass(frozen=True)
class RequestLimits:
    """Answer tokens and images that a request may have, and positions of each sequence it may hold at once."""

    tokens: int
    images: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, request: Request, vocabulary: Vocabulary, image_length: int, context: int) -> RequestLimits:
        """Raises PromptTooLong, and ValueError on a prompt that is no prompt or a prefix that is no answer's."""
        prompt, params = request.tokens, request.params
        if not prompt:
            raise ValueError("the prompt has no tokens; it needs at least bos")
        if min(prompt) < 0 or max(prompt) >= vocabulary.size:
            raise ValueError(f"the prompt's ids must lie in 0..{vocabulary.size - 1}: {min(prompt)}..{max(prompt)}")
        before = len(whole_images(prompt, vocabulary, image_length)) // (image_length + 2)
        image_room = image_length + 2
        if params.mode == "image":
            room, what = image_room, f"the {image_room} of an image"
        elif params.max_tokens == 0:
            room, what = 0, "none"
        else:
            room = max(1, len(params.prefix))
            what = f"the {room} of a begun answer" if params.prefix else "1 for an answer"
        if len(prompt) + room > context:
            raise PromptTooLong(
                f"the prompt's {len(prompt)} tokens and {what} are more than the context of {context} tokens"
            )
        if params.mode == "image" and params.max_tokens > 0:
            tokens, images = image_room, 1
        else:
            tokens = min(params.max_tokens, context - len(prompt))
            images = min(params.max_images, tokens // image_room) if params.mode == "interleaved" else 0
        _check_ids(params, vocabulary)
        _check_prefix(params, vocabulary, image_length, tokens, images)
        # The last image is drawn beside the longest contexts: all of the answer, all images before it, none.
        branches = [GuidanceWeights.of(params, before > 0)] if images else []
        branches += [GuidanceWeights.of(params, True)] if images > 1 else []
        lengths = [len(prompt) + tokens]
        if any(weights.images for weights in branches):
            lengths.append(1 + image_room * (before + images))
        if any(weights.nothing for weights in branches):
            lengths.append(1 + image_room)
        return cls(tokens, images, tuple(lengths))

    def blocks(self, size: int) -> int:
        """Blocks of `size` positions that hold all sequences at their longest."""
        return sum(-(-length // size) for length in self.lengths)


def check_sizes(config: ModelConfig, vocabulary: Vocabulary, **sizes: int) -> None:
    """Whether an engine of a model can be as large as its options say. Raises ValueError."""
    if not 2 <= sizes["context"] <= config.context:
        raise ValueError(f"context {sizes['context']} must lie in 2..{config.context}, the model's")
    if config.vocabulary_size < vocabulary.size:
        raise ValueError(f"the model knows {config.vocabulary_size} ids, its vocabulary has {vocabulary.size}")
    for name, value in sizes.items():
        if value < (max(1, sizes["block_size"]) if name == "cache_tokens" else 1):
            raise ValueError(f"{name} {value} must be 1 or more, and cache_tokens a block at least")


def positions_of(
    requests: list[Request], together: int, vocabulary: Vocabulary, image_length: int, context: int
) -> int:
    """Positions of a cache, in blocks of BLOCK_SIZE, in which no `together` of some requests lack room; those that can
    never be answered count nothing."""
    needed = []
    for request in requests:
        try:
            lengths = RequestLimits.of(request, vocabulary, image_length, context).lengths
        except ValueError:  # it will be refused
            continue
        needed.append((1 + sum(-(-length // BLOCK_SIZE) for length in lengths)) * BLOCK_SIZE)  # one for first tokens
    return sum(sorted(needed, reverse=True)[:together])


def _check_ids(params: SamplingParams, vocabulary: Vocabulary) -> None:
    """Whether the ids that the parameters name are such as could have an effect."""
    named = {
        "allowed_ids": params.allowed_ids or (),
        "bad_words": [token for word in params.bad_words for token in word],
        "logit_bias": [token for token, _ in params.logit_bias],
    }
    for name, ids in named.items():
        for token in ids:
            if not 0 <= token < vocabulary.size:
                raise ValueError(f"{name} names id {token}: ids lie in 0..{vocabulary.size - 1}")
            if token in vocabulary.code_of:
                raise ValueError(f"{name} names id {token}, an image code: it holds for text")
    if params.min_tokens > params.max_tokens:
        raise ValueError(f"min_tokens {params.min_tokens} must be {params.max_tokens} or less, max_tokens")


def _check_prefix(params: SamplingParams, vocabulary: Vocabulary, image_length: int, tokens: int, images: int) -> None:
    """Whether the engine could have drawn the prefix."""
    prefix = params.prefix
    if not prefix:
        return
    if len(prefix) > tokens:
        raise ValueError(f"the prefix has {len(prefix)} tokens: the answer may have {tokens}")
    text, codes = set(vocabulary.text_ids), vocabulary.code_of
    position = 0
    while position < len(prefix):
        token = prefix[position]
        where = f"token {position} of the prefix, id {token},"
        if token == vocabulary.begin_image:
            images -= 1
            if images < 0 or tokens - position < image_length + 2:
                raise ValueError(
                    f"{where} begins an image that mode {params.mode!r} or the answer's room does not allow"
                )
            image = prefix[position + 1 : position + image_length + 2]
            if any(code not in codes for code in image[:image_length]) or image[image_length:] not in (
                (),
                (vocabulary.end_image,),
            ):
                raise ValueError(f"{where} begins an image that is not: {image_length} codes, then end_image")
            position += image_length + 2
        elif token in text and params.mode != "image":
            position += 1
        else:
            raise ValueError(f"{where} cannot stand in an answer of mode {params.mode!r}: text, images, an image begun")
