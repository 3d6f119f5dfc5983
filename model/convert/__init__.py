"""Models of other projects to model directories and back: Hugging Face's Chameleon, Meta's release; and text models
made mixed-modal."""

from calumma.model.convert.hugging_face import export_hugging_face, import_hugging_face
from calumma.model.convert.meta import import_meta
from calumma.model.convert.names import ConversionError
from calumma.model.convert.text_model import extend_hugging_face

__all__ = ["ConversionError", "export_hugging_face", "extend_hugging_face", "import_hugging_face", "import_meta"]
