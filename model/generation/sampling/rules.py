"""Which ids may come next in a request's text, where it asks for less than its phase allows.

Masks are made on the host, of one bit an id, while the device computes the pass; the sampler applies those of all rows
at once. What may come is a function of the request and its answer so far, so it is the same after a preemption, under
a prefix and in every process of a group.

Shape suffixes: W words of 32 bits, an id a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calumma.model.generation.constraint import GrammarTooLarge, TokenConstraint
from calumma.model.generation.request import Failure, SamplingParams
from calumma.model.vocabulary import Vocabulary

Mask = NDArray[np.uint32]


class NothingMayFollow(ValueError):
    """A request's own parameters forbid every id."""


class TextRules:
    """constraint: at the beginning of the text; it is advanced along."""

    def __init__(self, params: SamplingParams, vocabulary: Vocabulary, constraint: TokenConstraint | None) -> None:
        self.params, self.constraint = params, constraint
        self._begin_image = vocabulary.begin_image
        self._ends = (vocabulary.eos, vocabulary.end_turn)
        self._stops = (*self._ends, *(token for token in params.stop_ids if 0 <= token < vocabulary.size))
        self._phrases: dict[int, list[tuple[int, ...]]] = {}  # bad words of several ids, by the last but one
        for word in params.bad_words:
            if len(word) > 1:
                self._phrases.setdefault(word[-2], []).append(word)
        may_V = vocabulary.text_mask.numpy().copy()
        may_V[[*self._ends, vocabulary.begin_image]] = True
        if params.allowed_ids is not None:
            may_V &= vocabulary.mask(list(params.allowed_ids)).numpy()
        self._fixed = packed(may_V)
        clear(self._fixed, [word[0] for word in params.bad_words if len(word) == 1])
        self._everywhere = constraint is not None or params.allowed_ids is not None or bool(params.bad_words)

    @classmethod
    def of(
        cls, params: SamplingParams, vocabulary: Vocabulary, constraint: TokenConstraint | None = None
    ) -> TextRules | None:
        """None where a request asks for nothing of the kind."""
        asks = (constraint, params.allowed_ids, params.bad_words or None, params.min_tokens or None)
        if all(each is None for each in asks) and not params.ignore_eos:
            return None
        return cls(params, vocabulary, constraint)

    def holds(self, answered: int) -> bool:
        """Whether there is anything to forbid the id after so many."""
        return self._everywhere or self.params.ignore_eos or answered < self.params.min_tokens

    def advance(self, token: int) -> None:
        """Take an id of the answer's text. Raises ValueError on one that the grammar does not allow."""
        if self.constraint is not None:
            self.constraint.advance(token)

    def mask(self, answer: Sequence[int], may_begin_image: bool) -> Mask:
        """The ids that may follow the answer so far. Raises NothingMayFollow, and what the grammar raises."""
        mask_W = self._fixed.copy()
        if self.constraint is not None:
            self.constraint.fill_mask(mask_W.view(np.int32))
            if self.constraint.may_begin_image:
                allow(mask_W, self._begin_image)
            else:
                clear(mask_W, [self._begin_image])
            mask_W &= self._fixed
        begun = self._phrases.get(answer[-1], ()) if answer else ()
        clear(mask_W, [word[-1] for word in begun if _ends_with(answer, word[:-1])])
        if not may_begin_image:
            clear(mask_W, [self._begin_image])
        held_back = self._held_back(len(answer))
        if held_back:
            going_on = mask_W.copy()
            clear(going_on, held_back)
            if self.constraint is None or going_on.any():
                mask_W = going_on
        if not mask_W.any():
            raise NothingMayFollow("allowed_ids, bad_words, min_tokens and the grammar together leave no id to go on")
        return mask_W

    def _held_back(self, answered: int) -> Sequence[int]:
        """Ids that would end the answer and may not yet."""
        if answered < self.params.min_tokens:
            return self._stops
        return self._ends if self.params.ignore_eos else ()


def masks_of(
    rows: Sequence[tuple[TextRules | None, Sequence[int], bool]], size: int
) -> tuple[Tensor, dict[int, Failure]]:
    """Int32Tensor [R, W] of rows (rules, answer so far, whether an image may begin), of a vocabulary of `size`; a row
    without rules allows all. And the rows whose mask cannot be made."""
    masks_RW = np.full((len(rows), words(size)), 0xFFFFFFFF, dtype=np.uint32)
    failures: dict[int, Failure] = {}
    for row, (rules, answer, may_begin_image) in enumerate(rows):
        if rules is None or not rules.holds(len(answer)):
            continue
        try:
            masks_RW[row] = rules.mask(answer, may_begin_image)
        except (NothingMayFollow, GrammarTooLarge) as error:
            failures[row] = Failure("no token", str(error))
        except Exception as error:  # of a grammar: it costs its own request
            failures[row] = Failure("error", f"{type(error).__name__}: {error}")
    return torch.from_numpy(masks_RW.view(np.int32)), failures


def words(size: int) -> int:
    """W for a vocabulary of `size`."""
    return -(-size // 32)


def packed(allowed_V: NDArray[np.bool_]) -> Mask:
    """UInt32 [W] with the bits of the ids that are true."""
    bits = np.zeros(words(len(allowed_V)) * 32, dtype=np.bool_)
    bits[: len(allowed_V)] = allowed_V
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def clear(mask_W: Mask, ids: Iterable[int]) -> None:
    """Clear the bits of these ids."""
    for token in ids:
        mask_W[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)


def allow(mask_W: Mask, token: int) -> None:
    """Set the bit of this id."""
    mask_W[token >> 5] |= np.uint32(1 << (token & 31))


def _ends_with(answer: Sequence[int], tail: Sequence[int]) -> bool:
    return len(answer) >= len(tail) and tuple(answer[len(answer) - len(tail) :]) == tuple(tail)
