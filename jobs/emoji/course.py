"""The course in colour: `calumma quickstart --colour`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calumma.jobs.emoji import conversations as talk
from calumma.jobs.emoji import documents
from calumma.jobs.emoji.documents import FAST, FULL, LARGE, ColourDocumentsSpecification
from calumma.jobs.emoji.pictures import Picture
from calumma.jobs.quickstart.conversations import IMAGE_MARK
from calumma.jobs.quickstart.course import FROM_IMAGE_TOKENIZER, Course, Extent, Step
from calumma.jobs.quickstart.questions import Question
from calumma.platform.reports.contact_sheet import Cell

LONGEST_STORY = 600  # tokens: two pictures of 256 codes, and their names
SHARES = {
    "recognition_accuracy": "Recognition: a held-out combination named, thing and skin",
    "trained_accuracy": "The same of pictures it has learned from",
    "style_accuracy": "Recognition: the style of a held-out combination",
    "drawing_accuracy": "Drawing: a held-out combination, all right by the judge",
    "drawing_thing": "Drawing: its thing right",
    "drawing_skin": "Drawing: its skin right",
    "drawing_style": "Drawing: its style right",
    "drawing_trained_accuracy": "Drawing: a trained combination, all right by the judge",
    "edit_accuracy": "Edit: a held-out combination from a picture of another, all right by the judge",
    "edit_thing": "Edit: its thing right",
    "edit_skin": "Edit: its skin right",
    "edit_style": "Edit: its style right",
    "story_valid": "Story: names and pictures alternate",
    "story_words": "Story: all names right",
    "story_digits": "Story: pictures all right by the judge",
    "judge_accuracy": "The judge itself, on moved copies of held-out pictures",
    "judge_thing": "The judge: things right",
    "judge_skin": "The judge: skins right",
    "judge_style": "The judge: styles right",
    "drawing_copies": "Drawings nearer to a training picture than nine in ten real ones",
    "drawing_distinct": "Drawings that equal no earlier one",
}
PLAIN = {
    "drawing_frechet": "Drawings of held-out combinations to real ones: Fréchet distance of colours and edges",
    "drawing_trained_frechet": "Drawings of trained combinations to real ones: the same",
    "drawing_nearest": "Drawings: distance to the nearest training picture",
    "drawing_nearest_real": "Real held-out pictures: the same",
}


def _documents(shared: dict[str, Any], extent: Extent) -> ColourDocumentsSpecification:
    sizes = FAST if extent.fast else LARGE if extent.large else FULL
    return ColourDocumentsSpecification(**shared, sets=extent.sets, sizes=sizes)


def _samples(spec: ColourDocumentsSpecification) -> dict[str, list[Cell]]:
    parts = zip(("train", "held_out"), documents.pictures(spec), strict=True)
    return {part: [Cell(p.picture(), p.phrase) for p in spread(shown, 40)] for part, shown in parts}


def spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """So many, evenly over the whole."""
    return [pictures[i * len(pictures) // min(count, len(pictures))] for i in range(min(count, len(pictures)))]


def questions(spec: ColourDocumentsSpecification) -> list[Question]:
    """Of held-out combinations: three named, three drawn, three made from another picture; three stories of two things
    of which the model has seen other styles as well."""
    train, held_out = documents.pictures(spec)
    plain, toned = [p for p in held_out if not p.skin], [p for p in held_out if p.skin]
    chosen = [*spread(plain, 2), *spread(toned, 1)]
    drawn = [*spread(plain[1:] or plain, 2), *spread(toned[1:] or toned, 1)]
    edited = [*spread(toned, 2), *spread(plain, 1)]
    album = documents.Album(train)
    asked = [Question("recognition", _without_mark(talk.RECOGNITION[0]), p) for p in chosen]
    asked += [Question("generation", talk.drawing_question(p)) for p in drawn]
    for after in edited:
        before = album.before(after)
        asked.append(Question("edit", _without_mark(talk.edit_question(before, after)), before))
    for first, second in zip(spread(plain, 3), spread(plain[1:], 3), strict=False):
        asked.append(Question("interleaved", talk.story_question(first, second), longest=LONGEST_STORY))
    return asked


def _without_mark(text: str) -> str:
    return text.replace(IMAGE_MARK, "").strip()


COLOUR = Course(
    name="colour",
    recipes="recipes/emoji",
    lead="evaluated on combinations it had never seen",
    steps=(
        Step("documents", "Documents", 40),
        Step("curate", "Curation", 30),
        Step("train_text_tokenizer", "Text tokenizer", 4),
        Step("train_image_tokenizer", "Image tokenizer", 240),
        Step("tokenize", "Token shards", 60),
        Step("stage1", "Pre-training, stage 1", 1200),
        Step("stage2", "Pre-training, stage 2", 170),
        Step("finetune", "Fine-tuning", 850),
        Step("evaluate", "Evaluation", 40),
        Step("serve", "Serving and questions", 40),
    ),
    documents=_documents,
    write=documents.write,
    samples=_samples,
    questions=questions,
    measured={**SHARES, **PLAIN, **FROM_IMAGE_TOKENIZER},
    targets={"recognition_accuracy": 0.5, "style_accuracy": 0.95, "drawing_accuracy": 0.5, "edit_accuracy": 0.5},
    kinds={
        "generation": "Words to picture: combinations it has never seen",
        "edit": "Picture to picture",
        "recognition": "Picture to words",
        "interleaved": "Words and pictures in turn",
    },
    sheets={
        "drawing": "Held-out combinations the model drew, each above what it was asked for",
        "drawing_trained": "Trained combinations the model drew",
        "edit": "Held-out combinations made from a picture of another",
        "story": "Pictures in stories, each above the name the model put before it",
        "recognition": "Held-out pictures, each above what the model read",
    },
    reconstructions="Held-out pictures (above) and what is left of them after the image tokenizer (below)",
    plain=frozenset({*PLAIN, "image_reconstruction_error"}),
)
