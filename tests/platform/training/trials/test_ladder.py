"""A ladder: sizes, the rate, resumption, and what is published."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.cluster import runner
from calumma.platform.specification import SpecificationError
from calumma.platform.training.trials import ladder, rung
from calumma.platform.training.trials.ladder import Swept, best_rate
from calumma.platform.training.trials.running import Event, Interrupted, Notebook
from calumma.platform.training.trials.specification import LadderSpecification
from calumma.platform.training.trials.trial import read_vocabulary


@pytest.fixture(scope="module")
def values(root: str, shape: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a ladder that takes seconds."""
    return {
        "storage": root,
        "tracking": {"uri": f"sqlite:///{tmp_path_factory.mktemp('ladder')}/mlflow.db"},
        "resources": {"workers": 0},
        "mixture": {"tokens/lines": 1.0},
        "held_out": ["tokens/pairs"],
        "model": shape.model_copy(update={"dropout": 0.1}).model_dump(exclude={"vocabulary_size"}),
        "sizes": [{"parameters": size, "steps": 16} for size in (4e4, 1e5, 2e5, 4e5)],
        "sweep": {"learning_rates": [0.003, 0.01, 0.03], "steps": 6},
        "warmup_steps": 2,
        "bootstrap": 12,
        "log_every": 4,
    }


def events_of(spec: LadderSpecification, notebook: Notebook | None = None) -> Iterator[Event]:
    return rung.train_size(spec, 1, 0.01, 3, spec.ends(1), notebook)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_that_was_stopped_goes_on_as_if_it_was_not(
    values: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    spec = LadderSpecification.model_validate(values | {"precision": precision})
    whole = list(events_of(spec))
    assert [event["step"] for event in whole if "nll" in event] == [4, 8, 16]

    class Stopping(Notebook):
        """Stops after so many turns."""

        turns = 0

        def turn(self, state: Callable[[], dict[str, Any]]) -> None:
            self.turns -= 1
            if self.turns == 0:
                self.stopping = True
            super().turn(state)

    for turns in (1, 5, 11, 16):  # in the first cooldown, in the trunk, in the last cooldown
        notebook = Stopping(str(tmp_path / f"{turns}.pt"))
        notebook.turns = turns
        with pytest.raises(Interrupted):
            list(events_of(spec, notebook))
        assert list(events_of(spec, Notebook(notebook.place))) == whole


def test_widths_grow_by_heads_to_the_parameters_that_are_asked_for(values: dict[str, Any]) -> None:
    spec = LadderSpecification.model_validate(values)
    vocabulary = read_vocabulary(spec).size
    shapes = [spec.shape(number, vocabulary) for number in range(4)]
    assert [shape.head_size for shape in shapes] == [8] * 4
    assert [shape.heads // shape.kv_heads for shape in shapes] == [2] * 4
    for shape, size in zip(shapes, spec.sizes, strict=True):
        assert sum(p.numel() for p in Transformer(shape).parameters()) == pytest.approx(size.parameters, rel=0.25)
    sizes = [*values["sizes"], {"parameters": 4e6, "steps": 4, "layers": 5}]
    deeper = LadderSpecification.model_validate(values | {"sizes": sizes})
    assert deeper.shape(4, vocabulary).layers == 5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sizes": [{"parameters": size, "steps": 8} for size in (3e5, 1e5, 2e5, 4e5)]}, "must rise in parameters"),
        ({"sizes": [{"parameters": 1e5, "steps": 8}]}, "at least 4"),
        ({"shares": [0.5, 0.25, 1.0]}, "shares must rise to 1"),
        ({"hold_back": 1}, "either `held_out`"),
        ({"held_out": []}, "either `held_out`"),
        ({"sweep": {"learning_rates": [0.1, 0.01, 0.2], "steps": 6}}, "must be above 0 and rise"),
        ({"sweep": {"learning_rates": [0.01, 0.1, 0.2], "steps": 6, "sizes": 4}}, "is not swept"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        LadderSpecification.model_validate(values | change)


def test_the_rate_is_where_a_parabola_is_lowest() -> None:
    rates = [0.001, 0.002, 0.004, 0.008]

    def loss(rate: float) -> float:
        return 3 + 0.2 * math.log(rate / 0.003) ** 2

    assert best_rate([Swept(0, rate, loss(rate)) for rate in rates]) == pytest.approx(0.003)
    assert best_rate([Swept(0, rate, -rate) for rate in rates]) == 0.008
    assert best_rate([Swept(0, 0.001, 5.0), Swept(0, 0.002, math.nan), Swept(0, 0.004, 6.0)]) == 0.001
    with pytest.raises(SpecificationError, match="lower learning rates"):
        best_rate([Swept(0, 0.001, math.nan)])


def test_a_ladder_is_run_published_and_not_trained_again(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LadderSpecification.model_validate(values | {"output": "ladders/one"})
    seen: list[float] = []
    manifest, skipped = runner.run_job(spec, ladder.run, lambda done, total, note="": seen.append(done / total))
    assert not skipped
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    assert {entry.path for entry in manifest.files} == {"ladder.png", "ladder.json", "report.html"}
    output = Path(spec.output_uri)
    found = json.loads((output / "ladder.json").read_text())
    assert len(found["trainings"]) == 4 * 3
    at_end = found["checks"][-1]
    assert at_end["measured"][0] == pytest.approx(found["trainings"][-1]["loss"])
    assert at_end["error"][0] == pytest.approx(at_end["measured"][0] - at_end["predicted"][0])
    assert found["next"]["parameters"] > found["sizes"][-1]["parameters"]
    hidden = [size["hidden_learning_rate"] * size["width"] for size in found["sizes"]]
    assert hidden == pytest.approx([found["learning_rate"] * found["sizes"][0]["width"]] * 4)
    shown = (output / "report.html").read_text()
    assert f"{at_end['predicted'][0]:.3f}" in shown
    assert f"{at_end['measured'][0]:.3f}" in shown
    assert not list((output / "checkpoints").glob("*.pt"))

    def refused(*arguments: Any) -> Iterator[Event]:
        raise AssertionError("trained again")
        yield {}

    monkeypatch.setattr(rung, "train_size", refused)
    assert runner.run_job(spec, ladder.run)[1]
    changed = spec.model_copy(update={"bootstrap": 13})
    again, skipped = runner.run_job(changed, ladder.run)
    assert not skipped
    assert again.report["measured"] == manifest.report["measured"]
    with pytest.raises(AssertionError, match="trained again"):
        runner.run_job(spec.model_copy(update={"seed": 1}), ladder.run)


def test_seeds_that_packed_other_numbers_of_tokens_are_one_length(values: dict[str, Any]) -> None:
    """Steps hold as many documents as fit: as many steps of another seed have a few tokens more or less."""
    sizes = [{"parameters": size, "steps": 16, "seeds": 2} for size in (4e4, 1e5, 2e5, 4e5)]
    spec = LadderSpecification.model_validate(values | {"sizes": sizes})
    shapes = [spec.shape(number, read_vocabulary(spec).size) for number in range(4)]
    cases = ladder.size_cases(spec, shapes, 0.01, {})
    events = {
        case.name: [
            {"step": end, "tokens": 100 * end + seed, "nll": [9.0 / end + size / 8, 5.0 / end], "counts": [1, 2]}
            for end in spec.ends(size)
        ]
        for case in cases
        for (_, size, _, seed, _) in (case.arguments,)
    }
    trainings = ladder._trainings(cases, events, shapes)
    assert len({(one.size, one.tokens) for one in trainings}) * 2 == len(trainings)
    found = ladder.findings(spec, shapes, 0.01, [], trainings)
    assert [check["tokens"] for check in found["checks"]] == sorted({one.tokens for one in trainings if one.size == 3})
