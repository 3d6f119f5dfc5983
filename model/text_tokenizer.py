"""Text tokenizer: sentencepiece BPE whose vocabulary also holds the special and image tokens (paper section 2.2).

These are control symbols of the BPE model: sentencepiece never produces them from text, so nothing that a user types
can become one. Any Unicode text survives encode and decode: unknown characters fall back to UTF-8 bytes.
"""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from calumma.model.vocabulary import Vocabulary

FILE = "text_tokenizer.model"
SPACE = "▁"  # sentencepiece's stand-in for a space; a real one in the text goes through its bytes
BEGIN_IMAGE, END_IMAGE, END_TURN = "<image>", "</image>", "<end_turn>"
MAX_LINE = 4096  # characters; sentencepiece skips longer training lines


class TextTokenizer:
    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model = model
        processor = self._processor
        self._bytes = {
            processor.piece_to_id(f"<0x{value:02X}>"): value
            for value in range(256)
            if processor.is_byte(processor.piece_to_id(f"<0x{value:02X}>"))
        }
        self._byte_id = {value: token for token, value in self._bytes.items()}

    @classmethod
    def read(cls, directory: str | Path) -> TextTokenizer:
        return cls((Path(directory) / FILE).read_bytes())

    def save(self, directory: str | Path) -> None:
        (Path(directory) / FILE).write_bytes(self._model)

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no bos, never a special or image id."""
        ids: list[int] = []
        for index, part in enumerate(text.split(SPACE)):
            if index:
                ids += [self._byte_id[value] for value in SPACE.encode()]
            ids += self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        """sentencepiece strips NUL and knows no lone surrogates: those go through bytes or are refused."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        if "\0" not in text:
            return self._processor.encode(text) if text else []
        ids: list[int] = []
        for index, part in enumerate(text.split("\0")):
            ids += ([self._byte_id[0]] if index else []) + (self._processor.encode(part) if part else [])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse of `encode`; special and image ids vanish, broken UTF-8 becomes U+FFFD."""
        stream = self.stream_decoder()
        return "".join([*(stream.push(i) for i in ids), stream.finish()])

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    def surface(self, token: int) -> bytes:
        """The UTF-8 bytes a token stands for; empty for special and image ids."""
        if token in self._bytes:
            return bytes([self._bytes[token]])
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return self._processor.id_to_piece(token).replace(SPACE, " ").encode()


class StreamDecoder:
    """Text of a token stream as it comes, held back while a UTF-8 character is incomplete."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.surface(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def train_text_tokenizer(
    texts: Iterable[str], directory: str | Path, vocabulary_size: int, image_codes: int, threads: int = 2
) -> Vocabulary:
    """Train BPE on `texts` and write `text_tokenizer.model` and `vocabulary.json` into `directory`.

    `vocabulary_size` counts everything: 4 + 3 special ids, `image_codes` image ids, 256 bytes and the merges. Digits
    are split, nothing is normalized. Raises ValueError when the texts do not support so large a vocabulary.
    """
    image_symbols = [f"<image:{code}>" for code in range(image_codes)]
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "bpe"
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(texts),
                model_prefix=str(prefix),
                model_type="bpe",
                vocab_size=vocabulary_size,
                control_symbols=[BEGIN_IMAGE, END_IMAGE, END_TURN, *image_symbols],
                bos_id=0,
                pad_id=1,
                eos_id=2,
                unk_id=3,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * MAX_LINE,
                num_threads=threads,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"no BPE vocabulary of {vocabulary_size} ids ({image_codes} of them image codes) from these texts: "
                f"{error}"
            ) from error
        tokenizer = TextTokenizer(prefix.with_suffix(".model").read_bytes())
    processor = tokenizer._processor
    vocabulary = Vocabulary(
        size=tokenizer.size,
        bos=0,
        pad=1,
        eos=2,
        unknown=3,
        begin_image=processor.piece_to_id(BEGIN_IMAGE),
        end_image=processor.piece_to_id(END_IMAGE),
        end_turn=processor.piece_to_id(END_TURN),
        image_codes=[processor.piece_to_id(symbol) for symbol in image_symbols],
    )
    tokenizer.save(directory)
    vocabulary.save(directory)
    return vocabulary


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Training sentences: lines, the long ones in pieces, without the characters sentencepiece refuses."""
    for text in texts:
        for line in text.replace("\0", "").splitlines(keepends=True):
            for begin in range(0, len(line), MAX_LINE):
                if piece := line[begin : begin + MAX_LINE]:
                    yield piece
