"""A small study with known answers, in its folder, and a clock that tests turn."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.evaluation.systems.prompts import Answer, Progress, Prompt, Score
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.study.create import create
from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import AnswerJudgement, Judgement
from calumma.platform.study.specification import StudySpecification
from calumma.platform.study.store.tables import Database


class KnownSystem:
    """Answers with its name, the prompt's words and a picture in its colour; `fails` raises what it says."""

    def __init__(self, name: str, fails: Callable[[Prompt], Answer | None] = lambda prompt: None) -> None:
        self.name, self._fails, self.asked = name, fails, 0

    def answer(self, prompts: Sequence[Prompt], progress: Progress | None = None) -> list[Answer]:
        answers = []
        for prompt in prompts:
            self.asked += 1
            words = f"An answer to: {prompt.document.text} <b onclick=alert(1)>bold</b>"
            colour = (200, 30, 60) if self.name == "ours" else (30, 60, 200)
            segments = (Text(words), Image(PILImage.new("RGB", (12, 9), colour)))
            answers.append(self._fails(prompt) or Answer(Document(segments)))
        return answers

    def score(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Score]:
        raise NotImplementedError

    def score_whole(self, texts: Sequence[str], progress: Progress | None = None) -> list[Score]:
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def specification(folder: Path, prompts: int = 4, **changes: Any) -> StudySpecification:
    categories = ("how-to", "comparison")
    buffer = io.BytesIO()
    PILImage.new("RGB", (10, 10), "green").save(buffer, "PNG")
    (folder / "green.png").write_bytes(buffer.getvalue())
    picture = {"type": "image_url", "image_url": {"url": "green.png"}}
    records = [
        {"id": f"p{n}", "category": categories[n % 2], "prompt": [{"type": "text", "text": f"Question {n}?"}]}
        for n in range(prompts)
    ]
    records[0]["prompt"] = [{"type": "text", "text": "What is this?"}, picture]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    values: dict[str, Any] = {
        "name": "colours",
        "output": str(folder / "study"),
        "prompts": str(folder / "prompts.jsonl"),
        "systems": [{"url": "http://127.0.0.1:1/v1", "name": name} for name in ("ours", "rival")],
        "resources": {"workers": 1},
    }
    return StudySpecification.model_validate(values | changes)


def known_systems(system: SystemSpecification) -> KnownSystem:
    return KnownSystem(system.title)


def made(folder: Path, prompts: int = 4, **changes: Any) -> Study:
    spec = specification(folder, prompts, **changes)
    create(spec, opener=known_systems)
    return Study(spec.output)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return made(tmp_path)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'ratings.db'}")
    yield database
    database.close()


def judgement(preference: Any = "left", first: Any = "fully", second: Any = "partly", note: str = "") -> Judgement:
    return Judgement(
        preference=preference, answers=(AnswerJudgement(fulfils=first), AnswerJudgement(fulfils=second)), note=note
    )


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()
