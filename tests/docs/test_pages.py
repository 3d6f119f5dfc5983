"""What pages say can be done: their commands, files and paths are those of the code. `make docs-check` runs them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import build, check, house
from docs.blocks import Block, blocks, commands

ROOT = house.ROOT
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "infra" / "README.md",
    *sorted((ROOT / "docs/pages").rglob("*.md")),
]
BLOCKS = [block for page in PAGES for block in blocks(page, ROOT)]
ids = [block.place for block in BLOCKS]


def of(*languages: str) -> Any:
    """The blocks of some languages, as parameters of a test."""
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def option_names(command: Any) -> set[str]:
    return {name for option in command.params for name in option.opts if name.startswith("-")} | {"--help"}


def walked(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words name, and the words behind its name."""
    command, rest = house.command_line(), list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    return command, rest


@of("sh", "bash", "console")
def test_the_command_line_takes_every_command(block: Block) -> None:
    for words in commands(block.text):
        command, rest = walked(words)
        if {"--help", "--version"} & set(words):
            continue
        assert not getattr(command, "commands", None), f"{block.place}: calumma {' '.join(words)} names no command"
        command.make_context(" ".join(words), rest)  # raises a UsageError that names the word


def inline() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for found in re.finditer(r"`calumma ([^`]+)`", text):
            yield page.relative_to(ROOT).as_posix(), found[1]


@pytest.mark.parametrize(("page", "words"), sorted(set(inline())))
def test_commands_within_sentences_are_there(page: str, words: str) -> None:
    command, rest = walked(words.split())
    assert command is not house.command_line() or words.startswith("--"), f"{page}: `calumma {words}`"
    unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - option_names(command)
    assert not unknown, f"{page}: `calumma {words}` has no {', '.join(unknown)}"


@of("sh", "bash", "console")
def test_make_and_python_are_asked_for_what_there_is(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[0] for words in commands(block.text, "make") if words} <= targets
    for words in commands(block.text, "python"):
        if words[:1] == ["-m"] and words[1].startswith("calumma."):
            assert importlib.util.find_spec(words[1]) is not None, f"{block.place}: no module {words[1]}"


@of("yaml")
def test_every_yaml_is_a_specification_or_part_of_one(block: Block) -> None:
    values = yaml.safe_load(block.text)
    if block.part:
        house.validate_part(block.part, values)
    elif block.mark == "wrong":
        with pytest.raises(house.SpecificationError):
            house.validate(house.JOBS[values["job"]], values, block.place)
    elif "job" in values:
        house.validate(house.JOBS[values["job"]], values, block.place)
    elif "systems" in values:
        house.StudySpecification.model_validate(values)
    else:
        house.ServeSettings.model_validate(values)
    assert block.title or block.part, f"{block.place}: give it a title, or say what it is part of"


@of("python")
def test_every_python_block_compiles_and_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calumma"):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{block.place}: {node.module} has no {missing}"


@of("sh", "bash", "console")
def test_requests_hold_json(block: Block) -> None:
    for words in commands(block.text, "curl"):
        for option, value in pairwise(words):
            if option == "-d":
                assert json.loads(value)


def test_every_language_is_known() -> None:
    assert {block.language for block in BLOCKS} <= {"sh", "python", "yaml", "json", "text"}


def test_every_guide_is_followed_by_the_check() -> None:
    assert {f"{name}.md" for name in check.GUIDES} == {page.name for page in (ROOT / "docs/pages/guides").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_of_the_repository_are_there(page: Path) -> None:
    """Names in backticks that begin with one of our folders."""
    named = re.findall(r"`((?:model|platform|serve|jobs|infra|docs|tests|benchmarks)/[\w./-]*)`", page.read_text())
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """Also where no site is built: README and CONTRIBUTING. Pages of the reference are made at the build."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    made = {"reference", "pictures/imports.svg"}
    wrong = [one for one in targets if not (page.parent / one).exists() and not any(part in one for part in made)]
    assert wrong == []


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 130
    shown = "\n".join(block.text for block in BLOCKS if block.page == "README.md")
    assert shown.index("git clone") < shown.index("make quickstart") < shown.index("make test")


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zensical")
    assert build.main() == 0, capfd.readouterr()
    assert (build.OUT / "site" / "reference" / "jobs" / "pretrain.html").is_file()


def test_a_page_that_loads_a_script_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://arxiv.org/abs/2405.09818">x</a><script src="https://unpkg.com/m.js">'
    )
    assert build.fetched(tmp_path) == ['a.html loads src="https://unpkg.com/m.js']
