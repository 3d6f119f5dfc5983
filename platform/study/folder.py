"""A study as it stands in its folder: its specification, prompts, answers and items."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.shards.documents import from_parquet
from calumma.platform.specification import SpecificationError
from calumma.platform.study.create import STUDY
from calumma.platform.study.items import Item, make_items
from calumma.platform.study.prompts import Prompt
from calumma.platform.study.specification import StudySpecification
from calumma.platform.study.store.ratings import Ratings
from calumma.platform.study.store.tables import Database

DATABASE = "ratings.db"
KEPT = 256  # answers held in memory


class Study:
    """Answers are read when they are asked for. Raises SpecificationError, StorageError where there is no study."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")
        file = storage.join(self.folder, STUDY)
        if not storage.exists(file):
            raise SpecificationError(f"{folder} holds no study; `calumma study create SPECIFICATION` makes one")
        try:
            read = json.loads(storage.read_bytes(file))
            self.specification = StudySpecification.model_validate(read["specification"])
            listed, self._answers = read["prompts"], read["answers"]
        except (ValueError, KeyError, ValidationError) as error:
            raise SpecificationError(f"{file} is no study that this version can read: {error}") from error
        documents = self._documents("prompts.parquet")
        self.prompts = {
            about["id"]: Prompt(about["id"], about["category"], document)
            for about, document in zip(listed, documents, strict=True)
        }
        self.items = {item.id: item for item in self._made_items()}
        self.answer = lru_cache(KEPT)(self._answer)

    def _made_items(self) -> list[Item]:
        spec = self.specification
        about = [(prompt.id, prompt.category) for prompt in self.prompts.values()]
        made = make_items(about, spec.names, spec.kind, spec.seed, spec.annotators)
        return [item for item in made if all(item.prompt in self._answers[name] for name in item.systems)]

    def _answer(self, system: str, prompt: str) -> Document:
        """The system's turn alone."""
        (whole,) = self._documents(self._answers[system][prompt])
        return Document(whole.segments[len(self.prompts[prompt].conversation.segments) :])

    def _documents(self, name: str) -> list[Document]:
        file = storage.join(self.folder, name)
        return from_parquet(storage.read_bytes(file), file)

    @property
    def default_database(self) -> str:
        """A file in the study's folder. Raises SpecificationError where that is not on this machine."""
        if storage.is_remote(self.folder):
            raise SpecificationError(
                f"{self.folder} cannot hold a database; name one: --database postgresql://user@host/name, or "
                "--database sqlite:////folder/ratings.db"
            )
        from pathlib import Path

        return f"sqlite:///{Path(storage.local_path(self.folder)).absolute() / DATABASE}"

    def ratings(self, database: Database, **options: Any) -> Ratings:
        """Raises StudyError, DatabaseUnusable."""
        spec = self.specification
        return Ratings(database, spec.name, list(self.items.values()), spec.annotators, 60 * spec.minutes, **options)
