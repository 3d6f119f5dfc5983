"""Scorers with a model of others, loaded from a location that is given: faces (YuNet), aesthetics (LAION's heads) and
how well captions fit their images (CLIP). What they need is the extra `calumma[scorers]`.

    scorers:
      faces:
        factory: calumma.platform.curation.steps.models:faces
        arguments: {weights: s3://bucket/face_detection_yunet_2023mar.onnx}
        reduce: max                          # one face in one image is enough
        upsample: {above: 0.8, times: 2}     # paper section 2.1
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.curation.steps.scorers import DocumentScorer, ImageScorer
from calumma.platform.specification import SpecificationError

if TYPE_CHECKING:
    import torch

# OpenAI's, where a model's folder has no preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_SPREAD = (0.26862954, 0.26130258, 0.27577711)
STRIDE = 32  # pixels: YuNet's sides are multiples of it


def faces(weights: str, side: int = 640, least: float = 0.3) -> ImageScorer:
    """The confidence (0 to 1) of the surest face of an image that OpenCV's YuNet finds, 0 where none reaches `least`.

    `weights`: https://github.com/opencv/opencv_zoo, models/face_detection_yunet. Images are scaled down to `side`.
    """
    cv2 = _require("cv2", "opencv-python-headless")
    model = np.frombuffer(storage.read_bytes(weights), np.uint8)
    try:
        detector = cv2.FaceDetectorYN.create("onnx", model, np.empty(0, np.uint8), (side, side), least)
    except cv2.error as error:
        raise SpecificationError(f"{weights}: OpenCV reads no YuNet in it: {error}") from error

    def one(image: PILImage.Image) -> float:
        picture = image.convert("RGB")
        picture.thumbnail((side, side))
        width, height = (-(-length // STRIDE) * STRIDE for length in picture.size)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[: picture.height, : picture.width] = np.asarray(picture)[..., ::-1]  # blue first
        detector.setInputSize((width, height))
        _, found = detector.detect(pixels)
        return 0.0 if found is None else float(np.clip(found[:, -1].max(), 0, 1))

    return lambda images: [one(image) for image in images]


def aesthetics(clip: str, head: str, device: str | None = None) -> ImageScorer:
    """What people are predicted to say of an image from 1 to 10: a head of LAION on CLIP's normalized features.

    `clip`: a folder of CLIP as transformers keeps it (openai/clip-vit-large-patch14 for LAION's heads). `head`: .pth or
    .safetensors of https://github.com/LAION-AI/aesthetic-predictor (one linear layer) or of
    https://github.com/christophschuhmann/improved-aesthetic-predictor (several).
    """
    import torch

    model = _Clip.load(clip, device)
    layers = [(w.to(model.device), b.to(model.device)) for w, b in _linear_layers(head)]
    if layers[0][0].shape[1] != model.features:
        wanted = f"{layers[0][0].shape[1]} features, and {clip} gives {model.features}"
        raise SpecificationError(f"{head}: takes {wanted}; it was trained with another CLIP")

    def score(images: list[PILImage.Image]) -> list[float]:
        with torch.inference_mode():
            values = model.of_images(images)
            for weight, bias in layers:
                values = torch.nn.functional.linear(values, weight, bias)
            return [float(value) for value in values[:, 0]]

    return score


def agreement(clip: str, device: str | None = None) -> DocumentScorer:
    """The cosine of a caption's and its image's features by CLIP, of several pairs of a document the least; LAION-400M
    asked for 0.3 of ViT-B/32. A document without an image and words for it has 1: nothing disagrees.

    `clip`: a folder of CLIP as transformers keeps it.
    """
    import torch

    model = _Clip.load(clip, device)

    def score(documents: list[Document]) -> list[float]:
        pairs = [(n, image, words) for n, document in enumerate(documents) for image, words in _captioned(document)]
        scores = [1.0] * len(documents)
        if pairs:
            with torch.inference_mode():
                images = model.of_images([image.open() for _, image, _ in pairs])
                texts = model.of_texts([words for *_, words in pairs])
                for (number, *_), value in zip(pairs, (images * texts).sum(1).tolist(), strict=True):
                    scores[number] = min(scores[number], value)
        return scores

    return score


def _captioned(document: Document) -> list[tuple[Image, str]]:
    """Images with their captions, or the one image of a document with its words."""
    images = document.images
    found = [(image, image.caption) for image in images if image.caption]
    words = " ".join(s.text for s in document.segments if isinstance(s, Text)).strip()
    return found or ([(images[0], words)] if len(images) == 1 and words else [])


@dataclass(frozen=True)
class _Clip:
    """CLIP's two encoders; features have length 1."""

    model: Any
    tokenizer: Any
    size: int
    mean: Sequence[float]
    spread: Sequence[float]
    device: str
    features: int

    @classmethod
    def load(cls, location: str, device: str | None) -> _Clip:
        """Raises SpecificationError and StorageError."""
        import torch

        transformers = _require("transformers", "transformers")
        with storage.local_copy(location) as folder:
            try:
                model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True)
                tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, TypeError) as error:
                raise SpecificationError(f"{location}: transformers reads no CLIP in it: {error}") from error
            settings = _preprocessing(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            model.eval().to(device), tokenizer, model.config.vision_config.image_size,
            settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_SPREAD), device,
            model.config.projection_dim,
        )  # fmt: skip

    def of_images(self, images: Sequence[PILImage.Image]) -> torch.Tensor:
        """FloatTensor [images, features]: the shorter side scaled to the model's, the middle of it."""
        import torch

        pixels = np.stack([_middle(image, self.size) for image in images]).astype(np.float32) / 255
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.spread, np.float32)
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
        vision = self.model.vision_model(pixel_values=batch).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(vision))

    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """FloatTensor [texts, features]; what is longer than the model's context is cut."""
        import torch

        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return torch.nn.functional.normalize(self.model.text_projection(self.model.text_model(**inputs).pooler_output))


def _middle(image: PILImage.Image, size: int) -> np.ndarray:
    """As OpenAI prepared images: bicubic, the shorter side to `size`, cut around the middle."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, int(length * scale)) for length in image.size)
    image = image.resize((width, height), PILImage.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _preprocessing(folder: Path) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: values[name] for name in ("image_mean", "image_std") if values.get(name)}


def _linear_layers(location: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and biases of the linear layers of a file, in their order (dropout between them does nothing here).

    Raises SpecificationError and StorageError."""
    import torch
    from safetensors.torch import load

    data = storage.read_bytes(location)
    try:
        tensors = (
            load(data) if location.endswith(".safetensors") else torch.load(io.BytesIO(data), "cpu", weights_only=True)
        )
        names = sorted(
            (n for n in tensors if n.endswith("weight")), key=lambda n: [int(d) for d in re.findall(r"\d+", n)]
        )
        layers = [(tensors[n].float(), tensors[n.removesuffix("weight") + "bias"].float()) for n in names]
    except Exception as error:  # unpickling raises anything
        raise SpecificationError(f"{location}: holds no weights of linear layers: {error}") from error
    fit = all(a[0].shape[0] == b[0].shape[1] for a, b in itertools.pairwise(layers))
    if not layers or not fit or layers[-1][0].shape[0] != 1:
        raise SpecificationError(f"{location}: its layers do not follow each other to one score: {', '.join(names)}")
    return layers


def _require(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpecificationError(
            f"this scorer needs the package {package}, which is not installed: pip install 'calumma[scorers]'"
        ) from error
