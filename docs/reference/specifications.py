"""Pages of the jobs' specifications, the settings of `calumma serve`, and studies: every field of every section."""

from __future__ import annotations

import re
from collections import Counter

from pydantic import BaseModel

from docs import house
from docs.reference.fields import Link, all_models, cell, plain, purpose, table

SHARED = "sections"  # page of the sections that several jobs have


def pages() -> dict[str, str]:
    """Path below reference/ -> Markdown, of an overview, a page a job, the shared sections, and serving."""
    jobs = dict(house.JOBS)
    used = Counter(model for job in jobs.values() for model in all_models(job)[1:])
    shared = [model for model, times in used.items() if times > 1]
    found = {"jobs/index.md": _overview()}
    for name, job in jobs.items():
        own = [model for model in all_models(job)[1:] if model not in shared]
        found[f"jobs/{name}.md"] = _page(f"Job `{name}`", job, own, shared, f"{SHARED}.md")
    found[f"jobs/{SHARED}.md"] = _shared(shared)
    serve = "`calumma serve start --config FILE` takes; options of the command win over it."
    found["serve.md"] = _of_file("Settings of `calumma serve`", house.ServeSettings, shared, serve, "serve")
    create = "`calumma study create SPECIFICATION` takes."
    found["study.md"] = _of_file("Studies", house.StudySpecification, shared, create, "study")
    return found


def anchor(model: type[BaseModel]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", model.__name__.lower())


def _link(own: list[type[BaseModel]], page: str) -> Link:
    def link(model: type[BaseModel]) -> str:
        return f"[{model.__name__}]({'' if model in own else page}#{anchor(model)})"

    return link


def _sections(models: list[type[BaseModel]], link: Link) -> str:
    return "\n".join(
        f"\n## {model.__name__}\n\n{purpose(model)}{_more(model)}\n\n{table(model, link)}\n" for model in models
    )


def _page(
    title: str, model: type[BaseModel], own: list[type[BaseModel]], shared: list[type[BaseModel]], page: str
) -> str:
    link = _link(own, page)
    return f"# {title}\n\n{purpose(model)}\n\n{table(model, link)}\n{_sections(own, link)}"


def _overview() -> str:
    rows = [f"| [`{name}`]({name}.md) | {purpose(job)} |" for name, job in house.JOBS.items()]
    return "\n".join(
        (
            "# Jobs\n",
            "One YAML file: `calumma job run NAME --config FILE`. Locations are URIs (`s3://…`), absolute paths,",
            "or paths below the specification's `storage`. Unknown fields are refused, with those that are allowed.\n",
            "Editors with the YAML language server complete and check a file whose first line is",
            "`# yaml-language-server: $schema=PATH/jobs/recipes/schema/NAME.json`; every recipe has it.\n",
            "| job | what it does |",
            "|---|---|",
            *rows,
            f"\nSections that several jobs have are on [a page of their own]({SHARED}.md).\n",
        )
    )


def _shared(models: list[type[BaseModel]]) -> str:
    return f"# Sections that jobs share\n{_sections(models, _link(models, ''))}"


def _of_file(title: str, model: type[BaseModel], shared: list[type[BaseModel]], taken_by: str, schema: str) -> str:
    """The page of a YAML file that is no job's. taken_by: the command, and what else there is to say."""
    own = [each for each in all_models(model)[1:] if each not in shared]
    told = f"Fields of the YAML file that {taken_by}\nThe JSON schema is `jobs/recipes/schema/{schema}.json`."
    return _page(title, model, own, shared, f"jobs/{SHARED}.md").replace("\n\n", f"\n\n{told}\n\n", 1)


def _more(model: type[BaseModel]) -> str:
    """What a table of fields cannot say of a model."""
    if model is house.ModelConfig:
        return f"\n\nPresets: {', '.join(f'`{name}`' for name in house.PRESETS)}."
    if model.__name__ == "Source":
        rows = [
            f"| `{name}` | {' '.join(f'`{one}`' for one in form.suffixes)} | {cell(plain(form.read.__doc__ or ''))} |"
            for name, form in sorted(house.FORMATS.items())
        ]
        return "\n\n" + "\n".join(("| format | files | a record |", "|---|---|---|", *rows))
    return ""
