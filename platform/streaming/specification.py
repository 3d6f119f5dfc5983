"""How a stage says what it reads: sources by weight, an earlier stage's mixture, how shards are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from calumma.platform.specification import JobSpecification, Section, repeated

if TYPE_CHECKING:
    from calumma.platform.shards.row_groups import RowGroupReader


class MixtureOf(Section):
    """The mixture of an earlier stage, as part of this one's (paper section 2.2: at half its weight in stage 2)."""

    stage: str = Field(description="output of the earlier stage")
    share: float = Field(
        gt=0, le=1, description="of this stage's micro-batches; the rest is for the sources in mixture"
    )


class ShardCacheSettings(Section):
    """A local cache of shards, shared by the workers of a machine."""

    directory: str = Field(description="folder on a local disk of every node")
    gigabytes: float = Field(gt=0, description="what it may take; the copies not read for longest make room")


class ReadingSettings(Section):
    """How token shards are read."""

    verify: bool = Field(True, description="check every row group that is read against its digest")
    cache: ShardCacheSettings | None = Field(None, description="keep copies of whole shards; none: read parts of them")

    def reader(self) -> RowGroupReader:
        """Of token shards, as these settings say."""
        from calumma.platform.shards.cache import ShardCache
        from calumma.platform.shards.row_groups import RowGroupReader

        cache = ShardCache(self.cache.directory, int(self.cache.gigabytes * 1e9)) if self.cache else None
        return RowGroupReader(None, self.verify, cache)


class MixtureSpecification(JobSpecification):
    """The part of a stage's specification that decides what it reads: sources by weight, and how much of them."""

    mixture: dict[str, float] = Field({}, description="token shards -> weight; weights need not add up to anything")
    mixture_of: MixtureOf | None = None
    max_epochs: float | None = Field(
        None, gt=0, description="passes through a source beyond which the stage is refused; none: a warning beyond 4"
    )
    data: ReadingSettings = ReadingSettings()
    output: str = Field(description="folder of checkpoints, the model directory and the manifest")
    steps: int = Field(ge=1, description="optimizer steps of this stage")
    micro_batches: int = Field(ge=1, description="micro-batches a global batch, whatever the number of workers")

    @model_validator(mode="after")
    def _some_mixture(self) -> Self:
        if twice := repeated(self.locate(uri).rstrip("/") for uri in self.mixture):
            raise ValueError(f"mixture: {', '.join(twice)} is named more than once; give each source one weight")
        bad = {k: v for k, v in self.mixture.items() if v <= 0}
        if bad:
            raise ValueError(f"mixture weights must be above 0, found {bad}")
        if not self.mixture and self.mixture_of is None:
            raise ValueError(
                "mixture: name at least one directory of token shards, or an earlier stage in `mixture_of`"
            )
        if self.mixture_of and bool(self.mixture) != (self.mixture_of.share < 1):
            given = f"{self.mixture_of.share:g}, and `mixture` names {len(self.mixture)} sources for the rest"
            raise ValueError(f"mixture_of.share is {given}; a share below 1 needs some, a share of 1 none")
        return self
