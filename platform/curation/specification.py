"""What a curation may be asked: its sources and its steps, each turned on by naming it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from calumma.platform.sources.specification import Source
from calumma.platform.specification import JobSpecification, Resources, Section, repeated


class CurationStep(Section):
    """A step of the curation; a specification turns it on by naming it."""

    sources: list[str] | None = Field(None, min_length=1, description="the sources it applies to, by name; none: all")


class TextRules(CurationStep):
    """Lengths and languages of texts and pages. Of image-caption pairs the language only: lengths are CaptionRules'."""

    min_characters: int = Field(0, ge=0, description="of all its text")
    max_characters: int | None = Field(None, ge=1, description="of all its text")
    min_words: int = Field(0, ge=0, description="of all its text")
    max_words: int | None = Field(None, ge=1, description="of all its text")
    languages: list[str] = Field([], description="ISO 639-1 codes that are kept; none: all, and none is looked for")
    min_probability: float = Field(0.6, ge=0, le=1, description="that a text must reach in its language")


class ImageRules(CurationStep):
    """Sizes and damage of images. A failing image takes its document with it, of a page (unless told otherwise) only
    itself."""

    min_side: int = Field(1, ge=1, description="pixels of the shorter side")
    max_side: int | None = Field(None, ge=1, description="pixels of the longer side")
    max_aspect: float | None = Field(None, ge=1, description="longer side by shorter side")
    pages: Literal["image", "document"] = Field("image", description="what a failing image of a page takes with it")
    strict: bool = Field(
        False, description="refuse what browsers show all the same: a JPEG without its end, a PNG with damaged text"
    )


class CaptionRules(CurationStep):
    """Captions of image-caption pairs."""

    min_words: int = Field(1, ge=0, description="of a caption")
    max_words: int | None = Field(None, ge=1, description="of a caption")
    min_letters: float = Field(0.0, ge=0, le=1, description="share of letters among all characters but white space")
    max_repetition: float = Field(1.0, ge=0, le=1, description="share of words that repeat an earlier one")
    boilerplate: bool = Field(True, description="drop file names, camera names, web addresses, `image 3 of 7`, …")
    patterns: list[str] = Field([], description="regular expressions; a caption in which one is found is dropped")

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns


class NameRules(CurationStep):
    """Which names (licenses, domains) are kept: those allowed, if any are given, and not denied."""

    allow: list[str] = Field([], description="names that are kept; none: all")
    deny: list[str] = Field([], description="names that are dropped, whatever is allowed")
    deny_file: str | None = Field(None, description="location of a text file with one more denied name a line")
    unknown: Literal["keep", "drop"] = Field("keep", description="what becomes of documents that say none")


Personal = Literal["email", "phone", "ip", "credit_card", "iban"]


class ScrubRules(CurationStep):
    """What is replaced in texts and captions by a mark such as <EMAIL>."""

    personal: list[Personal] = Field(list(get_args(Personal)), description="kinds of personal data")
    secrets: bool | list[str] = Field(
        True, description="keys and tokens: by all detectors of a known form, or by these, as detect-secrets names them"
    )
    hooks: list[str] = Field([], description="package.module:function, each given a text and returning it scrubbed")


class Upsampling(Section):
    above: float = Field(description="documents of a higher score are repeated")
    times: float = Field(ge=1, description="copies of each; the fraction decides by the document's hash")


class Scorer(CurationStep):
    """A model or measure that gives images or documents a number to choose by."""

    factory: str = Field(
        description="package.module:function, called with `arguments` once in every actor; what it returns is called "
        "with lists (RGB images, or documents) and returns a number for each"
    )
    arguments: dict[str, Any] = Field({}, description="what `factory` is called with")
    of: Literal["images", "documents"] = Field("images", description="what it is given: RGB images, or whole documents")
    reduce: Literal["mean", "min", "max"] = Field("mean", description="the score of a document with several images")
    minimum: float | None = Field(None, description="documents of a lower score are dropped")
    maximum: float | None = Field(None, description="documents of a higher score are dropped")
    upsample: Upsampling | None = Field(None, description="repeat documents of a high score")
    batch: int = Field(32, ge=1, description="images or documents a call")
    resources: Resources = Resources()


class NearDuplicates(Section):
    """Texts that share most of their runs of words (MinHash)."""

    similarity: float = Field(0.8, gt=0, lt=1, description="Jaccard, of the sets of runs of words")
    words: int = Field(5, ge=1, description="length of a run")
    permutations: int = Field(128, ge=16, multiple_of=2, description="values of a signature")


class ImageDuplicates(Section):
    """Image-caption pairs whose images look alike (perceptual hash)."""

    distance: int = Field(4, ge=0, le=10, description="bits, of 64, that two hashes may differ in")


class DuplicateRules(CurationStep):
    """Of documents that are alike the first stays, by the order of sources in the specification, files, and places."""

    exact: bool = Field(True, description="equal but for case and white space, and equal images")
    near: NearDuplicates | None = None
    images: ImageDuplicates | None = None


class Decontamination(CurationStep):
    """Drops documents that contain parts of evaluation sets."""

    against: list[str] = Field(
        min_length=1, description="locations: curated directories, .jsonl or .json (every string in them), .txt (lines)"
    )
    ngram: int = Field(13, ge=2, description="words in a row that a document may not share with an evaluation set")
    shortest: int = Field(8, ge=2, description="evaluation texts of fewer words than `ngram` count down to this length")
    image_distance: int | None = Field(
        None, ge=0, le=16, description="bits, of 64, that perceptual hashes of images may differ in; none: texts only"
    )


class CurateSpecification(JobSpecification):
    """Raw files -> checked, ordered documents in Parquet shards, a manifest a source, a report of what was dropped."""

    job: Literal["curate"] = "curate"
    sources: list[Source] = Field(
        min_length=1, description="what is read, in this order; of duplicates the earlier stays"
    )
    output: str = Field("curated", description="folder of the documents, one below it a source")
    image_first: float = Field(0.5, ge=0, le=1, description="share of image-caption pairs whose image stands first")
    min_text: int = Field(1, ge=0, description="characters; plain-text documents below it are dropped")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="the job fails when more input than this is unreadable")
    documents_per_shard: int = Field(1000, ge=1, description="in one Parquet file")
    licenses: NameRules | None = Field(None, description="names may hold wildcards, say `cc-by*`")
    domains: NameRules | None = Field(None, description="of the documents' URLs; a name covers its subdomains")
    images: ImageRules | None = None
    captions: CaptionRules | None = None
    texts: TextRules | None = None
    decontaminate: Decontamination | None = None
    scrub: ScrubRules | None = None
    duplicates: DuplicateRules | None = None
    scorers: dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")], Scorer] = Field({}, description="by name")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if twice := repeated(source.name for source in self.sources):
            raise ValueError(f"sources: the name {', '.join(twice)} is given more than once; names must differ")
        return self

    @model_validator(mode="after")
    def _known_sources(self) -> Self:
        known = [source.name for source in self.sources]
        for place, step in self._steps().items():
            if unknown := sorted(set(step.sources or ()) - set(known)):
                raise ValueError(
                    f"{place}.sources: there is no source {', '.join(unknown)}; sources are {', '.join(known)}"
                )
        return self

    def _steps(self) -> dict[str, CurationStep]:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        fields |= {f"scorers.{name}": scorer for name, scorer in self.scorers.items()}
        return {place: step for place, step in fields.items() if isinstance(step, CurationStep)}

    def only(self, names: Iterable[str]) -> Self:
        """The specification of some of its sources alone, without the steps that apply to none of them."""
        chosen = [source for source in self.sources if source.name in set(names)]

        def narrowed(step: Any) -> Any:
            if step.sources is None:
                return step
            left = [source.name for source in chosen if source.name in step.sources]
            return step.model_copy(update={"sources": left}) if left else None

        steps: dict[str, Any] = {place: narrowed(step) for place, step in self._steps().items() if "." not in place}
        scorers = {name: scorer for name, scorer in self.scorers.items() if narrowed(scorer)}
        steps["scorers"] = {name: narrowed(scorer) for name, scorer in scorers.items()}
        return self.model_copy(update={"sources": chosen, **steps})
