"""The page of the command line: every command with its arguments and options, from Typer's own description."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from docs import house
from docs.reference.fields import cell, plain

VALUES = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}


def page() -> str:
    head = (
        "# Commands\n\n"
        "`calumma --help`, and `--help` behind any command, say the same in the terminal. Exit codes: 0 when all went\n"
        "well, 1 after an error, 2 for a command that was typed wrong, 130 after Ctrl-C."
    )
    return "\n\n".join([head, *_commands(house.command_line(), ["calumma"])]) + "\n"


def _commands(command: Any, words: list[str]) -> Iterator[str]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield _section(command, words)
    for name, one in (inner or {}).items():
        yield from _commands(one, [*words, name])


def _section(command: Any, words: list[str]) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and "--help" not in one.opts]
    usage = " ".join([*words, *(_metavar(one) for one in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## {' '.join(words)}", f"```text\n{usage}\n```", plain(inspect.cleandoc(command.help or ""))]
    if arguments:
        parts.append(
            _table("argument", [(_metavar(one), plain(getattr(one, "help", None) or ""), "") for one in arguments])
        )
    if options:
        parts.append(_table("option", [_option(one) for one in options]))
    return "\n\n".join(parts)


def _table(head: str, rows: list[tuple[str, str, str]]) -> str:
    """Of (name, meaning, default); without a column of defaults where there are none."""
    with_defaults = any(default for _, _, default in rows)
    titles = [head, *(["default"] if with_defaults else []), "meaning"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, meaning, default in rows:
        cells = [f"`{name}`", *([f"`{default}`" if default else ""] if with_defaults else []), cell(meaning)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _metavar(argument: Any) -> str:
    return argument.metavar or (argument.name or "").upper()


def _option(option: Any) -> tuple[str, str, str]:
    annotation = option.type_descriptor.annotation
    choices = get_args(annotation)
    annotation = next(iter(choices), annotation)  # of an option that repeats
    kind = "|".join(choices) if isinstance(annotation, str) else VALUES.get(annotation, annotation.__name__.upper())
    given = "" if option.is_flag else f" {option.metavar or kind}"
    told, _, settled = (option.help or "").partition("  [default: ")
    meaning = plain(told)
    if option.envvar:
        meaning += f" Also from `${option.envvar}`."
    if option.required:
        meaning += " **Required.**"
    default = "" if option.default in (None, False, ()) or option.required else str(option.default)
    default = settled.rstrip("]") or default
    return f"{', '.join(option.opts)}{given}", meaning, default
