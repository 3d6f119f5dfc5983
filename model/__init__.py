"""The model itself, in plain PyTorch: it runs on a machine that has nothing else of calumma's platform."""

from calumma.model.directory import MixedModalModel, load
from calumma.model.document import Document, Image, Text

__all__ = ["Document", "Image", "MixedModalModel", "Text", "load"]
