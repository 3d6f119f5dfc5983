"""Sample answers as pictures: what a model in training says and draws, one PNG a prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from calumma.model.document import Document, Image, Text
from calumma.model.vocabulary import Vocabulary
from calumma.platform.training.specification import TrainSpecification
from calumma.platform.training.trainable.parameters import plain_weights
from calumma.platform.training.trainable.quantized import dequantized

if TYPE_CHECKING:
    from calumma.model import MixedModalModel
    from calumma.model.generation.passes.decoder import Decoder

_WIDTH, _MARGIN, _FONT = 480, 12, 16  # pixels
_IMAGE_SIDE = 192  # pixels: small images are enlarged to this
_MOST_TOKENS = 256  # at most, a sample


class TrainedWeights:
    """The weights of an engine as those of a plain Transformer, layer by layer: whole for the time of a context, on
    every worker alike, whatever part of them each holds."""

    def __init__(self, engine: Any, spec: TrainSpecification, vocabulary: Vocabulary) -> None:
        self._engine, self._spec, self._vocabulary = engine, spec, vocabulary
        self._named = dict(engine.module.named_parameters())

    @contextmanager
    def __call__(self, prefix: str) -> Iterator[Mapping[str, Tensor]]:
        import deepspeed

        own = {name: parameter for name, parameter in self._named.items() if name.startswith(prefix)}
        cut = [parameter for parameter in own.values() if hasattr(parameter, "ds_id")]
        with deepspeed.zero.GatheredParameters(cut, enabled=bool(cut)):
            whole = {name: parameter.detach() for name, parameter in own.items()}
            whole |= dequantized(self._engine.module, prefix)
            yield plain_weights(whole, self._spec, self._vocabulary)


def sample_answers(
    model: MixedModalModel,
    prompts: list[str],
    conversation: bool,
    seed: int,
    decoder: Decoder | None = None,
    beat: Callable[[], object] = lambda: None,
) -> list[Document]:
    """Answers to prompts: each a user's turn when the model is tuned on conversations, else the start of a page. The
    weights are the model's, or those of a `decoder`: then every worker calls it."""
    from calumma.model import generate
    from calumma.model.generation import SamplingParams

    documents = [Document((Text(prompt, "user" if conversation else None),)) for prompt in prompts]
    room = model.config.context - max(len(model.encode(document, complete=False)) for document in documents)
    params = SamplingParams(max_tokens=max(1, min(_MOST_TOKENS, room)), mode="interleaved", seed=seed)
    return generate(model, documents, params, max_sequences=3 * len(documents), decoder=decoder, beat=beat)


def render_answer(prompt: str, answer: Document) -> PILImage.Image:
    """A prompt (grey) and its answer below each other: RGB, 480 pixels wide, as high as it needs."""
    font = ImageFont.load_default(_FONT)
    canvas = PILImage.new("RGB", (_WIDTH, 4 * _MARGIN + _heights(prompt, answer, font)), "white")
    draw = ImageDraw.Draw(canvas)
    y = _write(draw, prompt, _MARGIN, font, "#777777") + _MARGIN
    for segment in answer.segments:
        if isinstance(segment, Text):
            y = _write(draw, segment.text, y, font, "black")
        else:
            picture = _enlarged(segment)
            canvas.paste(picture, (_MARGIN, y))
            y += picture.height
        y += _MARGIN // 2
    return canvas


def _heights(prompt: str, answer: Document, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    draw = ImageDraw.Draw(PILImage.new("RGB", (1, 1)))
    total = _write(draw, prompt, 0, font, "black")
    for segment in answer.segments:
        total += _MARGIN // 2
        total += (
            _write(draw, segment.text, 0, font, "black") if isinstance(segment, Text) else _enlarged(segment).height
        )
    return total


def _write(
    draw: ImageDraw.ImageDraw, text: str, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, color: str
) -> int:
    """Draw wrapped text; the y below it."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 56) or [""]]
    for line in lines:
        draw.text((_MARGIN, y), line, fill=color, font=font)
        y += _FONT + 4
    return y


def _enlarged(image: Image) -> PILImage.Image:
    picture = image.open()
    scale = _IMAGE_SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, PILImage.Resampling.NEAREST if scale > 1 else PILImage.Resampling.BICUBIC)
