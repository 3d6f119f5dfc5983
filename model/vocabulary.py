"""The one id space of text pieces, image codes and special tokens, as data in `vocabulary.json`.

An image *code* indexes the codebook; a *token id* indexes this vocabulary. Ours puts specials first, then image
codes, then text; the public Chameleon release has its own order (paper section 2.1). Both fit.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, model_validator

FILE = "vocabulary.json"


class ChatFormat(BaseModel):
    """How a text model that was extended writes conversations: its chat template (tokenizers/chat.py), and the names
    of special ids that the template is given (`bos_token`, ...)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str
    variables: dict[str, str] = {}


class Vocabulary(BaseModel):
    """Which id is what. `image_codes[c]` is the token id of codebook entry c; ids named nowhere are text.

    `bos` may be `eos`: some text models begin and end a document with one id. `chat`: where conversations have another
    format than encoding.py's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    pad: int
    bos: int
    eos: int
    unknown: int
    begin_image: int
    end_image: int
    end_turn: int
    image_codes: list[int]
    reserved: list[int] = []
    chat: ChatFormat | None = None

    @model_validator(mode="after")
    def _disjoint(self) -> Vocabulary:
        ids = [token for name, token in self._named.items() if name != "bos" or token != self.eos]
        ids += [*self.image_codes, *self.reserved]
        if len(set(ids)) != len(ids):
            raise ValueError("the same id is given twice among special ids and image codes")
        if min(ids) < 0 or max(ids) >= self.size:
            raise ValueError(f"ids must lie in 0..{self.size - 1}, found {min(ids)}..{max(ids)}")
        return self

    @property
    def _named(self) -> dict[str, int]:
        names = ("pad", "bos", "eos", "unknown", "begin_image", "end_image", "end_turn")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def special_ids(self) -> list[int]:
        return sorted({*self._named.values(), *self.reserved})

    @cached_property
    def image_ids(self) -> list[int]:
        return sorted(self.image_codes)

    @cached_property
    def text_ids(self) -> list[int]:
        taken = {*self.special_ids, *self.image_codes}
        return [i for i in range(self.size) if i not in taken]

    @cached_property
    def text_mask(self) -> torch.Tensor:
        """BoolTensor [V], true at `text_ids`."""
        return self.mask(self.text_ids)

    @cached_property
    def code_of(self) -> dict[int, int]:
        """Token id -> image code."""
        return {token: code for code, token in enumerate(self.image_codes)}

    def mask(self, ids: list[int]) -> torch.Tensor:
        """BoolTensor [V], true at `ids`."""
        mask_V = torch.zeros(self.size, dtype=torch.bool)
        mask_V[torch.tensor(ids, dtype=torch.long)] = True
        return mask_V

    def save(self, directory: str | Path) -> None:
        (Path(directory) / FILE).write_text(
            json.dumps(self.model_dump(exclude_none=True), separators=(",", ":")) + "\n"
        )

    @classmethod
    def read(cls, directory: str | Path) -> Vocabulary:
        return cls.model_validate_json((Path(directory) / FILE).read_text())
