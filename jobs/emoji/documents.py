"""The raw documents of the quickstart in colour: captions, pages, questions both ways, edits and stories with pictures.

Combinations are held out first (`pictures.split`); only training pictures are turned, scaled and shifted for more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from calumma.jobs.emoji import conversations as talk
from calumma.jobs.emoji.pictures import LICENSES, Picture, choose, read_sets, split
from calumma.jobs.quickstart.conversations import Conversation, wordings
from calumma.jobs.quickstart.documents import FileMakers, RawFile, json_lines, page_table, tars, write_sources
from calumma.platform.cluster.progress import Progress, no_progress
from calumma.platform.specification import JobSpecification, Section

if TYPE_CHECKING:
    from calumma.platform.storage.manifest import Manifest

# fmt: off
WITH_SKINS = (
    "waving hand", "raised hand", "thumbs up", "thumbs down", "victory hand", "OK hand", "raised fist", "folded hands",
    "clapping hands", "flexed biceps", "ear", "baby", "teacher", "student", "farmer", "cook", "artist", "pilot",
    "astronaut", "firefighter", "police officer", "mechanic", "scientist", "judge",
)
# fmt: on
URLS = {"Noto": "https://github.com/googlefonts/noto-emoji", "Fluent": "https://github.com/microsoft/fluentui-emoji"}
UNICODE = {"license": "Unicode-3.0", "url": "https://cldr.unicode.org"}


class Sizes(Section):
    """How much is written."""

    groups: list[str] = Field(["Food & Drink", "Animals & Nature"], description="of Unicode, whose things are shown")
    things: int = Field(48, description="of these groups")
    with_skins: int = Field(8, description="hands and people in six skins, of 24")
    more: int = 1500  # pictures of other things, which the image tokenizer alone learns from
    pairs: int = 4000
    pages: int = 600
    recognition: int = 2000
    styles: int = 400
    drawing: int = 2000
    edits: int = 1200
    stories: int = 500
    keywords: int = 200
    asked: int = 96  # held-out combinations asked about, at most
    judge_copies: int = 3  # moved copies of each real picture for the judge
    moved_pairs: float = Field(0.3, description="share of captioned pictures that are turned, scaled and shifted")
    moved_recognition: float = Field(0.8, description="of those asked about: else they are told by a few codes' places")
    moved_drawing: float = Field(0.0, description="of those to be drawn: each more is another picture to learn")


FULL = Sizes()
LARGE = Sizes(
    groups=[
        "Activities",
        "Animals & Nature",
        "Food & Drink",
        "Objects",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    ],
    things=1200,
    with_skins=24,
    more=4000,
    pairs=120_000,
    pages=20_000,
    recognition=60_000,
    styles=8_000,
    drawing=60_000,
    edits=30_000,
    stories=16_000,
    keywords=6_000,
    asked=480,
)
FAST = Sizes(
    things=12,
    with_skins=2,
    more=20,
    pairs=80,
    pages=20,
    recognition=40,
    styles=10,
    drawing=40,
    edits=20,
    stories=20,
    keywords=10,
    asked=4,
    judge_copies=1,
)


class ColourDocumentsSpecification(JobSpecification):
    """Compared with the one in the manifest, like any job's, to see whether the step is finished."""

    job: Literal["documents"] = "documents"
    output: str = "documents"
    sets: str | None = Field(None, description="folder of sets by calumma.jobs.emoji.rasterize; none: those that ship")
    sizes: Sizes = FULL
    samples_per_tar: int = 500
    wordings: Literal[2] = 2  # counts up when the questions are worded anew


def pictures(spec: ColourDocumentsSpecification) -> tuple[list[Picture], list[Picture]]:
    """(training, held-out) pictures of a specification."""
    sizes = spec.sizes
    return split(choose(read_sets(spec.sets), sizes.groups, sizes.things, WITH_SKINS[: sizes.with_skins]), spec.seed)


def write(spec: ColourDocumentsSpecification, progress: Progress = no_progress) -> Manifest:
    """Write the documents of a specification, a manifest for each source, and the whole's last. Raises StorageError."""
    train, held_out = pictures(spec)
    report = {
        "train": len(train),
        "held_out": len(held_out),
        "split": "by combination: every thing, skin and style of a held-out picture is trained in other pictures",
        "augmentation": "training pictures turned by up to 10 degrees, scaled to 0.8 at least, shifted by up to 5 %",
    }
    return write_sources(spec, _file_makers(spec, train, held_out), {"pictures": report}, progress)


def _file_makers(spec: ColourDocumentsSpecification, train: list[Picture], held_out: list[Picture]) -> FileMakers:
    """Source name -> what makes its files. Each has its own random numbers: one source's size changes no other."""
    sizes = spec.sizes
    album = Album(train)
    asked = held_out[:: max(1, len(held_out) // sizes.asked)][: sizes.asked]

    def random(stream: int) -> np.random.Generator:
        return np.random.default_rng([spec.seed, stream])

    def labelled(name: str, chosen: Sequence[Picture], copies: int, stream: int) -> Iterator[RawFile]:
        """Pictures with their labels: once as they are unless only copies are wanted."""
        chance = random(stream)
        shown = [(p, p.word, f"{p.name}-{copy}") for copy in range(copies + 1) for p in chosen]
        samples = ((key, (p if key.endswith("-0") else p.moved(chance)).png(), word) for p, word, key in shown)
        return tars(name, samples, spec.samples_per_tar, {"license": "mixed"})

    def moved(name: str, chosen: Sequence[Picture], stream: int) -> Iterator[RawFile]:
        chance = random(stream)
        samples = ((p.name, p.moved(chance).png(), p.word) for p in chosen)
        return tars(name, samples, spec.samples_per_tar, {"license": "mixed"})

    def chats(name: str, made: list[Conversation]) -> list[RawFile]:
        return [(f"{name}.jsonl", json_lines([chat.row() for chat in made]), len(made))]

    def drawn(
        stream: int, count: int, templates: tuple[str, ...], moved_share: float = 0.0
    ) -> Iterator[tuple[Picture, int]]:
        """(picture, wording): every training picture once before any again; of later ones a share is moved."""
        chance = random(stream)
        kinds = wordings(chance, templates, count) if len(templates) > 1 else [0] * count
        order = [int(i) for _ in range(count // len(train) + 1) for i in chance.permutation(len(train))][:count]
        for place, (index, kind) in enumerate(zip(order, kinds, strict=True)):
            moves = place >= len(train) and chance.random() < moved_share
            yield (train[index].moved(chance) if moves else train[index]), kind

    def pairs() -> Iterator[RawFile]:
        samples = (
            (f"{place:06d}-{p.name}", p.png(), talk.caption(p, kind))
            for place, (p, kind) in enumerate(drawn(1, sizes.pairs, talk.CAPTIONS, sizes.moved_pairs))
        )
        return tars("pairs", samples, spec.samples_per_tar, {"license": "mixed"})

    return {
        "pictures_train": lambda: labelled("pictures_train", train, 0, 10),
        "pictures_held_out": lambda: labelled("pictures_held_out", held_out, 0, 11),
        "pictures_more": lambda: labelled("pictures_more", _others(spec, [*train, *held_out]) or train, 0, 14),
        "judge_train": lambda: labelled("judge_train", [*train, *held_out], sizes.judge_copies, 12),
        "judge_held_out": lambda: moved("judge_held_out", held_out, 13),
        "pairs": pairs,
        "text": lambda: [_text(read_sets(spec.sets))],
        "pages": lambda: [_pages(album, sizes.pages, random(2))],
        "chat_recognition": lambda: chats(
            "chat_recognition",
            [
                talk.recognition_chat(p, k)
                for p, k in drawn(3, sizes.recognition, talk.RECOGNITION, sizes.moved_recognition)
            ],
        ),
        "chat_style": lambda: chats(
            "chat_style", [talk.style_chat(p, k) for p, k in drawn(4, sizes.styles, talk.STYLE)]
        ),
        "chat_drawing": lambda: chats(
            "chat_drawing",
            [talk.drawing_chat(p, k) for p, k in drawn(5, sizes.drawing, talk.DRAWING, sizes.moved_drawing)],
        ),
        "chat_edit": lambda: chats("chat_edit", _edits(album, sizes.edits, random(6))),
        "chat_story": lambda: chats(
            "chat_story", [talk.story_chat(*album.pair(chance)) for chance in [random(7)] for _ in range(sizes.stories)]
        ),
        "chat_text": lambda: chats(
            "chat_text", [talk.keyword_chat(p, k) for p, k in drawn(8, sizes.keywords, talk.KEYWORDS) if p.keywords]
        ),
        "ask_recognition": lambda: chats("ask_recognition", [talk.recognition_chat(p) for p in asked]),
        "ask_style": lambda: chats("ask_style", [talk.style_chat(p) for p in asked]),
        "ask_trained": lambda: chats("ask_trained", [talk.recognition_chat(p) for p in _spread(train, len(asked))]),
        "ask_drawing": lambda: chats("ask_drawing", [talk.drawing_chat(p) for p in asked]),
        "ask_drawing_trained": lambda: chats(
            "ask_drawing_trained", [talk.drawing_chat(p) for p in _spread(train, len(asked))]
        ),
        "ask_edit": lambda: chats("ask_edit", [talk.edit_chat(album.before(p), p) for p in asked]),
        "ask_story": lambda: chats(
            "ask_story",
            [talk.story_chat(*album.pair(chance)) for chance in [random(9)] for _ in range(max(2, len(asked) // 4))],
        ),
    }


class Album:
    """Training pictures by what they have in common."""

    def __init__(self, train: Sequence[Picture]) -> None:
        self.train = list(train)
        self.by = {(p.thing, p.skin, p.style): p for p in train}
        self._plain: dict[tuple[str, str], list[Picture]] = {}
        for p in train:
            if not p.skin:
                self._plain.setdefault((p.group, p.style), []).append(p)

    def pair(self, random: np.random.Generator) -> tuple[Picture, Picture]:
        """Two things of one group in one style."""
        shelves = [own for own in self._plain.values() if len(own) > 1]
        sizes = np.array([len(own) for own in shelves], float)
        own = shelves[int(random.choice(len(shelves), p=sizes / sizes.sum()))]
        first, second = random.choice(len(own), size=2, replace=False)
        return own[int(first)], own[int(second)]

    def before(self, after: Picture) -> Picture:
        """What an edit makes `after` of: the usual skin in the same style, or the same in another style."""
        if after.skin:
            return self.by[after.thing, "", after.style]
        return next(p for p in self.train if (p.thing, p.skin) == (after.thing, "") and p.style != after.style)


def _edits(album: Album, count: int, random: np.random.Generator) -> list[Conversation]:
    """Half of them other skins, half other styles; both pictures are training pictures."""
    skins = [p for p in album.train if p.skin]
    styles = [
        p
        for p in album.train
        if any(q.style != p.style and (q.thing, q.skin) == (p.thing, p.skin) for q in album.train)
    ]
    made = []
    for number in range(count):
        pool = skins if number % 2 and skins else styles
        after = pool[int(random.integers(len(pool)))]
        others = [
            p
            for p in album.train
            if p.thing == after.thing
            and ((p.style == after.style) != (p.skin == after.skin))
            and (p.style != after.style) == (pool is styles)
        ]
        before = others[int(random.integers(len(others)))]
        templates = talk.RESTYLED if before.style != after.style else talk.SKIN
        made.append(talk.edit_chat(before, after, wordings(random, templates, 1)[0]))
    return made


def _spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    count = min(count, len(pictures))
    return [pictures[i] for i in np.linspace(0, max(0, len(pictures) - 1), count).round().astype(int)]


def _others(spec: ColourDocumentsSpecification, shown: Sequence[Picture]) -> list[Picture]:
    """Pictures of none of the things that are shown."""
    known = {p.thing for p in shown}
    return _spread([p for p in read_sets(spec.sets) if p.thing not in known], spec.sizes.more)


def _text(every: Sequence[Picture]) -> RawFile:
    """Names and keywords of all there is, as Unicode gives them."""
    lines = {f"{p.thing}: {', '.join(p.keywords)}." for p in every if p.keywords}
    rows: list[dict[str, Any]] = [{"text": line, **UNICODE} for line in sorted(lines)]
    return "text.jsonl", json_lines(rows), len(rows)


def _pages(album: Album, count: int, random: np.random.Generator) -> RawFile:
    """Two things of one group and style, each named before its picture."""
    rows: dict[str, list[Any]] = {"texts": [], "images": [], "captions": [], "license": [], "url": []}
    for _ in range(count):
        pair = album.pair(random)
        texts: list[str | None] = []
        images: list[bytes | None] = []
        captions: list[str | None] = []
        for place, picture in enumerate(pair):
            lead = " and " if place else talk.opening(pair)
            texts += [f"{lead}{talk.with_article(picture.phrase)} ", None]
            images += [None, picture.png()]
            captions += [None, picture.word]
        rows["texts"].append(texts)
        rows["images"].append(images)
        rows["captions"].append(captions)
        rows["license"].append(LICENSES.get(pair[0].style, ""))
        rows["url"].append(URLS.get(pair[0].style, ""))
    return "pages-00000.parquet", page_table(rows), count
