"""Functions that a specification names as `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from calumma.platform.config import SpecificationError


def named(path: str, field: str) -> Callable[..., Any]:
    """The function behind a name. Raises SpecificationError, which names the field, when there is none."""
    module, separator, name = path.partition(":")
    if not separator or not module or not name:
        raise SpecificationError(f"{field}: {path!r} must look like package.module:function")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SpecificationError(f"{field}: there is no {path!r} on this machine: {error}") from error
    if not callable(found):
        raise SpecificationError(f"{field}: {path!r} is no function but {type(found).__name__}")
    return found
