"""Documents to token ids and back: the sequence format that training, serving and evaluation share.

    page or pair    <bos> text and images in their order <eos>
    conversation    <bos> user's segments <end_turn> assistant's segments <end_turn> ... <eos>
    image           <begin image> one id for each code <end image>

In a conversation only the assistant's tokens, and the <end_turn> that closes them, are trained (paper section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Role, Segment, Text
from calumma.model.image_tokenizer import ImageTokenizer, preprocess, to_image
from calumma.model.text_tokenizer import TextTokenizer
from calumma.model.vocabulary import Vocabulary


class Encoded(NamedTuple):
    """Token ids of a document, and for each whether the loss is taken on it."""

    ids: list[int]
    trained: list[bool]


class DocumentEncoder:
    def __init__(self, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer) -> None:
        codes, ids = image_tokenizer.config.codebook_size, len(vocabulary.image_codes)
        if codes != ids:
            raise ValueError(f"the image tokenizer has {codes} codes, the vocabulary {ids} image ids; they must agree")
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer

    @property
    def image_length(self) -> int:
        """Codes in an image, without its begin and end ids."""
        return self.image_tokenizer.config.codes_per_image

    def encode(self, document: Document, complete: bool = True) -> Encoded:
        """One document; `complete=False` omits the final eos, so that the model can go on. Raises UnreadableImage."""
        return self.encode_many([document], complete)[0]

    def encode_many(self, documents: Sequence[Document], complete: bool = True, batch: int = 64) -> list[Encoded]:
        """As `encode`, with the images of all documents coded in batches of `batch`."""
        images = [image for document in documents for image in document.images]
        codes = iter(self._codes(images, batch))
        return [self._assemble(document, codes, complete) for document in documents]

    def _codes(self, images: list[Image], batch: int) -> list[list[int]]:
        resolution = self.image_tokenizer.config.resolution
        device = self.image_tokenizer.codebook.weight.device
        codes: list[list[int]] = []
        for begin in range(0, len(images), batch):
            chunk = images[begin : begin + batch]
            # A prompt's image keeps all of its content, any other is filled from edge to edge (paper section 3.1).
            pixels = [preprocess(i.open(), resolution, "pad" if i.role == "user" else "crop") for i in chunk]
            codes += self.image_tokenizer.encode(torch.stack(pixels).to(device)).tolist()
        return codes

    def _assemble(self, document: Document, codes: Iterator[list[int]], complete: bool) -> Encoded:
        vocabulary = self.vocabulary
        conversation = document.is_conversation
        ids, trained = [vocabulary.bos], [not conversation]
        for turn in document.turns():
            train = not conversation or turn.role == "assistant"
            begin = len(ids)
            for segment in turn.segments:
                if isinstance(segment, Text):
                    ids += self.text_tokenizer.encode(segment.text)
                else:
                    image = [vocabulary.image_codes[code] for code in next(codes)]
                    ids += [vocabulary.begin_image, *image, vocabulary.end_image]
            if turn.role is not None:
                ids.append(vocabulary.end_turn)
            trained += [train] * (len(ids) - begin)
        if complete:
            ids.append(vocabulary.eos)
            trained.append(not conversation)
        return Encoded(ids, trained)

    def decode(self, ids: Sequence[int], role: Role | None = None) -> Document:
        """Ids, as sampled or as encoded, to a document; special ids vanish, an incomplete image is dropped.

        Where the ids hold an end of turn, roles alternate from `user` on, as `encode` writes them; `role` is given to
        all segments when they hold none.
        """
        vocabulary, code_of = self.vocabulary, self.vocabulary.code_of
        roles: list[Role | None] = ["user", "assistant"] if vocabulary.end_turn in ids[:-1] else [role, role]
        segments: list[Segment] = []
        text: list[int] = []
        codes: list[int] | None = None
        turn = 0

        def flush() -> None:
            if text and (decoded := self.text_tokenizer.decode(text)):
                segments.append(Text(decoded, roles[turn % 2]))
            text.clear()

        for token in ids:
            if token == vocabulary.begin_image:
                flush()
                codes = []
            elif codes is not None and token in code_of:
                codes.append(code_of[token])
            elif codes is not None:
                if token == vocabulary.end_image and len(codes) == self.image_length:
                    segments.append(Image(self.decode_image(codes), role=roles[turn % 2]))
                codes = None
            if token == vocabulary.end_turn:
                flush()
                turn += 1
            elif codes is None and token != vocabulary.end_image:
                text.append(token)
        flush()
        return Document(tuple(segments))

    def decode_image(self, codes: Sequence[int]) -> PILImage.Image:
        """The picture of one image's codes."""
        device = self.image_tokenizer.codebook.weight.device
        return to_image(self.image_tokenizer.decode(torch.tensor([list(codes)], device=device))[0])
