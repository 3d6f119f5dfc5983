"""Every specification we ship is valid, and says what the paper says."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from calumma.jobs.emoji.course import COLOUR
from calumma.jobs.emoji.documents import ColourDocumentsSpecification
from calumma.jobs.quickstart import steps
from calumma.jobs.quickstart.documents import FAST, FULL, DocumentsSpecification
from calumma.jobs.quickstart.steps import Options
from calumma.jobs.specifications.reading import read_specification
from calumma.jobs.specifications.table import JOBS
from calumma.model.config import preset
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.specification import JobSpecification
from calumma.platform.streaming.specification import MixtureOf
from calumma.platform.tokenizing.specification import TokenizeSpecification
from calumma.platform.training.specification import FinetuneSpecification, PretrainSpecification

RECIPES = Path(str(resources.files("calumma.jobs"))) / "recipes"
FILES = sorted(p for p in RECIPES.rglob("*.yaml") if p.name not in (steps.OVERRIDES, steps.LARGE))
MODELS = {"chameleon-7b": 2**23, "chameleon-34b": 3 * 2**22}  # tokens a global batch, paper section 2.3
MICRO_BATCH = 2  # sequences; the recipes' head says so


def shipped(file: Path) -> JobSpecification:
    values = yaml.safe_load(file.read_text())
    return read_specification(JOBS[values["job"]], file)


def pretrain(model: str, stage: str) -> PretrainSpecification:
    spec = shipped(RECIPES / model / f"{stage}.yaml")
    assert isinstance(spec, PretrainSpecification)
    return spec


def test_there_is_a_recipe_for_every_job_and_model() -> None:
    assert {shipped(file).job for file in FILES} == set(JOBS)
    assert {file.parent.name for file in FILES} == {"quickstart", "emoji", "ablation", "ladder", "extend", *MODELS}


@pytest.mark.parametrize("file", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_recipe_is_valid(file: Path) -> None:
    assert isinstance(shipped(file), JobSpecification)


@pytest.mark.parametrize("model", MODELS)
def test_published_models_have_the_papers_shape_and_settings(model: str) -> None:
    stage1, stage2 = pretrain(model, "stage1"), pretrain(model, "stage2")
    assert stage1.model == preset(model)
    assert stage1.model is not None
    assert stage1.model.context == 4096
    for stage in (stage1, stage2):
        assert stage.micro_batches * MICRO_BATCH * stage1.model.context == MODELS[model]
        o = stage.optimizer
        assert (o.learning_rate, o.beta1, o.beta2, o.eps) == (1e-4, 0.9, 0.95, 1e-5)
        assert (o.weight_decay, o.gradient_clip, stage.z_loss) == (0.1, 1.0, 1e-5)
        assert (stage.schedule.kind, stage.schedule.warmup_steps) == ("exponential", 4000)
        assert stage.schedule.total_steps == stage1.steps + stage2.steps
        assert stage.precision == "bfloat16"
    assert stage1.steps / (stage1.steps + stage2.steps) == pytest.approx(0.8, abs=0.001)
    assert (stage1.steps + stage2.steps) * MODELS[model] == pytest.approx(9.2e12, rel=0.01)
    assert stage1.mixture == {"tokens/text": 2.9, "tokens/pairs": 1.5, "tokens/interleaved": 0.4}


def test_the_7bs_data_are_made_as_it_reads_them() -> None:
    curate, tokenize = (shipped(RECIPES / "chameleon-7b" / f"{job}.yaml") for job in ("curate", "tokenize"))
    assert isinstance(curate, CurateSpecification)
    assert isinstance(tokenize, TokenizeSpecification)
    stage1 = pretrain("chameleon-7b", "stage1")
    assert curate.image_first == 0.5  # paper section 2.2
    assert tokenize.documents == [f"curated/{source.name}" for source in curate.sources]
    assert {f"tokens/{source.name}" for source in curate.sources} == {*stage1.mixture}
    assert stage1.model is not None
    assert (tokenize.context, tokenize.micro_batch) == (stage1.model.context, MICRO_BATCH)
    assert curate.storage == tokenize.storage == stage1.storage


@pytest.mark.parametrize("model", MODELS)
def test_fine_tuning_is_the_papers(model: str) -> None:
    spec = shipped(RECIPES / model / "finetune.yaml")
    assert isinstance(spec, FinetuneSpecification)
    assert spec.micro_batches * MICRO_BATCH == 128
    assert (spec.schedule.kind, spec.optimizer.learning_rate, spec.dropout) == ("cosine", 1e-5, 0.05)
    assert (spec.optimizer.weight_decay, spec.z_loss) == (0.1, 1e-5)
    for category in ("text", "code", "visual", "image_generation", "interleaved", "safety"):
        assert f"tokens/chat_{category}" in spec.mixture


@pytest.mark.parametrize("model", ["quickstart", *MODELS])
def test_stage_2_halves_the_weights_of_stage_1_and_goes_on_with_it(model: str) -> None:
    stage1, stage2 = pretrain(model, "stage1"), pretrain(model, "stage2")
    assert stage2.mixture_of == MixtureOf(stage=stage1.output, share=0.5)
    assert not {*stage1.mixture} & {*stage2.mixture}
    assert stage2.initial == stage1.output
    assert stage2.continue_schedule
    assert stage2.optimizer == stage1.optimizer
    assert stage2.schedule == stage1.schedule


# -- the quickstart's own, as it runs them


@pytest.fixture(
    params=[(steps.DIGITS, ""), (steps.DIGITS, "fast"), (COLOUR, ""), (COLOUR, "fast"), (COLOUR, "large")],
    ids=lambda given: "-".join(filter(None, (given[0].name, given[1]))),
)
def options(request: pytest.FixtureRequest, tmp_path: Path) -> Options:
    course, size = request.param
    return Options(tmp_path / "quick start: a & b", fast=size == "fast", course=course, large=size == "large")


def test_every_step_has_a_valid_specification_with_absolute_places(options: Options) -> None:
    for step in options.course.steps:
        spec = steps.step_specification(step.name, options)
        assert Path(spec.storage) == options.workdir / "storage"
        assert spec.tracking.uri == f"sqlite:///{options.workdir}/mlflow/mlflow.db"
        if step.name not in ("documents", "serve"):
            assert spec.run_name == step.name


def test_fast_changes_every_size_and_names_every_recipe() -> None:
    for folder, file in (("quickstart", steps.OVERRIDES), ("emoji", steps.OVERRIDES), ("emoji", steps.LARGE)):
        overrides: dict[str, Any] = yaml.safe_load((RECIPES / folder / file).read_text())
        assert set(overrides) == {recipe.stem for recipe in FILES if recipe.parent.name == folder}
    full, fast = (steps.step_specification("stage1", Options(Path("w"), fast=f)) for f in (False, True))
    assert isinstance(full, PretrainSpecification)
    assert isinstance(fast, PretrainSpecification)
    assert fast.steps < full.steps
    written = steps.step_specification("documents", Options(Path("w"), fast=True))
    assert isinstance(written, DocumentsSpecification)
    assert (written.sizes, DocumentsSpecification(storage="w").sizes) == (FAST, FULL)


def test_the_steps_fit_each_other(options: Options) -> None:
    """What a step reads is what an earlier one writes: names in recipes are typed by hand."""
    spec = {step.name: steps.step_specification(step.name, options).model_dump() for step in options.course.steps}
    written = {f"documents/{name}/" for name in documents_written(options)}
    assert {source["location"] for source in spec["curate"]["sources"]} == written
    curated = {f"curated/{source['name']}" for source in spec["curate"]["sources"]}
    tokens = {f"tokens/{uri.rpartition('/')[2]}" for uri in spec["tokenize"]["documents"]}
    for name in ("train_text_tokenizer", "train_image_tokenizer", "tokenize"):
        assert {*spec[name]["documents"], *spec[name].get("held_out", [])} <= curated
    for name in ("stage1", "stage2", "finetune"):
        assert {*spec[name]["mixture"], *spec[name]["held_out"].values()} <= tokens
    judged = {spec["evaluate"][field] for field in ("judge_training", "judge_held_out")}
    judged |= {spec["evaluate"]["training_pictures"]} - {None}
    assert {task["documents"] for task in spec["evaluate"]["tasks"]} | judged <= curated
    measures = {f"{task['name']}_accuracy" for task in spec["evaluate"]["tasks"] if task["kind"] != "interleaved"}
    assert measures <= set(options.course.measured)
    sheets = {sheet.removesuffix("_confusion") for sheet in options.course.sheets}
    assert {task["name"] for task in spec["evaluate"]["tasks"]} >= sheets
    assert spec["train_text_tokenizer"]["image_codes"] == spec["train_image_tokenizer"]["model"]["codebook_size"]
    assert spec["stage1"]["model"]["context"] == spec["tokenize"]["context"]
    assert spec["stage2"]["initial"] == spec["stage1"]["output"]
    assert spec["finetune"]["initial"] == spec["stage2"]["output"]
    assert spec["serve"]["model"] == spec["evaluate"]["model"]
    assert spec["serve"]["model"] == f"models:/{spec['finetune']['register_as']}@{spec['finetune']['alias']}"


def documents_written(options: Options) -> list[str]:
    from calumma.jobs.emoji import documents as colour
    from calumma.jobs.quickstart import documents

    spec = steps.step_specification("documents", options)
    if isinstance(spec, ColourDocumentsSpecification):
        return list(colour._file_makers(spec, *colour.pictures(spec)))
    assert isinstance(spec, DocumentsSpecification)
    return list(documents._file_makers(spec))


def test_nothing_that_trains_reads_held_out_documents(options: Options) -> None:
    trained: list[str] = []
    for name in ("train_text_tokenizer", "train_image_tokenizer"):
        trained += steps.step_specification(name, options).model_dump()["documents"]
    for name in ("stage1", "stage2", "finetune"):
        trained += steps.step_specification(name, options).model_dump()["mixture"]
    assert not [uri for uri in trained if "held_out" in uri or "ask_" in uri or "judge_" in uri]
    judged = steps.step_specification("evaluate", options).model_dump()["judge_training"]
    assert judged not in trained
    assert "held_out" not in judged
    assert "ask_" not in judged
