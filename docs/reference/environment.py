"""Which environment variables the code reads, sets or declares: what `pages/reference/environment.md` must tell.

Their meanings are written there by hand, since no code holds them; a test compares the page with `read_by`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "pages" / "reference" / "environment.md"
FOLDERS = ("model", "platform", "serve", "jobs", "infra")
NAME = re.compile(r"(AWS|CALUMMA|DS|MLFLOW|RAY|XDG)_\w+")


def told() -> set[str]:
    """All variables that the page's tables have."""
    return set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def read_by(root: Path) -> dict[str, set[str]]:
    """Variable -> files whose Python code names it where it reads, sets or declares environment variables."""
    found: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            for name in _variables(ast.parse(file.read_text(encoding="utf-8"))):
                found.setdefault(name, set()).add(file.relative_to(root).as_posix())
    return found


def _variables(tree: ast.Module) -> Iterator[str]:
    """Every string that is a variable's name by its prefix; of others, those in `os.environ[NAME]`, `.get(NAME)`,
    `.setdefault(NAME)`, `NAME in os.environ` and Typer's `envvar=NAME`."""

    def text(node: ast.expr) -> Iterator[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value

    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            yield node.value
        elif isinstance(node, ast.Subscript) and _is_environment(node.value):
            yield from text(node.slice)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if _is_environment(node.func.value) or node.func.attr == "getenv":
                yield from text(node.args[0])
        elif isinstance(node, ast.Compare) and any(map(_is_environment, node.comparators)):
            yield from text(node.left)
        elif isinstance(node, ast.keyword) and node.arg == "envvar":
            yield from text(node.value)


def _is_environment(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"
