"""Job specifications: a wrong one says which field, what was given and what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from calumma.jobs.specifications.reading import read_specification
from calumma.jobs.specifications.table import JOBS
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.specification import Resources, SpecificationError, WorkerRange, validate
from calumma.platform.tokenizing.specification import TokenizeSpecification
from calumma.platform.training.specification import PretrainSpecification

CURATE: dict[str, Any] = {
    "storage": "/data",
    "sources": [{"name": "text", "format": "jsonl", "location": "raw/text"}],
}
PRETRAIN: dict[str, Any] = {
    "storage": "s3://bucket/run",
    "mixture": {"tokens/text": 1.0},
    "output": "stage1",
    "model": {"layers": 1, "width": 8, "heads": 2, "kv_heads": 1, "ffn_width": 8},
    "steps": 10,
    "micro_batches": 4,
}


def written(folder: Path, values: object) -> Path:
    file = folder / "job.yaml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return file


def complaint(values: dict[str, Any], kind: Any = CurateSpecification) -> str:
    with pytest.raises(SpecificationError) as raised:
        validate(kind, values, "job.yaml")
    return str(raised.value)


def test_a_file_becomes_a_specification(tmp_path: Path) -> None:
    spec = read_specification(CurateSpecification, written(tmp_path, CURATE))
    assert spec.sources[0].location == "raw/text"
    assert spec.locate(spec.output) == "/data/curated"


@pytest.mark.parametrize(
    ("location", "found"),
    [("tokens/text", "s3://bucket/run/tokens/text"), ("/abs", "/abs"), ("s3://other/key", "s3://other/key")],
)
def test_locations_are_below_storage_unless_absolute(location: str, found: str) -> None:
    assert validate(PretrainSpecification, PRETRAIN, "x").locate(location) == found


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecificationError, match=r"there is no specification file .*absent\.yaml"):
        read_specification(CurateSpecification, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [("storage: [1, 2", "not valid YAML"), ("- a\n- b", "mapping of fields, found list"), ("", "found NoneType")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(SpecificationError, match=said):
        read_specification(CurateSpecification, written(tmp_path, content))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes("storage: /größe".encode("latin-1"))
    with pytest.raises(SpecificationError, match=r"job\.yaml is not UTF-8 text \(byte 12"):
        read_specification(CurateSpecification, tmp_path / "job.yaml")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **fields: Any) -> str:
        raise PermissionError(13, "Permission denied")

    file = written(tmp_path, CURATE)
    monkeypatch.setattr(Path, "read_text", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(SpecificationError, match=r"job\.yaml cannot be read: Permission denied"):
        read_specification(CurateSpecification, file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("storage: /x\nstorage: /y\n", r"job\.yaml: storage is given twice, in line 1 and in line 2; keep one"),
        (
            "sources:\n  - {name: a, format: text, name: b}\n",
            r"sources\.0\.name is given twice, in line 2 and in line 2",
        ),
        (
            "texts:\n  languages: [en]\nimages: {min_side: 1,\n  min_side: 2}\n",
            r"images\.min_side .* line 3 and in line 4",
        ),
        ("base: &b {x: 1}\nx: {<<: *b, x: 2, <<: *b}\n", r"x\.<< is given twice"),
        ("storage: /x\n---\nstorage: /y\n", r"job\.yaml: a second document begins in line 2 \(`---`\)"),
        ("storage: /x\n\toutput: y\n", r"(?s)job\.yaml is not valid YAML: .*'\\t'.*line 2"),
        ("storage: /x\nseed: *s\n", r"(?s)job\.yaml is not valid YAML: .*undefined alias"),
    ],
)
def test_what_yaml_would_read_otherwise_than_it_looks_is_refused(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(SpecificationError, match=said):
        read_specification(CurateSpecification, written(tmp_path, content))


def test_merged_mappings_and_a_mark_at_the_beginning_are_read(tmp_path: Path) -> None:
    content = "\ufeffstorage: /data\nsources:\n  - &a {name: a, format: jsonl, location: x}\n  - {<<: *a, name: b}\n"
    spec = read_specification(CurateSpecification, written(tmp_path, content))
    assert [(source.name, source.location) for source in spec.sources] == [("a", "x"), ("b", "x")]


def test_a_wrong_field_is_told_with_its_line_or_its_override(tmp_path: Path) -> None:
    content = """storage: /data
sources:
  - name: text
    format: jsonl
    location: 5
image_first: 0.5
texts: {languages: [en, no]}
"""
    with pytest.raises(SpecificationError) as raised:
        read_specification(CurateSpecification, written(tmp_path, content), ["image_first=2", "captions.min_word=3"])
    said = str(raised.value)
    assert "\n  line 5: sources.0.location: Input should be a valid string (given 5)" in said
    assert "\n  --set image_first=2: image_first: Input should be less than or equal to 1 (given 2)" in said
    assert "\n  --set captions.min_word=3: captions.min_word: unknown field (given 3)" in said
    assert "\n  line 7: texts.languages.1: Input should be a valid string (given False); YAML reads yes, no, on" in said


def test_a_missing_field_is_told_with_the_line_of_what_lacks_it(tmp_path: Path) -> None:
    with pytest.raises(SpecificationError, match=r"\n  line 3: sources\.0\.format: required, and not given"):
        read_specification(
            CurateSpecification, written(tmp_path, "storage: /x\nsources:\n  - {name: a, location: y}\n")
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    said = complaint(PRETRAIN | {"mixture": {"tokens/a": value, "tokens/b": 1.0}}, PretrainSpecification)
    assert "mixture.tokens/a: Input should be a finite number" in said
    assert "max_bad_share" in complaint(CURATE | {"max_bad_share": value})


def test_a_source_of_a_mixture_is_named_once_however_it_is_written() -> None:
    said = complaint(PRETRAIN | {"mixture": {"tokens/a": 1, "tokens/a/": 3}}, PretrainSpecification)
    assert "s3://bucket/run/tokens/a is named more than once" in said


def test_an_unknown_key_is_told_with_the_allowed_ones() -> None:
    said = complaint(CURATE | {"sorces": 1})
    assert "sorces: unknown field (given 1)" in said
    assert "sources" in said.partition("allowed here: ")[2]


def test_an_unknown_key_deep_inside_is_told_with_those_allowed_there() -> None:
    said = complaint(PRETRAIN | {"model": PRETRAIN["model"] | {"layer": 2}}, PretrainSpecification)
    allowed = said.partition("allowed here: ")[2]
    assert "model.layer: unknown field" in said
    assert "layers" in allowed
    assert "mixture" not in allowed
    said = complaint(CURATE | {"sources": [CURATE["sources"][0] | {"path": "x"}]})
    assert "sources.0.path: unknown field" in said
    assert "location" in said.partition("allowed here: ")[2]


def test_a_wrong_value_is_told_with_what_is_allowed() -> None:
    said = complaint(CURATE | {"image_first": 1.5})
    assert "image_first" in said
    assert "1.5" in said
    assert "less than or equal to 1" in said
    said = complaint(CURATE | {"sources": [CURATE["sources"][0] | {"format": "zip"}]})
    assert "sources.0.format" in said
    assert "'zip'" in said
    assert "'webdataset'" in said


def test_a_missing_field_is_named() -> None:
    assert "sources: required, and not given" in complaint({"storage": "/data"})


def test_every_wrong_field_gets_its_line() -> None:
    said = complaint(CURATE | {"min_text": -1, "output": 7})
    assert {line.split(":")[0].strip() for line in said.splitlines()[1:]} == {"min_text", "output"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"initial": "stage0"}, "exactly one of `model`"),
        ({"model": None}, "exactly one of `model`"),
        ({"continue_schedule": True}, "`continue_schedule` needs `initial`"),
        ({"alias": "champion"}, "`alias` needs `register_as`"),
        ({"mixture": {"tokens/text": 0}}, "above 0"),
        ({"resources": {"workers": {"min": 3, "max": 2}}}, "min 3 is more than max 2"),
        ({"model": PRETRAIN["model"] | {"heads": 3}}, "width 8 over 3 heads"),
        ({"schedule": {"final": 0}}, "schedule: final: an exponential decay never reaches 0"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(change: dict[str, Any], said: str) -> None:
    assert said in complaint(PRETRAIN | change, PretrainSpecification)


def test_other_schedules_may_end_at_zero() -> None:
    spec = validate(PretrainSpecification, PRETRAIN | {"schedule": {"kind": "cosine", "final": 0}}, "x")
    assert spec.schedule.final == 0


def test_source_names_must_differ() -> None:
    said = complaint(CURATE | {"sources": CURATE["sources"] * 2})
    assert "sources: the name text is given more than once" in said


def test_documents_whose_tokens_would_share_a_directory_are_refused() -> None:
    values = {"storage": "/data", "documents": ["curated/a", "s3://bucket/a/", "curated/b"]}
    assert "documents: several end in a; their tokens" in complaint(values, TokenizeSpecification)


def test_overrides_reach_into_sections_and_are_yaml(tmp_path: Path) -> None:
    overrides = ["steps=20", "schedule.warmup_steps=3", "resources.workers={min: 1, max: 2}", "run_name=null"]
    spec = read_specification(PretrainSpecification, written(tmp_path, PRETRAIN), overrides)
    assert (spec.steps, spec.schedule.warmup_steps) == (20, 3)
    assert spec.resources.workers == WorkerRange(min=1, max=2)
    assert spec.run_name is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps", "must look like field.subfield=value"),
        ("=3", "must look like field.subfield=value"),
        ("steps.more=3", "'steps' holds a value, not a section"),
        ("steps={", "the value is not valid YAML"),
        ("step=3", "step: unknown field"),
        ("steps=many", "'many'"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(SpecificationError, match=said):
        read_specification(PretrainSpecification, written(tmp_path, PRETRAIN), [override])


@pytest.fixture(scope="module")
def tokenize_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("specification"), {"storage": "/data", "documents": ["curated/text"]})


@given(
    micro_batch=st.integers(1, 10**6), output=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1)
)
def test_an_override_means_what_the_same_value_in_the_file_means(
    tokenize_file: Path, micro_batch: int, output: str
) -> None:
    overrides = [f"micro_batch={micro_batch}", f"output={json.dumps(output)}"]  # JSON strings are YAML strings
    values = yaml.safe_load(tokenize_file.read_text()) | {"micro_batch": micro_batch, "output": output}
    assert read_specification(TokenizeSpecification, tokenize_file, overrides) == validate(
        TokenizeSpecification, values, "x"
    )


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_named_as_its_specification_says(job: str) -> None:
    assert JOBS[job].model_fields["job"].default == job


def test_a_number_of_workers_is_a_range_of_one() -> None:
    assert (Resources(workers=3).min_workers, Resources(workers=3).max_workers) == (3, 3)
    ranged = Resources(workers=WorkerRange(min=2, max=5))
    assert (ranged.min_workers, ranged.max_workers) == (2, 5)


def recipes() -> list[Path]:
    folder = Path(__file__).parents[3] / "jobs" / "recipes"
    return [file for file in sorted(folder.glob("*/*.yaml")) if "job" in yaml.safe_load(file.read_text())]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: f"{recipe.parent.name}-{recipe.stem}")
def test_every_recipe_that_ships_is_valid(recipe: Path) -> None:
    job = yaml.safe_load(recipe.read_text())["job"]
    assert read_specification(JOBS[job], recipe).job == job


def test_there_are_recipes() -> None:
    assert {recipe.parent.name for recipe in recipes()} >= {"quickstart", "chameleon-7b", "chameleon-34b"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x: &a [*a]\n", "within itself"),
        ("x: " + "[" * 2000 + "]" * 2000, "nested too deep"),
        ('job: "a\x00b"\n', "not valid YAML"),
    ],
)
def test_yaml_that_ends_parsers_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SpecificationError, match=said):
        read_specification(CurateSpecification, tmp_path / "a.yaml")
