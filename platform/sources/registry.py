"""Formats by name: what a source's `format` may be, and how a file of that format is read.

A reader is a generator function. It takes an opened `File` (and keyword-only options, which a source's `options` give)
and yields a `Draft` for each document and a `BadInput` for whatever is none:

    @reader("lines", (".txt",))
    def lines(file: File, *, shortest: int = 1) -> Iterator[ReaderItem]:
        for number, line in enumerate(file.content, start=1):
            if len(line) >= shortest:
                yield Draft((Text(line.decode()),), file.at(f"line {number}"))

A source may also name a function of one's own, decorated or not, as `package.module:function`; it must be importable
on every node.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from calumma.model.document import Document
from calumma.platform.sources.files import BadInput, Draft
from calumma.platform.specification import SpecificationError

ReaderItem = Draft | Document | BadInput
Reader = Callable[..., Iterator[ReaderItem]]
Choose = Callable[[list[str]], tuple[Collection[str], Collection[str]]]  # URIs -> (to read, read along with those)
USER_READER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Format:
    """`read(file, **options)` yields what it finds; below a folder, files of other suffixes are not input (no
    suffixes: all files are). References are paths below the source's `images`, by default the folder of the file or,
    for formats whose files link to each other, the whole location. `choose`, of layouts that are folders, says which of
    the files below one are read, and which others belong to these."""

    suffixes: tuple[str, ...]
    read: Reader
    references: Literal["file", "location"] = "file"
    choose: Choose | None = None


FORMATS: dict[str, Format] = {}


def reader(
    name: str,
    suffixes: tuple[str, ...],
    references: Literal["file", "location"] = "file",
    choose: Choose | None = None,
) -> Callable[[Reader], Reader]:
    """Register a reader. Raises ValueError when another function has the name."""

    def register(read: Reader) -> Reader:
        known = FORMATS.get(name)
        # Compared by name: a notebook may define its reader again.
        if known is not None and _qualified_name(known.read) != _qualified_name(read):
            raise ValueError(f"the format {name!r} is taken by {_qualified_name(known.read)}; choose another name")
        FORMATS[name] = Format(tuple(suffix.lower() for suffix in suffixes), read, references, choose)
        return read

    return register


def check_format(format: str, options: Mapping[str, Any]) -> None:
    """Whether a specification may name this format, with these options; a reader of one's own is not imported yet,
    since only the cluster may have it. Raises SpecificationError."""
    if format in FORMATS:
        checked_options(format, FORMATS[format].read, options)
    elif not USER_READER.fullmatch(format):
        raise SpecificationError(
            f"format {format!r} is not known; known are {', '.join(map(repr, sorted(FORMATS)))}, and a reader of your "
            "own as package.module:function"
        )


def find_format(format: str) -> Format:
    """The format of a name or of `package.module:function`. Raises SpecificationError."""
    check_format(format, {})
    if format in FORMATS:
        return FORMATS[format]
    module, _, function = format.partition(":")
    try:
        read = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise SpecificationError(
            f"format {format!r}: {module} cannot be imported ({error}); install it on every node, or give its folder "
            "to Ray as py_modules"
        ) from error
    if not callable(read):
        raise SpecificationError(f"format {format!r}: {module} has no function {function}")
    return next((f for f in FORMATS.values() if f.read is read), Format((), read))


def checked_options(format: str, read: Reader, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the types that the reader's keyword-only parameters ask for. Raises SpecificationError."""
    if not options:
        return {}
    from pydantic import TypeAdapter, ValidationError

    parameters = inspect.signature(read).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hints = get_type_hints(read, include_extras=True)
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in allowed and not anything:
            known = f"it knows {', '.join(allowed)}" if allowed else "it has none"
            raise SpecificationError(f"format {format!r} has no option {name!r}; {known}")
        try:
            values[name] = TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise SpecificationError(f"format {format!r}, option {name!r}: {message} (given {value!r})") from error
    return values


def _qualified_name(read: Reader) -> str:
    return f"{read.__module__}:{read.__qualname__}"
