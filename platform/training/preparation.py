"""What must hold before a stage starts, and what its workers share. Nothing in storage changes here."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import ValidationError

from calumma.model import config as model_config
from calumma.model import vocabulary as model_vocabulary
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.ops import stability
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest, ManifestError
from calumma.platform.tokenizing.specification import PREFERENCES, PreferenceTokensSpecification, TokenizeSpecification
from calumma.platform.tracking import registry, server
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.mirrors import require_clients
from calumma.platform.tracking.run import Run
from calumma.platform.training.assignment import Assignment, Checkpoint
from calumma.platform.training.checkpoints import branch, catalog, identity, room
from calumma.platform.training.publication import MODEL_FOLDER
from calumma.platform.training.sections import Preference
from calumma.platform.training.specification import FinetuneSpecification, TrainSpecification
from calumma.platform.training.steps import deepspeed_settings, sequence
from calumma.platform.training.trainable import parameters

logger = logging.getLogger(__name__)
_METRICS = 28  # of each report, but for those of the layers
_MOST_ROWS = 1_000_000  # metric values that SQLite may have of one run


def prepare(spec: TrainSpecification, run: Run) -> Assignment:
    """Settle everything that the workers share. Changes nothing in storage.

    Raises SpecificationError, in the terms of the specification; also when the output has another training's
    checkpoints.
    """
    require_clients(spec.tracking)
    _check_token_shards(spec)
    vocabulary = _read_vocabulary(spec)
    start = _starting_checkpoint(spec)
    initial = _initial_directory(spec) if start is None else None
    config = _model_config(spec, vocabulary, initial, start)
    _check_samples(spec, config)
    output = spec.locate(spec.output)
    inputs = fingerprints(
        [
            *(spec.locate(uri) for uri in spec.mixture),
            spec.locate(spec.text_tokenizer),
            spec.locate(spec.image_tokenizer),
            *([initial] if initial else []),
            *([start.uri] if start else []),
        ]
    )
    resume, origin, record = _resumed_checkpoint(spec, output, inputs, run)
    assignment = Assignment(
        spec=spec,
        config=config,
        vocabulary=vocabulary,
        run=run,
        output=output,
        inputs=inputs,
        initial=initial,
        continued=_continued_checkpoint(spec, start),
        resume=resume,
        origin=origin,
        branch=record,
        initial_checkpoint=start,
    )
    check_libraries(assignment)
    warn_of_many_metrics(spec, config.layers)
    return assignment


def _resumed_checkpoint(
    spec: TrainSpecification, output: str, inputs: dict[str, str], run: Run
) -> tuple[Checkpoint | None, Checkpoint | None, dict[str, Any] | None]:
    """The checkpoint to go on with; of a branch its origin and what is recorded of it, too."""
    own = catalog.newest(output, identity.made_by(spec, inputs))
    origin, record = None, None
    if spec.resume is not None:
        try:
            origin, record = branch.find_origin(spec, inputs, run)
        except SpecificationError:
            if own is None:  # else the branch goes on from its own, whatever became of where it began
                raise
    other = catalog.newest(output)
    here = origin is not None and origin.uri == catalog.checkpoint_uri(output, origin.step)
    if own is not None or here or other is None:
        return own or origin, origin, record
    step, folder = other.step, catalog.checkpoints_folder(output)
    changed = identity.changes(other.manifest, spec, inputs)
    way = f"resume.from: {step}, resume.allow: [{', '.join(changed)}], which is recorded as a branch"
    raise SpecificationError(
        f"output: {folder} has checkpoints of another training, the newest after step {step}, which this one cannot go "
        f"on with: {identity.difference(other, spec, inputs)}. "
        + (f"To go on from it all the same, give {way}; else another" if changed and origin is None else "Give another")
        + " `output`, or run with --force, which discards them"
    )


def require_divisible(spec: TrainSpecification, config: ModelConfig, context: int | None) -> None:
    """Whether workers can share rows of so many tokens (none: as many as the model's context) as they are asked to.
    Raises SpecificationError."""
    size = spec.sequence_parallel
    if found := sequence.indivisible(config, context or config.context, size):
        divide = "do" if len(found) > 1 else "does"
        raise SpecificationError(
            f"sequence_parallel: {size} workers cannot share rows: {', '.join(found)} {divide} not divide by {size}. "
            "Give a divisor of all of them"
        )


def warn_of_many_metrics(spec: TrainSpecification, layers: int) -> int:
    """Rows that the run will have in MLflow's database, about; a warning when they are too many for SQLite."""
    rows = spec.steps // spec.log_every * (_METRICS + layers * len(stability.BLOCK))
    if rows > _MOST_ROWS and server.database_file(server.resolve_uri(spec.tracking)) is not None:
        fewer = max(spec.log_every * -(-rows // _MOST_ROWS), spec.log_every)
        logger.warning(
            "this run will log some %s metric values, and MLflow keeps them in SQLite, whose pages become slow from %s "
            "on: give `tracking.uri` a server with PostgreSQL or MySQL, or log less often, say log_every: %d",
            *(f"{rows:,}", f"{_MOST_ROWS:,}", fewer),
        )
    return rows


def check_libraries(assignment: Assignment) -> None:
    """What only the libraries can judge. Raises SpecificationError."""
    spec = assignment.spec
    deepspeed_settings.check_deepspeed_settings(spec)
    with torch.device("meta"):
        transformer = Transformer(assignment.config)
        parameters.check_trainable(transformer, spec)
    _check_room(assignment, sum(p.numel() for p in transformer.parameters()))
    if assignment.continued is not None:
        _check_continued(spec, assignment.continued)


def _check_room(assignment: Assignment, parameters: int) -> None:
    """Whether a disk has room for the model and the first checkpoint: float32 masters and two moments."""
    state = 12 * parameters if "all" in assignment.spec.trainable_names else 0
    if problem := room.lacking(assignment.output, (0 if assignment.resume else state) + 4 * parameters):
        raise SpecificationError(
            f"output: {problem}, and a checkpoint and the model directory need as much at least. Make room, or give "
            "an `output` elsewhere"
        )


def _check_continued(spec: TrainSpecification, continued: Checkpoint) -> None:
    """An optimizer's state is of the parameters that were trained: another choice cannot go on with it."""
    made_with = continued.manifest.specification
    for name in ("trainable", "lora"):
        was, now = made_with.get(name), spec.model_dump(mode="json")[name]
        if was != now:
            raise SpecificationError(
                f"{name}: the stage whose optimizer continue_schedule goes on with had {was!r}, this one has {now!r}; "
                "set it to the same, or leave continue_schedule away to start with a fresh optimizer"
            )


def _check_token_shards(spec: TrainSpecification) -> None:
    directories = [("mixture", uri) for uri in spec.mixture] + [("held_out", uri) for uri in spec.held_out.values()]
    tokenizers = {"text": spec.locate(spec.text_tokenizer), "image": spec.locate(spec.image_tokenizer)}
    current = fingerprints(tokenizers.values())
    for field, uri in directories:
        manifest = Manifest.find(spec.locate(uri))
        if manifest is None:
            raise SpecificationError(
                f"{field}: no token shards are published at {spec.locate(uri)}; run the job tokenize for them first"
            )
        if not manifest.row_groups:
            raise SpecificationError(f"{field}: {spec.locate(uri)} holds {manifest.kind!r} without token shards")
        _check_kind(spec, field, spec.locate(uri), manifest)
        for modality, place in tokenizers.items():
            recorded = _tokenized_with(manifest, f"{modality}_tokenizer", place)
            if recorded and current[place] and recorded != current[place]:
                raise SpecificationError(
                    f"{field}: the token shards at {spec.locate(uri)} were tokenized with another {modality} tokenizer "
                    f"than the one now at {place}; run the job tokenize again"
                )


def _check_kind(spec: TrainSpecification, field: str, uri: str, manifest: Manifest) -> None:
    """Pairs are for learning from preferences, all else is not."""
    preference = preference_of(spec)
    if preference is None and manifest.kind == PREFERENCES:
        raise SpecificationError(
            f"{field}: {uri} holds pairs of answers, the unwanted ones among them; say how to learn from them in "
            "`preference` of the job finetune"
        )
    if preference is None:
        return
    if manifest.kind != PREFERENCES:
        raise SpecificationError(
            f"{field}: {uri} holds {manifest.kind!r}, and `preference` takes pairs: the job tokenize_preferences "
            "makes them"
        )
    if {"text_weight", "image_weight"} <= preference.model_fields_set:
        lacking = [name for name in ("text", "image") if not manifest.report.get(f"trained_{name}")]
        if lacking and preference.text_weight and preference.image_weight:
            raise SpecificationError(
                f"preference: text_weight and image_weight balance two modalities, and no answer in {uri} has a token "
                f"of {lacking[0]}; the first: {manifest.report.get('first')}. Leave them away, or look at the pairs"
            )


def preference_of(spec: TrainSpecification) -> Preference | None:
    return spec.preference if isinstance(spec, FinetuneSpecification) else None


def _tokenized_with(manifest: Manifest, field: str, place: str) -> str | None:
    """The fingerprint that a tokenizer had when the token shards were made, if their manifest records one.

    It is recorded under the tokenizer's location of then, which the job's specification tells: all may have moved.
    """
    kind = PreferenceTokensSpecification if manifest.kind == PREFERENCES else TokenizeSpecification
    try:
        made_by = kind.model_validate(manifest.specification)
    except ValidationError:
        return manifest.inputs.get(place)
    return manifest.inputs.get(made_by.locate(getattr(made_by, field)))


def _read_vocabulary(spec: TrainSpecification) -> Vocabulary:
    """The vocabulary of the text tokenizer, checked against the image tokenizer."""
    text, image = spec.locate(spec.text_tokenizer), spec.locate(spec.image_tokenizer)
    vocabulary = _read_config(
        "text_tokenizer", storage.join(text, model_vocabulary.FILE), "train_text_tokenizer", Vocabulary
    )
    shape = _read_config(
        "image_tokenizer", storage.join(image, model_config.FILE), "train_image_tokenizer", ImageTokenizerConfig
    )
    if shape.codebook_size != len(vocabulary.image_codes):
        raise SpecificationError(
            f"the text tokenizer at {text} has {len(vocabulary.image_codes)} image codes, the image tokenizer at "
            f"{image} {shape.codebook_size}: train the text tokenizer with image_codes: {shape.codebook_size}"
        )
    return vocabulary


def _read_config(field: str, uri: str, job: str, kind: Any) -> Any:
    try:
        return kind.model_validate_json(storage.read_bytes(uri))
    except storage.NotFound as error:
        raise SpecificationError(f"{field}: there is no {uri}; run the job {job} first") from error
    except ValidationError as error:
        raise SpecificationError(f"{field}: {uri} is not valid: {error}") from error


def _initial_directory(spec: TrainSpecification) -> str | None:
    """The model directory that `initial` names: a stage's output, a model directory, or models:/..."""
    if spec.initial is None:
        return None
    if spec.initial.startswith("models:"):
        return registry.model_source(spec.initial, spec.tracking)
    uri = spec.locate(spec.initial)
    if Manifest.find(storage.join(uri, MODEL_FOLDER)) is not None:
        return storage.join(uri, MODEL_FOLDER)
    if storage.exists(storage.join(uri, model_config.FILE)):
        return uri
    raise SpecificationError(f"initial: {uri} holds neither a finished stage nor a model directory{_unfinished(uri)}")


def _unfinished(output: str) -> str:
    """What there is of a stage that has not ended, as the end of a sentence."""
    end = catalog.newest(output)
    if end is None:
        return ""
    steps = end.manifest.specification.get("steps")
    return f"; its newest checkpoint is after step {end.step} of {steps}: finish the stage, or name {end.uri}"


def _starting_checkpoint(spec: TrainSpecification) -> Checkpoint | None:
    """The checkpoint that `initial` names, where it names one."""
    if spec.initial is None or spec.initial.startswith("models:"):
        return None
    found = branch.checkpoint_at(spec.locate(spec.initial))
    if found is not None and not spec.continue_schedule:
        made_with = TrainSpecification.model_validate(found.manifest.specification)
        if "all" not in made_with.trainable_names:
            raise SpecificationError(
                f"initial: {found.uri} holds what was trained of its model alone; name the model directory of that "
                "stage, or go on with it by continue_schedule"
            )
    return found


def _model_config(
    spec: TrainSpecification, vocabulary: Vocabulary, initial: str | None, start: Checkpoint | None
) -> ModelConfig:
    """The architecture: the given one or that of `initial`, with the vocabulary's size, the given dropout and mask."""
    if start is not None:
        found = start.manifest.report.get("architecture") or start.manifest.specification.get("model")
        if found is None:
            raise SpecificationError(f"initial: {start.uri} does not say its architecture: name a model directory")
        config = ModelConfig.model_validate(found)
    elif initial is not None:
        config = _read_config("initial", storage.join(initial, model_config.FILE), "pretrain", ModelConfig)
    else:
        assert spec.model is not None  # the specification has checked it
        config = spec.model
    size = config.vocabulary_size or vocabulary.size
    if size != vocabulary.size:
        raise SpecificationError(
            f"the model has {size} ids, the vocabulary at {spec.locate(spec.text_tokenizer)} {vocabulary.size}: "
            "leave model.vocabulary_size away to take the vocabulary's"
        )
    dropout = config.dropout if spec.dropout is None else spec.dropout
    apart = config.mask_documents if spec.mask_documents is None else spec.mask_documents
    if preference_of(spec) is not None:
        if not apart and spec.mask_documents is False:
            raise SpecificationError("mask_documents: pairs stand side by side, and must be told apart; leave it away")
        apart = True
    return config.model_copy(update={"vocabulary_size": size, "dropout": dropout, "mask_documents": apart})


def _continued_checkpoint(spec: TrainSpecification, start: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint whose optimizer and schedule this stage goes on with: the end of the earlier stage, or the one
    that `initial` names."""
    if not spec.continue_schedule or start is not None:
        return start if spec.continue_schedule else None
    assert spec.initial is not None  # the specification has checked it
    stage = spec.locate(spec.initial)
    steps = [] if spec.initial.startswith("models:") else catalog.published_steps(stage)
    if not steps:
        raise SpecificationError(
            f"continue_schedule: {spec.initial} has no checkpoint to take optimizer and step count from"
        )
    uri = catalog.checkpoint_uri(stage, steps[0])
    manifest = Manifest.read(uri)
    stopped = manifest.report.get("early", {}).get("stopped")
    end = steps[0] if stopped else int(manifest.specification.get("steps", steps[0]))
    if steps[0] != end:
        raise SpecificationError(
            f"continue_schedule: the newest checkpoint of {stage} is after step {steps[0]} of {end}. Run that stage to "
            f"its end again, or name a checkpoint in `initial`, say {uri}"
        )
    try:
        manifest.verify(uri)
    except ManifestError as error:
        raise SpecificationError(
            f"continue_schedule: the checkpoint at the end of {stage} is not whole: {error}. Restore it from a copy, "
            "or delete it and run that stage to its end again"
        ) from error
    return Checkpoint(uri, manifest)


def _check_samples(spec: TrainSpecification, config: ModelConfig) -> None:
    """A prompt that cannot fit should say so now, not after training."""
    if not spec.samples:
        return
    from calumma.model.tokenizers.text import TextTokenizer

    with storage.local_copy(spec.locate(spec.text_tokenizer)) as path:
        tokenizer = TextTokenizer.read(path)
    for prompt in spec.samples:
        length = len(tokenizer.encode(prompt)) + 2  # begin of sequence, end of turn
        if length >= config.context:
            raise SpecificationError(
                f"samples: the prompt {prompt[:40]!r}... has {length} tokens, the model's context is {config.context}"
            )
