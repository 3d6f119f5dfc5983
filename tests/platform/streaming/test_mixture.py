"""Mixtures: those that build on an earlier stage's, and how often they repeat a source."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.specification import SpecificationError, validate
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.streaming.mixture import check_epochs, resolve_mixture
from calumma.platform.streaming.plan import Plan
from calumma.platform.training.checkpoints import identity
from calumma.platform.training.specification import PretrainSpecification

STAGE1 = {"tokens/text": 2.9, "tokens/pairs": 1.5, "tokens/interleaved": 0.4}


def stage(storage: str, **fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": storage,
        "mixture": STAGE1,
        "output": "stages/one",
        "model": {"preset": "calumma-20m"},
        "steps": 10,
        "micro_batches": 4,
    }
    return PretrainSpecification.model_validate(values | fields)


def publish(spec: PretrainSpecification, place: str | None = None) -> None:
    Manifest(kind="stage", specification=spec.model_dump(mode="json")).write(place or spec.locate(spec.output))


def shares(spec: PretrainSpecification) -> dict[str, float]:
    total = sum(spec.mixture.values())
    return {uri: weight / total for uri, weight in spec.mixture.items()}


def test_stage_2_is_the_papers(tmp_path: Path) -> None:
    publish(stage(str(tmp_path)))
    new = {"tokens/quality": 3.0, "tokens/instructions": 1.0}
    found = resolve_mixture(stage(str(tmp_path), mixture=new, mixture_of={"stage": "stages/one", "share": 0.5}))
    assert found.mixture_of is None
    assert shares(found) == pytest.approx(
        {uri: weight / 4.8 / 2 for uri, weight in STAGE1.items()}
        | {"tokens/quality": 3 / 8, "tokens/instructions": 1 / 8}
    )
    assert all(weight.is_integer() for weight in found.mixture.values()), "exact shares"


def test_without_an_earlier_stage_nothing_changes(tmp_path: Path) -> None:
    spec = stage(str(tmp_path))
    assert resolve_mixture(spec) is spec


def test_a_source_of_both_gets_both_weights(tmp_path: Path) -> None:
    publish(stage(str(tmp_path), mixture={"tokens/a": 1.0, "tokens/b": 1.0}))
    spec = stage(str(tmp_path), mixture={"tokens/b": 5.0}, mixture_of={"stage": "stages/one", "share": 0.4})
    assert shares(resolve_mixture(spec)) == pytest.approx({"tokens/a": 0.2, "tokens/b": 0.8})


def test_stages_build_on_each_other(tmp_path: Path) -> None:
    root = str(tmp_path)
    publish(stage(root, mixture={"tokens/a": 1.0}))
    publish(stage(root, output="stages/two", mixture={"tokens/b": 1}, mixture_of={"stage": "stages/one", "share": 0.5}))
    spec = stage(root, mixture={}, mixture_of={"stage": "stages/two", "share": 1.0})
    assert shares(resolve_mixture(spec)) == {"tokens/a": 0.5, "tokens/b": 0.5}


@given(
    old=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 1000).map(lambda n: n / 100), min_size=1),
    new=st.dictionaries(st.sampled_from("cdef"), st.integers(1, 1000).map(lambda n: n / 100), min_size=1),
    share=st.integers(1, 99).map(lambda n: n / 100),
)
def test_the_share_goes_to_the_earlier_stage_and_the_rest_to_the_new_sources(
    old: dict[str, float], new: dict[str, float], share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = str(tmp_path_factory.mktemp("stage"))
    publish(stage(root, mixture=old))
    found = shares(resolve_mixture(stage(root, mixture=new, mixture_of={"stage": "stages/one", "share": share})))
    for uri in old.keys() | new.keys():
        wanted = share * old.get(uri, 0) / sum(old.values()) + (1 - share) * new.get(uri, 0) / sum(new.values())
        assert found[uri] == pytest.approx(wanted)


def test_the_earlier_stage_may_have_moved_and_lie_elsewhere(tmp_path: Path) -> None:
    publish(stage("s3://gone", mixture={"tokens/a": 1.0, "/data/b": 1.0}), str(tmp_path / "other/stages/one"))
    spec = stage(
        str(tmp_path / "here"),
        mixture={"tokens/a": 1.0},
        mixture_of={"stage": str(tmp_path / "other/stages/one"), "share": 0.5},
    )
    assert set(resolve_mixture(spec).mixture) == {str(tmp_path / "other/tokens/a"), "/data/b", "tokens/a"}


def test_a_stage_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    spec = stage(str(tmp_path), mixture={}, mixture_of={"stage": "stages/one", "share": 1})
    with pytest.raises(SpecificationError, match=f"no finished stage is published at {tmp_path}/stages/one"):
        resolve_mixture(spec)
    Manifest(kind="curated").write(str(tmp_path / "stages/one"))
    with pytest.raises(SpecificationError, match="stages/one holds 'curated', which records no mixture"):
        resolve_mixture(spec)
    publish(spec)
    with pytest.raises(SpecificationError, match="in a circle"):
        resolve_mixture(spec)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixture": {}}, "mixture: name at least one"),
        ({"mixture": {}, "mixture_of": {"stage": "x", "share": 0.5}}, "0.5, and `mixture` names 0 sources"),
        ({"mixture_of": {"stage": "x", "share": 1}}, "1, and `mixture` names 3 sources"),
        ({"mixture_of": {"stage": "x", "share": 0}}, "mixture_of.share"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"data": {"cache": {"directory": "x", "gigabytes": 0}}}, "data.cache.gigabytes"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    values = stage("/x").model_dump(mode="json") | fields
    with pytest.raises(SpecificationError, match=said):
        validate(PretrainSpecification, values, "x.yaml")


def plan_of(spec: PretrainSpecification) -> Plan:
    manifests = {
        spec.locate(uri): Manifest(
            kind="tokens", files=[FileEntry.from_bytes("x", uri.encode(), rows=10, row_groups=10)]
        )
        for uri in spec.mixture
    }
    weights = {spec.locate(uri): weight for uri, weight in spec.mixture.items()}
    return Plan(spec.seed, weights, manifests, spec.micro_batches)


def test_epochs_are_told_by_source_and_too_many_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    spec = stage("/x", mixture={"tokens/a": 3.0, "tokens/b": 1.0}, steps=20)
    with caplog.at_level(logging.INFO):
        found = check_epochs(spec, plan_of(spec))
    assert found == {"tokens/a": 6.0, "tokens/b": 2.0}
    levels = Counter(record.levelname for record in caplog.records)
    assert levels == {"INFO": 1, "WARNING": 1}
    assert "a 6.00, b 2.00" in caplog.text
    assert "tokens/a (6.0 epochs)" in caplog.text
    assert "nothing needs doing: `max_epochs: 6` says so" in caplog.text
    caplog.clear()
    assert check_epochs(spec.model_copy(update={"max_epochs": 6.0}), plan_of(spec)) == found
    assert "WARNING" not in caplog.text


@pytest.mark.parametrize(("limit", "refused"), [(5.9, True), (6.0, False)])
def test_more_epochs_than_allowed_are_refused(limit: float, refused: bool, caplog: pytest.LogCaptureFixture) -> None:
    spec = stage("/x", mixture={"tokens/a": 3.0, "tokens/b": 1.0}, steps=20, max_epochs=limit)
    if refused:
        with pytest.raises(
            SpecificationError, match=r"max_epochs: 20 steps make more than 5.9 epochs: 6.00 of tokens/a"
        ):
            check_epochs(spec, plan_of(spec))
    else:
        check_epochs(spec, plan_of(spec))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_checkpoints_of_before_these_fields_are_gone_on_with() -> None:
    spec = stage("/x")
    old = spec.model_dump(mode="json")
    for added in ("mixture_of", "max_epochs", "data"):
        del old[added]
    accept = identity.made_by(spec, {})
    assert accept(Manifest(kind="checkpoint", specification=old, report={"step": 3}))
    old["mixture"] = {"tokens/text": 1.0}
    assert not accept(Manifest(kind="checkpoint", specification=old, report={"step": 3}))
