"""Pages from templates: one file that needs nothing else, light or dark as the reader's system is.

A template is named by its path below the root of the repository, which is also its package: the template
`platform/reports/base.html.j2` lies in the package `calumma.platform.reports`. Pages extend that one and draw with the
macros of `platform/reports/macros.html.j2`.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound


class _PackageTemplates(BaseLoader):
    """Templates out of any package of calumma. Nothing is read again: an installed package does not change."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, None]:
        folder, _, name = template.rpartition("/")
        try:
            file = resources.files(".".join(("calumma", *folder.split("/")))) / name
            return file.read_text(encoding="utf-8"), str(file), None
        except (ModuleNotFoundError, OSError) as error:
            raise TemplateNotFound(template) from error


def render(template: str, **values: Any) -> str:
    """The text of a template, say `platform/curation/report.html.j2`. Whatever is put in is escaped.

    Raises jinja2.TemplateNotFound, and jinja2.UndefinedError for a value that the template uses and nobody gave.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=_PackageTemplates(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(data_url=data_url, thousands=thousands)
    return environment


def data_url(content: bytes, kind: str = "image/png") -> str:
    """A file's content as a URL, so that a page needs no second file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def thousands(count: int) -> str:
    """12,345."""
    return f"{count:,}"
