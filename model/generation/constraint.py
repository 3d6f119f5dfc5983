"""What a grammar must be to the engine: ids in, a mask of ids out. `calumma.model.tokenizers.grammar` builds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

ConstraintKind = Literal["json", "json_schema", "regex", "choice", "grammar", "tools"]


@dataclass(frozen=True)
class Constraint:
    """A grammar of texts, as it is asked for.

    kind and value: "json": any JSON object, no value; "json_schema": a JSON schema; "regex": a regular expression that
    the whole text matches; "choice": a JSON list of texts, one of which the text is; "grammar": a context-free grammar
    in Lark's or GBNF's notation; "tools": calls of tools, with or without a text before them (tool_calls.tools_value).
    """

    kind: ConstraintKind
    value: str = ""


class GrammarTooLarge(ValueError):
    """Following a grammar any further costs more than one may."""


class TokenConstraint(Protocol):
    """A grammar at one place of one text: a function of its Constraint and of the ids it has advanced by, the same in
    every process."""

    @property
    def may_begin_image(self) -> bool:
        """Whether the text may be interrupted by an image here."""
        ...

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        """Set bit `id % 32` of word `id // 32` for every id that may come next and clear all others; the ids that end
        an answer (eos, end_turn) may come where the text is complete. Raises ValueError where it cannot tell, which is
        GrammarTooLarge where the grammar is at fault."""
        ...

    def advance(self, token: int) -> None:
        """Take an id of the text. Raises ValueError on one that may not come here, GrammarTooLarge."""
        ...

    def copy(self) -> TokenConstraint:
        """Another one at the same place."""
        ...


# Gives a constraint at the beginning of a text. Raises ValueError on a grammar that is none, or too large.
ConstraintCompiler = Callable[[Constraint], TokenConstraint]
