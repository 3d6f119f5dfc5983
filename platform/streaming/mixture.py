"""What a stage trains on: its sources with their weights, also when they build on those of an earlier stage.

The paper's second stage (section 2.2) keeps the first one's mixture at half its weight beside better data:
`mixture_of: {stage: stages/stage1, share: 0.5}`.
"""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from typing import TypeVar

from pydantic import ValidationError

from calumma.platform.specification import SpecificationError, basename
from calumma.platform.storage.manifest import Manifest
from calumma.platform.streaming.plan import Plan
from calumma.platform.streaming.specification import MixtureSpecification

logger = logging.getLogger(__name__)
Spec = TypeVar("Spec", bound=MixtureSpecification)
# Up to about four epochs repeated text trains as well as new text (Muennighoff et al., 2023, arXiv 2305.16264).
MOST_EPOCHS = 4.0
_EXACT = 1 << 53  # floats hold whole numbers exactly up to here


def resolve_mixture(spec: Spec) -> Spec:
    """The specification with all its weights in `mixture`, none left in `mixture_of`. Raises SpecificationError."""
    if spec.mixture_of is None:
        return spec
    weights = _weights(spec, ())
    # Whole numbers where they can be: shares that are exact make a plan with a short period.
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    whole = [int(weight * scale) for weight in weights.values()]
    divisor = math.gcd(*whole)
    exact = max(whole) // divisor < _EXACT
    mixture = {
        uri.removeprefix(f"{spec.storage.rstrip('/')}/"): float(count // divisor if exact else weight)
        for (uri, weight), count in zip(weights.items(), whole, strict=True)
    }
    return spec.model_copy(update={"mixture": mixture, "mixture_of": None})


def _weights(spec: MixtureSpecification, stages: tuple[str, ...]) -> dict[str, Fraction]:
    """URI of token shards -> its share of all; the shares add up to 1. `stages`: those that led here."""
    new = _normalized({spec.locate(uri): Fraction(str(weight)) for uri, weight in spec.mixture.items()})
    if spec.mixture_of is None:
        return new
    stage = spec.locate(spec.mixture_of.stage)
    if stage in stages:
        raise SpecificationError(
            f"mixture_of: the stages {', '.join((*stages, stage))} take their mixtures in a circle"
        )
    old = _weights(_stage_specification(stage), (*stages, stage))
    share = Fraction(str(spec.mixture_of.share))
    return {uri: share * old.get(uri, Fraction(0)) + (1 - share) * new.get(uri, Fraction(0)) for uri in [*old, *new]}


def _normalized(weights: dict[str, Fraction]) -> dict[str, Fraction]:
    total = sum(weights.values())
    return {uri: weight / total for uri, weight in weights.items()}


def _stage_specification(stage: str) -> MixtureSpecification:
    """The specification of a published stage, its storage root where the stage is now."""
    manifest = Manifest.find(stage)
    if manifest is None:
        raise SpecificationError(f"mixture_of.stage: no finished stage is published at {stage}; run it first")
    try:
        known = MixtureSpecification.model_fields
        spec = MixtureSpecification.model_validate({k: v for k, v in manifest.specification.items() if k in known})
    except ValidationError as error:
        raise SpecificationError(
            f"mixture_of.stage: {stage} holds {manifest.kind!r}, which records no mixture; name the output of a stage"
        ) from error
    below = f"/{spec.output.strip('/')}"
    moved = stage.rstrip("/").removesuffix(below) if stage.rstrip("/").endswith(below) else spec.storage
    return spec.model_copy(update={"storage": moved})


def check_epochs(spec: MixtureSpecification, plan: Plan) -> dict[str, float]:
    """How often the stage passes through each source, by its name in the mixture: logged, and refused beyond
    `max_epochs`. Raises SpecificationError."""
    planned = plan.epochs(spec.steps)
    epochs = {uri: planned[spec.locate(uri)] for uri in spec.mixture}
    listing = ", ".join(f"{basename(uri)} {count:.2f}" for uri, count in epochs.items())
    logger.info("epochs over %s steps: %s", spec.steps, listing)
    limit = MOST_EPOCHS if spec.max_epochs is None else spec.max_epochs
    exceeded = {uri: count for uri, count in epochs.items() if count > limit}
    if exceeded and spec.max_epochs is not None:
        listing = ", ".join(f"{count:.2f} of {uri}" for uri, count in exceeded.items())
        raise SpecificationError(
            f"max_epochs: {spec.steps} steps make more than {limit:g} epochs: {listing}; take fewer steps, give these "
            "sources less weight or more data, or raise max_epochs"
        )
    if exceeded:
        logger.warning(
            "trained on more than %g times: %s. Up to about 4 passes repeated data is as good as new data, then each "
            "further pass teaches less (Muennighoff et al. 2023, arXiv 2305.16264; the paper's model took 2.1). Where "
            "that is meant, as with data as small as the quickstart's, nothing needs doing: `max_epochs: %d` says so. "
            "Otherwise take fewer steps, or give these sources less weight or more data",
            limit,
            ", ".join(f"{uri} ({count:.1f} epochs)" for uri, count in exceeded.items()),
            math.ceil(max(exceeded.values())),
        )
    return epochs
