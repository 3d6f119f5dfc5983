"""The model itself, in plain PyTorch: it runs on a machine that has nothing else of calumma's platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calumma.model.document import Document, Image, Text

if TYPE_CHECKING:
    from calumma.model.answering import generate
    from calumma.model.directory import MixedModalModel, load

__all__ = ["Document", "Image", "MixedModalModel", "Text", "generate", "load"]


def __getattr__(name: str) -> Any:
    """torch is imported with the first use of a model: reading a specification or a document needs none of it."""
    if name in ("MixedModalModel", "load"):
        from calumma.model import directory

        return getattr(directory, name)
    if name == "generate":
        from calumma.model.answering import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
