"""The picture of imports, and the blocks of pages."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs import imports
from docs.blocks import Block, blocks, commands
from docs.check import Failed, environment, perform, require_printed
from docs.house import ROOT


def test_circles_are_found_at_any_depth() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert imports.circles(edges) == [["a", "b", "c"], ["e", "f"]]


def test_imports_are_read_at_any_depth_and_of_packages(tmp_path: Path) -> None:
    for name, text in {
        "model/__init__.py": "",
        "model/a.py": "def f():\n    from calumma.model import b\n",
        "model/b.py": "import calumma.model.c.d\nimport os\n",
        "model/c/__init__.py": "",
        "model/c/d.py": "from calumma.model.a import f\nfrom calumma.model import f as g\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = imports.graph(imports.modules(tmp_path))
    assert found["model.a"] == {"model.b"}
    assert found["model.b"] == {"model.c.d"}
    assert found["model.c.d"] == {"model.a", "model"}
    between = imports.rooms(imports.modules(tmp_path), found)
    assert between == {"model.__init__": set(), "model.a, b": {"model.c"}, "model.c": {"model.__init__", "model.a, b"}}
    assert imports.circles(between) == [["model.a, b", "model.c"]]


def test_what_follows_from_others_is_left_out() -> None:
    edges = {"model.a": {"model.b", "model.c"}, "model.b": {"model.c"}, "model.c": set()}
    assert imports.reduced(edges) == {"model.a": {"model.b"}, "model.b": {"model.c"}, "model.c": set()}
    assert imports.layers(edges) == {"model.a": 2, "model.b": 1, "model.c": 0}


def test_nothing_imports_in_a_circle_today() -> None:
    assert imports.circles(imports.graph(imports.modules(ROOT))) == []


def test_the_picture_of_today_shows_every_room() -> None:
    picture = imports.draw(ROOT, "today")
    shown = {element.text for element in ElementTree.fromstring(picture).iter() if element.text}
    assert {"storage", "training", "generation", "today"} <= shown
    assert "0 circles of files" in picture


# -- blocks of pages


def page(folder: Path, text: str) -> list[Block]:
    (folder / "page.md").write_text(text)
    return list(blocks(folder / "page.md", folder))


def test_blocks_have_their_language_title_mark_and_place(tmp_path: Path) -> None:
    text = "# A\n\n<!-- elsewhere -->\n```sh\na\n```\n\n"
    text += '1. b\n\n    ```yaml title="c.yaml"\n    d: 1\n    ```\n\n'
    text += "<!-- part of curate -->\n```yaml\ne: 2\n```\n"
    first, second, third = page(tmp_path, text)
    assert [one.follows for one in (first, second, third)] == [False, False, True]
    assert (first.language, first.elsewhere, first.place, first.text) == ("sh", True, "page.md:4", "a\n")
    assert (second.title, second.text, second.shell) == ("c.yaml", "d: 1\n", False)
    assert third.part == "curate"


def test_a_mark_that_means_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page.md:2: <!-- elswhere -->"):
        page(tmp_path, "<!-- elswhere -->\n```sh\na\n```\n")


def test_commands_are_found_in_scripts() -> None:
    script = (
        "A=1 calumma x \\\n  --y z > out 2>&1  # calumma no\nls | calumma a 'b c' && echo calumma\nB=$(calumma q)\n"
    )
    assert list(commands(script)) == [["x", "--y", "z"], ["a", "b c"], ["q"]]


# -- following a page


def block(text: str, mark: str = "", language: str = "sh") -> Block:
    return Block("page.md", 1, language, None, mark, text)


def test_a_command_that_fails_is_told_unless_it_should(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    assert perform(block("echo one; pwd"), tmp_path, variables) == f"one\n{tmp_path}\n"
    with pytest.raises(Failed, match=r"page.md:1: ends with code 3"):
        perform(block("exit 3"), tmp_path, variables)
    with pytest.raises(Failed, match="succeeds"):
        perform(block("true", "fails"), tmp_path, variables)
    assert perform(block("echo why; false | true", "fails"), tmp_path, variables) == "why\n"
    assert perform(block("print(1)", language="python"), tmp_path, variables) == "1\n"


def test_lines_of_output_are_looked_for() -> None:
    printed = "\x1b[31mloss after 20 steps:   0.17\x1b[0m\n"
    require_printed(block("loss after 20 steps: …\n", language="text"), printed)
    with pytest.raises(Failed, match="nothing printed is like"):
        require_printed(block("loss after 21 steps: …\n", language="text"), printed)
