"""Templates: found in their packages, escaped, strict about what they are given, and one style for all pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import DictLoader, Environment, TemplateNotFound, UndefinedError

import calumma.platform.reports
from calumma.platform.reports import templates
from calumma.platform.reports.templates import data_url, render

ROOT = Path(calumma.platform.reports.__file__).parents[2]
PACKAGES = ("model", "platform", "serve", "jobs")
SHIPPED = sorted(str(f.relative_to(ROOT)) for p in PACKAGES for f in (ROOT / p).rglob("*.html.j2"))
BASE = "platform/reports/base.html.j2"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """The environment of `render`, with the templates of the test beside the shipped ones."""
    shared = templates._environment()
    pages = {
        "page": f"{{% extends '{BASE}' %}}{{% block title %}}{{{{ name }}}}{{% endblock %}}"
        "{% block content %}<p title='{{ name }}'>{{ name }}</p>{% endblock %}",
        "macros": "{% from 'platform/reports/macros.html.j2' import bar, legend, picture, tile %}"
        "{{ tile(name, name) }}{{ legend([(name, 'red')]) }}{{ bar([(name, 50, 'red')]) }}{{ picture(url, name) }}",
        "number": "{{ number | thousands }} {{ content | data_url }}",
    }
    own = shared.overlay(loader=None)
    own.loader = DictLoader(pages | {name: (ROOT / name).read_text() for name in SHIPPED})
    monkeypatch.setattr(templates, "_environment", lambda: own)
    return own


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_template_is_found_and_compiles(name: str) -> None:
    assert templates._environment().get_template(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_no_template_turns_escaping_off_or_needs_a_second_file(name: str) -> None:
    source = (ROOT / name).read_text()
    assert not re.search(r"\|\s*safe\b|autoescape|<script|https?://", source)


@pytest.mark.parametrize("name", ["platform/reports/none.html.j2", "platform/nowhere/base.html.j2", "base.html.j2"])
def test_a_template_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(TemplateNotFound, match=name):
        render(name)


def test_a_value_that_nobody_gave_is_an_error(environment: Environment) -> None:
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render("page")


def test_whatever_is_put_in_is_escaped(environment: Environment) -> None:
    evil = "</style><script>alert('1')</script>\"'"
    for page in (render("page", name=evil), render("macros", name=evil, url='data:," onerror="x')):
        assert "<script" not in page
        assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&#34;&#39;" in page
        assert '" onerror' not in page


def test_a_page_is_whole_and_has_the_one_style(environment: Environment) -> None:
    page = render("page", name="A page")
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert page.endswith("</html>\n")
    assert "<title>A page</title>" in page
    assert page.count("<style>") == 1
    for needed in ('name="viewport"', "prefers-color-scheme: dark", "max-width: 34rem", "@media print"):
        assert needed in page


def test_numbers_are_grouped_and_files_become_urls(environment: Environment) -> None:
    assert render("number", number=1234567, content=b"\x89PNG") == "1,234,567 data:image/png;base64,iVBORw=="
    assert data_url(b"", "image/jpeg") == "data:image/jpeg;base64,"
