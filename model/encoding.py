"""Documents to token ids and back: the sequence format that training, serving and evaluation share.

    page or pair    <bos> text and images in their order <eos>
    conversation    <bos> user's segments <end_turn> assistant's segments <end_turn> ... <eos>
    image           <begin image> one id for each code <end image>

A text model that was extended keeps its own format of conversations, its chat template (tokenizers/chat.py).

In a conversation only the assistant's tokens, and the <end_turn> that closes them, are trained (paper section 3.1),
without the segments that are not `trained`, and what closes a turn that ends in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Role, Segment, Text, Turn
from calumma.model.images import preprocess, to_image
from calumma.model.tokenizers.chat import SPECIAL, ChatTemplate, Run, Special
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import HuggingFaceTokenizer, TextTokenizer
from calumma.model.vocabulary import Vocabulary

PICTURE = "\ue003"  # an image, in a conversation as text


class EncodedDocument(NamedTuple):
    """Token ids of a document, and for each whether the loss is taken on it."""

    ids: list[int]
    trained: list[bool]


class EncodedArrays(NamedTuple):
    """The same as arrays, for whoever encodes very many."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


class DocumentEncoder:
    """`encode` and `encode_many` are for a few documents. The tokenizing job, which works on texts and images at the
    same time, calls the steps they are made of: `text_ids`, `pixels`, `code`, `assemble`."""

    def __init__(self, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, image_tokenizer: ImageTokenizer) -> None:
        codes, ids = image_tokenizer.config.codebook_size, len(vocabulary.image_codes)
        if codes != ids:
            raise ValueError(f"the image tokenizer has {codes} codes, the vocabulary {ids} image ids; they must agree")
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self._chat = ChatTemplate.of(vocabulary.chat, text_tokenizer)
        self._id_of_code = np.array(vocabulary.image_codes, dtype=np.int32)
        self._special = {token: np.array([token], dtype=np.int32) for token in vocabulary.special_ids}

    @property
    def image_length(self) -> int:
        """Codes in an image, without its begin and end ids."""
        return self.image_tokenizer.config.codes_per_image

    def encode(self, document: Document, complete: bool = True) -> EncodedDocument:
        """One document; `complete=False` omits the final eos, so that the model can go on. Raises UnreadableImage."""
        return self.encode_many([document], complete)[0]

    def encode_many(
        self, documents: Sequence[Document], complete: bool = True, batch: int = 64
    ) -> list[EncodedDocument]:
        """As `encode`, with the images of all documents coded in batches of `batch`."""
        images = [image for document in documents for image in document.images]
        coded = (
            ids
            for begin in range(0, len(images), batch)
            for ids in self.code([self.pixels(image) for image in images[begin : begin + batch]])
        )
        tokens = self.assemble(documents, self.text_ids(documents, complete), coded, complete)
        return [EncodedDocument(each.ids.tolist(), each.trained.tolist()) for each in tokens]

    def text_ids(self, documents: Sequence[Document], complete: bool = True) -> list[NDArray[np.int32]]:
        """The token ids of every text segment, in order; of a conversation by a chat template, of its runs of text."""
        if self._chat is not None and any(document.is_conversation for document in documents):
            return [ids for document in documents for ids in self._own_text_ids(document, complete)]
        texts = [s.text for document in documents for s in document.segments if isinstance(s, Text)]
        return self.text_tokenizer.encode_many(texts)

    def _own_text_ids(self, document: Document, complete: bool) -> list[NDArray[np.int32]]:
        if self._chat is None or not document.is_conversation:
            return self.text_tokenizer.encode_many([s.text for s in document.segments if isinstance(s, Text)])
        tokenizer = self.text_tokenizer
        assert isinstance(tokenizer, HuggingFaceTokenizer)  # ChatTemplate.of has checked it
        runs = [piece for piece in self._chat.pieces(document, complete) if isinstance(piece, Run)]
        return [
            np.array(tokenizer.encode_run(run.text) if run.begins else tokenizer.encode_further(run.text), np.int32)
            for run in runs
        ]

    def pixels(self, image: Image) -> torch.Tensor:
        """What `code` takes of an image: FloatTensor [3, resolution, resolution]. Raises UnreadableImage."""
        # A prompt's image keeps all of its content, any other is filled from edge to edge (paper section 3.1).
        resolution = self.image_tokenizer.config.resolution
        return preprocess(image.open(), resolution, "pad" if image.role == "user" else "crop")

    def code(self, pixels: Sequence[torch.Tensor]) -> NDArray[np.int32]:
        """The token ids [B, codes] of B images, without begin and end, coded in one batch on the tokenizer's device."""
        device = self.image_tokenizer.codebook.weight.device
        codes_BN = self.image_tokenizer.encode(torch.stack(list(pixels)).to(device))
        return self._id_of_code[codes_BN.cpu().numpy()]

    def assemble(
        self,
        documents: Sequence[Document],
        texts: Sequence[NDArray[np.int32]],
        images: Iterator[NDArray[np.int32]],
        complete: bool = True,
    ) -> list[EncodedArrays]:
        """Each document's tokens, from the ids of all their texts and images in order. They share one array: an array
        for every short document would take longer than its text."""
        if not documents:
            return []
        v, text = self.vocabulary, iter(texts)
        special = self._special
        parts: list[NDArray[np.int32]] = []
        begins, size = [0], 0
        untrained: list[tuple[int, int]] = []
        bos, eos = special[v.bos], special[v.eos]
        for document in documents:
            only = document.segments[0] if len(document.segments) == 1 else None
            if isinstance(only, Text) and only.role is None and only.trained:  # most, and many of them short
                parts += (bos, ids := next(text), eos) if complete else (bos, ids := next(text))
                size += len(ids) + 1 + complete
                begins.append(size)
                continue
            conversation = document.is_conversation
            if conversation and self._chat is not None:
                for piece in self._chat.pieces(document, complete):
                    first = size
                    if isinstance(piece, Run):
                        found = [next(text)]
                    elif isinstance(piece, Special):
                        found = [special[piece.token]]
                    else:
                        found = [special[v.begin_image], next(images), special[v.end_image]]
                    parts += found
                    size += sum(map(len, found))
                    if not piece.trained:
                        untrained.append((first, size))
                if complete and parts[-1] is not eos:
                    parts.append(eos)
                    size += 1
                    untrained.append((size - 1, size))
                begins.append(size)
                continue
            parts.append(bos)
            size += 1
            if conversation:
                untrained.append((size - 1, size))
            for turn in document.turns() if conversation else (Turn(None, document.segments),):
                begin = size
                for segment in turn.segments:
                    first = size
                    if isinstance(segment, Text):
                        parts.append(ids := next(text))
                        size += len(ids)
                    else:
                        ids = next(images)
                        parts += (special[v.begin_image], ids, special[v.end_image])
                        size += len(ids) + 2
                    if not segment.trained:
                        untrained.append((first, size))
                if turn.role is not None:
                    parts.append(special[v.end_turn])
                    size += 1
                if conversation and turn.role != "assistant":
                    untrained.append((begin, size))
                elif turn.role is not None and not turn.segments[-1].trained:
                    untrained.append((size - 1, size))
            if complete:
                parts.append(eos)
                size += 1
                if conversation:
                    untrained.append((size - 1, size))
            begins.append(size)
        ids = np.concatenate(parts)
        trained = np.ones(size, np.bool_)
        for begin, end in untrained:
            trained[begin:end] = False
        return [EncodedArrays(ids[begin:end], trained[begin:end]) for begin, end in pairwise(begins)]

    def decode(self, ids: Sequence[int], role: Role | None = None) -> Document:
        """Ids, as sampled or as encoded, to a document; special ids vanish, an incomplete image is dropped.

        Where the ids hold an end of turn, roles alternate from `user` on, as `encode` writes them; `role` is given to
        all segments when they hold none.
        """
        if self._chat is not None and (conversation := self._decoded_chat(self._chat, ids)) is not None:
            return conversation
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

    def _decoded_chat(self, chat: ChatTemplate, ids: Sequence[int]) -> Document | None:
        """A conversation that a chat template has written; None where it has not."""
        v, code_of = self.vocabulary, self.vocabulary.code_of
        special = set(v.special_ids)
        written: list[str] = []
        images: list[list[int]] = []
        text: list[int] = []
        codes: list[int] | None = None
        for token in [*ids, v.eos]:
            if token in code_of:
                if codes is not None:
                    codes.append(code_of[token])
                continue
            if codes is not None and token == v.end_image and len(codes) == self.image_length:
                written.append(PICTURE)
                images.append(codes)
            codes = None
            if token not in special:
                text.append(token)
                continue
            written.append(self.text_tokenizer.decode(text))
            text.clear()
            if token == v.begin_image:
                codes = []
            elif token != v.end_image:
                written.append(SPECIAL.format(token))
        end = SPECIAL.format(v.eos)
        turns = chat.spoken("".join(written).removesuffix(end))
        if turns is None:
            return None
        pictures = iter(images)
        segments: list[Segment] = []
        for role, said in turns:
            for number, part in enumerate(said.split(PICTURE)):
                if number:
                    segments.append(Image(self.decode_image(next(pictures)), role=role))
                if part:
                    segments.append(Text(part, role))
        return Document(tuple(segments))

    def decode_image(self, codes: Sequence[int]) -> PILImage.Image:
        """The picture of one image's codes."""
        device = self.image_tokenizer.codebook.weight.device
        return to_image(self.image_tokenizer.decode(torch.tensor([list(codes)], device=device))[0])
