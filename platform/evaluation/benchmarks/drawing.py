"""Pictures from captions (Fréchet distance, CLIP score, diversity), the image tokenizer's copies, prompt following.

The weights that measure are at a location that is given: `inception` a TorchScript file (inception-2015-12-05.pt, the
one that clean-fid uses) or a .pth (weights-inception-2015-12-05-6726825d.pth, which torch-fidelity and so torchmetrics
use, or pytorch-fid's); `clip` a folder as transformers keeps it. Without them these figures are left out, and told.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.evaluation.benchmarks.captions import read_captions
from calumma.platform.evaluation.benchmarks.files import files_below, named, rows_of
from calumma.platform.evaluation.benchmarks.items import (
    Answers,
    BenchmarkDataError,
    Graded,
    Item,
    Measured,
    measured,
    pictures,
)
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.metrics import pictures as measures
from calumma.platform.evaluation.systems.prompts import Sampling
from calumma.platform.specification import SpecificationError, Tracking

if TYPE_CHECKING:
    import torch

BATCH = 16
Ask = Callable[[Sequence[tuple[Image, str]]], list[bool | None]]  # a judge: does the picture show that?


def read_drawing(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """A picture for the first caption of each image of Karpathy's test split, or another. Raises BenchmarkDataError."""
    items = []
    for number, item in enumerate(read_captions(_without_shots(task), location, seed)):
        caption = item.expected[0].strip()
        real = item.prompt.images[0].data
        prompt = Document((Text((task.prompt or "Draw a picture: {caption}").format(caption=caption), "user"),))
        items.append(Item(item.id, prompt, Sampling(mode="image", seed=seed + number), [caption, real], caption))
    return items


def _without_shots(task: SuiteTask) -> SuiteTask:
    return task.model_copy(update={"shots": 0})


def grade_drawing(items: Sequence[Item], answers: Answers, weights: dict[str, str]) -> Measured:
    drawn = [[image.open() for image in pictures(each)[:1]] for each in answers]
    values: list[dict[str, float]] = [{"drawn": float(bool(each))} for each in drawn]
    notes = []
    if clip := weights.get("clip"):
        from calumma.platform.curation.steps.models import agreement

        score = agreement(clip)
        documents = [
            Document((Text(item.expected[0]), Image(each[0]))) for item, each in zip(items, drawn, strict=True) if each
        ]
        found = iter(score(documents))
        for value, each in zip(values, drawn, strict=True):
            value["clip_score"] = max(0.0, next(found)) if each else 0.0
    else:
        notes.append("no CLIP score: `weights: {clip: …}` names no model")
    every = [picture for each in drawn for picture in each]
    together = {"distinct": measures.distinct(every), "diversity": measures.diversity(every)}
    if inception := weights.get("inception"):
        features = inception_features(inception)
        real = [Image(item.expected[1]).open() for item in items]
        if len(every) > 1:
            together["fid"] = measures.frechet(features(real), features(every))
    else:
        notes.append("no FID: `weights: {inception: …}` names no model")
    graded = [
        Graded(value, "a picture" if each else "no picture", item.expected[0])
        for item, value, each in zip(items, values, drawn, strict=True)
    ]
    return measured(graded, together, notes)


def inception_features(location: str) -> Callable[[Sequence[PILImage.Image]], np.ndarray]:
    """Features [N, D] by a TorchScript model that takes uint8 [N, 3, H, W], as StyleGAN's Inception does; of a .pth by
    the same network of ours, which resizes by itself. Raises SpecificationError, StorageError."""
    import torch

    if location.endswith(".pth"):
        return _weighed_features(location)
    data = storage.read_bytes(location)
    try:
        network = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except RuntimeError as error:
        raise SpecificationError(f"{location}: torch reads no TorchScript in it: {error}") from error

    def features(images: Sequence[PILImage.Image]) -> np.ndarray:
        rows = []
        for start in range(0, len(images), BATCH):
            arrays = [
                np.asarray(each.convert("RGB").resize((299, 299), PILImage.Resampling.BICUBIC))
                for each in images[start : start + BATCH]
            ]
            batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
            with torch.inference_mode():
                rows.append(_call(network, batch).flatten(1).double().numpy())
        return np.concatenate(rows)

    return features


def _weighed_features(location: str) -> Callable[[Sequence[PILImage.Image]], np.ndarray]:
    import torch

    from calumma.platform.evaluation.metrics.inception import Inception

    network = Inception().eval()
    try:
        network.load_state_dict(
            torch.load(io.BytesIO(storage.read_bytes(location)), map_location="cpu", weights_only=True)
        )
    except (RuntimeError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise SpecificationError(f"{location} has no weights of FID's Inception: {str(error)[:300]}") from error

    def features(images: Sequence[PILImage.Image]) -> np.ndarray:
        rows = []
        for image in images:  # sizes may differ
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
            with torch.inference_mode():
                rows.append(network(pixels).double().numpy())
        return np.concatenate(rows)

    return features


def _call(network: Any, batch: torch.Tensor) -> torch.Tensor:
    try:
        return network(batch, return_features=True)
    except (RuntimeError, TypeError):
        return network(batch)


# -- copies by the image tokenizer


def read_pictures(task: SuiteTask, location: str) -> list[str]:
    """Every picture below a location. Raises BenchmarkDataError."""
    found = [uri for uri in files_below(location) if uri.lower().endswith((".png", ".jpg", ".jpeg", ".webp"))]
    if not found:
        raise BenchmarkDataError(f"{location} has no pictures (.png, .jpg, .webp)")
    return found[: task.limit]


def reconstruct(model: str, tracking: Tracking, uris: Sequence[str], weights: dict[str, str]) -> Measured:
    """Each picture, cut to a square, through the model's image tokenizer and back."""
    import torch

    from calumma.model.images import preprocess, to_image
    from calumma.model.tokenizers.image import ImageTokenizer
    from calumma.platform.tracking.registry import resolve_model

    graded, real, copies = [], [], []
    with resolve_model(model, tracking) as directory:
        tokenizer = ImageTokenizer.read(directory / "image_tokenizer")
    for uri in uris:
        pixels = preprocess(Image(storage.read_bytes(uri)).open(), tokenizer.config.resolution, "crop")
        with torch.inference_mode():
            copy = to_image(tokenizer.decode(tokenizer.encode(pixels[None]))[0])
        original = to_image(pixels)
        one, other = measures.pixels(original), measures.pixels(copy)
        values = {"psnr": measures.psnr(one, other)}
        if min(one.shape[:2]) >= measures.LEAST:
            values["ssim"] = measures.ssim(one, other)
        graded.append(Graded(values, "a copy", uri.rpartition("/")[2]))
        real.append(original)
        copies.append(copy)
    together, notes = {}, []
    if (inception := weights.get("inception")) and len(real) > 1:
        features = inception_features(inception)
        together["rfid"] = measures.frechet(features(real), features(copies))
    else:
        notes.append("no rFID: `weights: {inception: …}` names no model")
    return measured(graded, together, notes)


# -- prompt following, by a judge


def read_following(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """GenEval's evaluation_metadata.jsonl (tag, prompt), or DPG-Bench's CSV (item_id, text, question_natural_language,
    …: several questions a prompt). Raises BenchmarkDataError."""
    asked: dict[str, tuple[str, list[str]]] = {}
    uri = named(location, r"(metadata\.jsonl|\.csv)$", "evaluation_metadata.jsonl or dpg_bench.csv")[0]
    rows = rows_of(uri)
    if uri.endswith(".csv"):
        header, *lines = [list(row.values()) for row in rows]
        if missing := {"item_id", "text", "question_natural_language"} - set(header):
            raise BenchmarkDataError(f"{uri} has no column {', '.join(sorted(missing))}; it has {', '.join(header)}")
        for cells in lines:
            row = dict(zip(header, cells, strict=False))
            asked.setdefault(row["item_id"], (row["text"], []))[1].append(row["question_natural_language"])
    else:
        for number, row in enumerate(rows):
            if not isinstance(row.get("prompt"), str):
                raise BenchmarkDataError(f"{uri}: line {number + 1} has no `prompt`")
            question = f"Does the picture show exactly this: {row['prompt']}?"
            asked[f"{row.get('tag', '')}/{number}"] = row["prompt"], [question]
    return [
        Item(
            key,
            Document((Text(text, "user"),)),
            Sampling(mode="image", seed=seed + number),
            [text, *questions],
            text,
        )
        for number, (key, (text, questions)) in enumerate(list(asked.items())[: task.limit])
    ]


def grade_following(items: Sequence[Item], answers: Answers, ask: Ask) -> Measured:
    """The share of questions that the judge answers with yes: `right` where it is all of a prompt's."""
    pairs, owners = [], []
    for number, (item, each) in enumerate(zip(items, answers, strict=True)):
        for picture in pictures(each)[:1]:
            pairs += [(picture, question) for question in item.expected[1:]]
            owners += [number] * (len(item.expected) - 1)
    verdicts: dict[int, list[bool | None]] = {}
    for owner, verdict in zip(owners, ask(pairs), strict=True):
        verdicts.setdefault(owner, []).append(verdict)
    graded = []
    for number, item in enumerate(items):
        own = verdicts.get(number, [])
        share = sum(verdict is True for verdict in own) / max(1, len(item.expected) - 1)
        said = ", ".join({True: "yes", False: "no", None: "?"}[verdict] for verdict in own) or "no picture"
        graded.append(Graded({"right": float(share == 1), "questions": share}, said, item.expected[0]))
    return measured(graded)


# -- interleaved answers


def read_interleaved(task: SuiteTask, location: str, seed: int) -> list[Item]:
    """JSON lines: `prompt`, and `structure` as it is asked for, say [text, image, text, image]."""
    [uri, *_] = named(location, r"\.jsonl$", "prompts as JSON lines")
    items = []
    for number, row in enumerate(rows_of(uri)[: task.limit]):
        structure = row.get("structure")
        if (
            not isinstance(row.get("prompt"), str)
            or not isinstance(structure, list)
            or set(structure) - {"text", "image"}
        ):
            raise BenchmarkDataError(f"{uri}: row {number + 1} has no `prompt` or no `structure` of text and image")
        sampling = Sampling("interleaved", 256, 0.7, 0.9, seed + number, max_images=structure.count("image") + 1)
        items.append(Item(str(number), Document((Text(row["prompt"], "user"),)), sampling, structure, row["prompt"]))
    return items


def grade_interleaved(items: Sequence[Item], answers: Answers, ask: Ask | None) -> Measured:
    """Whether texts and pictures follow each other as asked; and of each picture, whether it fits its text."""
    from calumma.platform.evaluation.tasks import texts_and_images

    graded, pairs, owners = [], [], []
    for number, (item, each) in enumerate(zip(items, answers, strict=True)):
        pieces = texts_and_images(each[0].document)
        given = ["text" if isinstance(piece, Text) else "image" for piece in pieces]
        wanted = item.expected.count("image")
        values = {
            "structure": float(given == item.expected),
            "pictures": float(given.count("image") == wanted),
        }
        graded.append(Graded(values, " ".join(given) or "nothing", " ".join(item.expected)))
        for place, piece in enumerate(pieces):
            beside = [
                other
                for other in (*pieces[max(0, place - 1) : place], *pieces[place + 1 : place + 2])
                if isinstance(other, Text)
            ]
            if isinstance(piece, Image) and beside:
                words = " ".join(beside[0].text.split())
                pairs.append((piece, f"Does the picture fit this text that stands beside it: {words}?"))
                owners.append(number)
    if ask is None:
        return measured(graded, notes=["no image-text agreement: no judge is named that looks at pictures"])
    fits: dict[int, list[bool | None]] = {}
    for owner, verdict in zip(owners, ask(pairs), strict=True):
        fits.setdefault(owner, []).append(verdict)
    graded = [
        replace(one, values={**one.values, "agreement": sum(v is True for v in fits[n]) / len(fits[n])})
        if n in fits
        else one
        for n, one in enumerate(graded)
    ]
    return measured(graded)
