"""What must hold before a stage starts, and what its workers share. Nothing in storage changes here."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import ValidationError

from calumma.model import config as model_config
from calumma.model import vocabulary as model_vocabulary
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing.specification import PREFERENCES, PreferenceTokensSpecification, TokenizeSpecification
from calumma.platform.tracking import registry
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.mirrors import require_clients
from calumma.platform.tracking.run import Run
from calumma.platform.training.assignment import Assignment, Checkpoint
from calumma.platform.training.checkpoints import catalog, resumption
from calumma.platform.training.publication import MODEL_FOLDER
from calumma.platform.training.specification import FinetuneSpecification, Preference, TrainSpecification
from calumma.platform.training.steps import engine
from calumma.platform.training.trainable import parameters

logger = logging.getLogger(__name__)


def prepare(spec: TrainSpecification, run: Run) -> Assignment:
    """Settle everything that the workers share. Changes nothing in storage.

    Raises SpecificationError, in the terms of the specification; also when the output has another training's
    checkpoints.
    """
    require_clients(spec.tracking)
    _check_token_shards(spec)
    vocabulary = _read_vocabulary(spec)
    initial = _initial_directory(spec)
    config = _model_config(spec, vocabulary, initial)
    _check_samples(spec, config)
    output = spec.locate(spec.output)
    inputs = fingerprints(
        [
            *(spec.locate(uri) for uri in spec.mixture),
            spec.locate(spec.text_tokenizer),
            spec.locate(spec.image_tokenizer),
            *([initial] if initial else []),
        ]
    )
    resume = catalog.newest(output, resumption.made_by(spec, inputs))
    if resume is None and (other := catalog.newest(output)) is not None:
        raise SpecificationError(
            f"output: {catalog.checkpoints_folder(output)} has checkpoints of another training, the newest after step "
            f"{other.step}, which this one cannot go on with: {resumption.difference(other, spec, inputs)}. "
            "Give another `output`, or run with --force, which discards them"
        )
    assignment = Assignment(
        spec=spec,
        config=config,
        vocabulary=vocabulary,
        run=run,
        output=output,
        inputs=inputs,
        initial=initial,
        continued=_continued_checkpoint(spec),
        resume=resume,
    )
    check_libraries(assignment)
    return assignment


def check_libraries(assignment: Assignment) -> None:
    """What only the libraries can judge. Raises SpecificationError."""
    spec = assignment.spec
    engine.check_deepspeed_settings(spec)
    with torch.device("meta"):
        parameters.check_trainable(Transformer(assignment.config), spec)
    if assignment.continued is not None:
        _check_continued(spec, assignment.continued)


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
                f"of {lacking[0]}; leave them away, or look at the pairs"
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
    raise SpecificationError(f"initial: {uri} holds neither a finished stage nor a model directory")


def _model_config(spec: TrainSpecification, vocabulary: Vocabulary, initial: str | None) -> ModelConfig:
    """The architecture: the given one or that of `initial`, with the vocabulary's size, the given dropout and mask."""
    if initial is not None:
        config: ModelConfig = _read_config("initial", storage.join(initial, model_config.FILE), "pretrain", ModelConfig)
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


def _continued_checkpoint(spec: TrainSpecification) -> Checkpoint | None:
    """The checkpoint whose optimizer and schedule this stage goes on with."""
    if not spec.continue_schedule:
        return None
    assert spec.initial is not None  # the specification has checked it
    checkpoint = None if spec.initial.startswith("models:") else catalog.newest(spec.locate(spec.initial))
    if checkpoint is None:
        raise SpecificationError(
            f"continue_schedule: {spec.initial} has no checkpoint to take optimizer and step count from"
        )
    return checkpoint


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
