"""The reference is complete, and what of it is committed is what the code makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import yaml

from docs import house
from docs.reference import commands, environment, fields, http, metrics, schemas, specifications

ROOT = house.ROOT
RECIPES = sorted(
    file for file in (ROOT / "jobs/recipes").rglob("*.yaml") if file.name not in ("fast.yaml", "large.yaml")
)
MODELS = [*house.JOBS.values(), house.ServeSettings, house.StudySpecification]


# -- schemas, which editors read and which are committed


def test_the_schemas_are_what_the_specifications_make() -> None:
    folder = ROOT / schemas.FOLDER
    wanted = schemas.files()
    assert {file.name for file in folder.iterdir()} == set(wanted)
    stale = [name for name, text in wanted.items() if (folder / name).read_text(encoding="utf-8") != text]
    assert stale == [], "run `make reference`"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipe_names_its_schema_and_keeps_to_it(file: Path) -> None:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found is not None, f"the first line of {file} names no schema"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert (file.parent / found[1]).resolve() == ROOT / schemas.FOLDER / f"{values['job']}.json"
    jsonschema.validate(values, schemas.schema(values["job"]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stpes": 3}, "stpes"),
        ({"steps": 0}, "minimum"),
        ({"precision": "float16"}, "float16"),
        ({"model": {"preset": "calumma-9b"}}, "calumma-9b"),
        ({"model": {"layers": 2}}, "layers"),
    ],
)
def test_a_schema_finds_what_the_specification_refuses(change: dict[str, Any], told: str) -> None:
    good = {
        "job": "pretrain",
        "storage": "s",
        "mixture": {"tokens": 1},
        "output": "o",
        "model": {"preset": "calumma-20m"},
    }
    good |= {"steps": 2, "micro_batches": 1}
    jsonschema.validate(good, schemas.schema("pretrain"))
    with pytest.raises(jsonschema.ValidationError, match=told):
        jsonschema.validate(good | change, schemas.schema("pretrain"))


# -- pages, which are made at the build


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_says_what_it_means(model: Any) -> None:
    silent = {
        f"{one.__name__}.{name}"
        for one in fields.all_models(model)
        for name, field in one.model_fields.items()
        if not fields.meaning(field)
    }
    assert silent == set()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_stands_on_a_page(model: Any) -> None:
    text = "\n".join(specifications.pages().values())
    for one in fields.all_models(model):
        assert fields.purpose(one) in text
        for name in one.model_fields:
            assert f"| `{name}` |" in text


def test_types_are_told_in_words() -> None:
    def link(model: Any) -> str:
        return str(model.__name__)

    told = {
        "whole number or null": int | None,
        "list of texts": list[str],
        "mapping of names to numbers": dict[str, float],
        "`a` or `b`": Literal["a", "b"],
        "Tracking or null": house.Tracking | None,
    }
    assert {fields.kind(annotation, link) for annotation in told.values()} == set(told)


def test_every_command_and_option_stands_on_the_page() -> None:
    page, waiting = commands.page(), [(["calumma"], house.command_line())]
    while waiting:
        words, command = waiting.pop()
        inner = getattr(command, "commands", None)
        waiting += [([*words, name], one) for name, one in (inner or {}).items()]
        if not inner:
            assert f"## {' '.join(words)}\n" in page
            section = page.partition(f"## {' '.join(words)}\n")[2].partition("\n## ")[0]
            options = {one.opts[0] for one in command.params if one.param_type_name == "option"} - {"--help"}
            assert {name for name in options if f"`{name}" not in section} == set()


def test_every_endpoint_and_type_stands_on_the_page() -> None:
    page, document = http.page(), house.application().openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"## {method.upper()} {path}\n" in page
            assert operation.get("description"), f"{method} {path} says nothing of itself"
    links = set(re.findall(r"\]\(#(\w+)\)", page))
    assert links <= {name.lower() for name in re.findall(r"^### (\w+)$", page, re.MULTILINE)}


def test_every_field_of_a_request_says_what_it_means() -> None:
    document = house.application().openapi()
    bodies = [
        one["requestBody"] for methods in document["paths"].values() for one in methods.values() if "requestBody" in one
    ]
    contents = [content["schema"] for body in bodies for content in body["content"].values()]
    schemas = [schema.get("allOf", [schema])[0] for schema in contents]
    named = {schema["$ref"].rpartition("/")[2] for schema in schemas if "$ref" in schema} | {"Message", "StreamOptions"}
    fields = [(name, document["components"]["schemas"][name]["properties"]) for name in sorted(named)]
    fields += [("form", schema["properties"]) for schema in schemas if "$ref" not in schema]
    silent = {f"{name}.{field}" for name, of in fields for field, about in of.items() if not about.get("description")}
    assert silent == set()


def test_every_variable_that_the_code_reads_is_told() -> None:
    missing = {name: files for name, files in environment.read_by(ROOT).items() if name not in environment.told()}
    assert missing == {}, "add them to docs/pages/reference/environment.md"


def test_variables_are_found_wherever_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.py").write_text(
        'import os\nNAME = "CALUMMA_A"\nos.environ["B"]\nos.environ.get("C")\nos.getenv("D")\n"E" in os.environ\n'
        'Option(envvar="F")\nvalues = {"RAY_g": 1}\nos.environ.setdefault("H", "")\nos.environ.get(NAME)\n'
    )
    assert set(environment.read_by(tmp_path)) == {"CALUMMA_A", "B", "C", "D", "F", "E", "RAY_g", "H"}


def test_variables_of_the_table_are_those_of_the_code_or_of_others() -> None:
    others = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "PIP_FIND_LINKS", "UV_FIND_LINKS"}
    assert environment.told() - set(environment.read_by(ROOT)) == others


def test_every_metric_of_the_server_stands_on_the_page() -> None:
    page = metrics.page()
    names = [name for name, *_ in house.prometheus()]
    assert len(names) > 5
    assert [name for name in names if f"`{name}`" not in page] == []
    assert [name for name in (*house.COUNTERS, *house.GAUGES) if f"`calumma_engine_{name}" not in page] == []


def test_what_training_measures_is_told() -> None:
    logged = {f"stability/layer_07/{name}" for name in house.BLOCK} | {f"stability/{name}" for name in house.OUTPUT}
    logged |= {f"seconds/{name}" for name in house.ACTIVITIES}
    assert metrics.unknown("pretrain", logged) == set()
    assert metrics.unknown("pretrain", {"lost", "seconds/sleeping"}) == {"lost", "seconds/sleeping"}


def test_dashboards_and_alerts_ask_for_metrics_that_there_are() -> None:
    names = {name for name, *_ in house.prometheus()}
    names |= {f"calumma_engine_{name}_total" for name in house.COUNTERS} | {
        f"calumma_engine_{name}" for name in house.GAUGES
    }
    names |= {f"{name}{end}" for name in names for end in ("_bucket", "_sum", "_count")}
    for file in (ROOT / "infra" / "monitoring").iterdir():
        asked = set(re.findall(r"\bcalumma_\w+", file.read_text()))
        assert asked <= names, file.name
