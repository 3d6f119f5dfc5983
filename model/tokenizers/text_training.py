"""Training of the sentencepiece BPE whose vocabulary also holds the special and image tokens (paper section 2.2)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from calumma.model.tokenizers.text import SentencepieceTokenizer
from calumma.model.vocabulary import Vocabulary

BEGIN_IMAGE, END_IMAGE, END_TURN = "<image>", "</image>", "<end_turn>"


MAX_LINE = 4096  # characters; sentencepiece skips longer training lines


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
        tokenizer = SentencepieceTokenizer(prefix.with_suffix(".model").read_bytes())
    processor = tokenizer.processor
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
