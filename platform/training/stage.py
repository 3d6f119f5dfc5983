"""One training stage from the driver: check, plan, start the workers, register the model, publish the manifest.

OUTPUT/checkpoints/...  OUTPUT/model/ (a model directory)  OUTPUT/manifest.json (last)
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from calumma.model import config as model_config
from calumma.model import vocabulary as model_vocabulary
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.vocabulary import Vocabulary
from calumma.platform import cluster, storage, tracking
from calumma.platform.config import Resumable, SpecificationError, TokenizeSpecification, TrainSpecification
from calumma.platform.data.manifest import MANIFEST, FileEntry, Manifest, fingerprints
from calumma.platform.progress import Progress
from calumma.platform.tracking import Run
from calumma.platform.training import checkpoint, elastic, mixture, watchdog, workers
from calumma.platform.training.checkpoint import Checkpoint
from calumma.platform.training.loop import MODEL, Assignment

if TYPE_CHECKING:
    from PIL.Image import Image

    from calumma.platform.training.image_loop import ImageAssignment

logger = logging.getLogger(__name__)
KIND = "stage"


def run_stage(spec: TrainSpecification, run: Run, progress: Progress) -> Manifest:
    """Train a stage to its end, going on from its newest checkpoint, and publish it.

    Raises SpecificationError before anything starts, TrainingFailed, StorageError, TrackingError.
    """
    from calumma.platform.data.cache import ShardCache
    from calumma.platform.data.plan import PlanError
    from calumma.platform.data.stream import PlanDataConfig

    began = time.monotonic()
    given, spec = spec, mixture.resolved(workers.absolute(spec))
    number = cluster.require(spec.resources)
    assignment = prepare(spec, run)
    _warn_of_fresh_optimizer(assignment, number)
    weights = {spec.locate(uri): weight for uri, weight in spec.mixture.items()}
    manifests = {uri: Manifest.read(uri) for uri in weights}
    cache = ShardCache(spec.data.cache.directory, int(spec.data.cache.gigabytes * 1e9)) if spec.data.cache else None
    try:
        data = PlanDataConfig(
            spec.seed,
            weights,
            manifests,
            spec.micro_batches,
            assignment.first_step,
            spec.steps,
            verify=spec.data.verify,
            cache=cache,
        )
    except PlanError as error:
        raise SpecificationError(f"mixture: {error}") from error
    if data.plan.context is not None and data.plan.context > assignment.config.context:
        raise SpecificationError(
            f"the token shards hold sequences of {data.plan.context} tokens, the model's context is "
            f"{assignment.config.context}: tokenize with a smaller `context`, or enlarge `model.context`"
        )
    epochs = mixture.check_epochs(spec, data.plan)
    assignment = replace(assignment, epochs_a_step={uri: count / spec.steps for uri, count in epochs.items()})
    _begin(assignment)
    data.first_step = elastic.FirstStep(assignment.output, spec, assignment.inputs)  # asked by each group that starts
    finished = assignment.first_step >= spec.steps  # only what follows training is missing
    report = workers.fit(
        elastic.train,
        {"assignment": assignment},
        workers=worker_range(spec, number),
        resources=spec.resources,
        name=spec.job,
        run=run,
        steps=spec.steps,
        progress=progress,
        data=None if finished else data,
        datasets=None if finished else PlanDataConfig.datasets(),
        lifeline=elastic.lifeline(assignment.output),
    )
    groups = groups_of(assignment)
    workers_at_end = groups[-1]["workers"] if groups else number
    report |= {"steps": spec.steps, "workers": workers_at_end, "groups": groups, "run": run.id}
    report["seconds"] = time.monotonic() - began
    report |= {"mixture": dict(spec.mixture), "epochs": epochs}
    return _publish(given, assignment, report)


def prepare(spec: TrainSpecification, run: Run) -> Assignment:
    """Settle everything that the workers share. Changes nothing in storage.

    Raises SpecificationError, in the terms of the specification; also when the output has another training's
    checkpoints.
    """
    _token_shards(spec)
    vocabulary = _vocabulary(spec)
    initial = _initial(spec)
    config = _model(spec, vocabulary, initial)
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
    resume = checkpoint.newest(output, checkpoint.continues(spec, inputs))
    if resume is None and (other := checkpoint.newest(output)) is not None:
        raise SpecificationError(
            f"output: {checkpoint.folder(output)} has checkpoints of another training, the newest after step "
            f"{other.step}, which this one cannot go on with: {checkpoint.difference(other, spec, inputs)}. "
            "Give another `output`, or run with --force, which discards them"
        )
    return Assignment(
        spec=spec,
        config=config,
        vocabulary=vocabulary,
        run=run,
        output=output,
        inputs=inputs,
        initial=initial,
        continued=_continued(spec),
        resume=resume,
    )


def worker_range(spec: Resumable, number: int) -> int | tuple[int, int]:
    """How many workers to start: `number`, or the range that was asked for."""
    least, most = spec.resources.min_workers, spec.resources.max_workers
    return (least, most) if least < most else number


def groups_of(assignment: Assignment | ImageAssignment) -> list[dict[str, Any]]:
    """The groups of workers that had a part in a training; a picture of them is logged when there were several."""
    found = checkpoint.newest(assignment.output, checkpoint.continues(assignment.spec, assignment.inputs))
    groups: list[dict[str, Any]] = found.manifest.report.get("groups", []) if found else []
    if len(groups) > 1:
        try:
            assignment.run.log_image(chart(groups, assignment.spec.steps), "workers.png")
        except Exception as error:  # MLflow may be away
            logger.warning("the chart of workers over steps was not logged: %s", error)
    return groups


def chart(groups: list[dict[str, Any]], steps: int) -> Image:
    """A picture of the number of workers over the steps of a stage; `groups` as `elastic.Keeper` records them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image as PILImage

    figure = Figure(figsize=(8, 2.5), layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = [*(group["step"] for group in groups), steps]
    axes.stairs([group["workers"] for group in groups], edges, baseline=0, fill=True, alpha=0.5)
    axes.set(xlabel="step", ylabel="workers", xlim=(edges[0], max(steps, edges[0] + 1)), ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.draw()
    return PILImage.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _begin(assignment: Assignment) -> None:
    """From here on the output is in the making: take away its manifest, and what killed uploads have left."""
    storage.delete(storage.join(assignment.output, MANIFEST))
    watchdog.withdraw(checkpoint.folder(assignment.output), watchdog.ACTIONS)
    if assignment.resume is None:
        storage.delete(checkpoint.folder(assignment.output))


def _warn_of_fresh_optimizer(assignment: Assignment, number: int) -> None:
    found, spec = assignment.found, assignment.spec
    if found is None or checkpoint.fits(found, spec, number):
        return
    was = found.manifest.report
    logger.warning(
        "%s was written by %s workers at ZeRO stage %s in %s, now there are %s at stage %s in %s: "
        "going on with its weights and step count, with a fresh optimizer state",
        *(found.uri, was["world_size"], was["zero_stage"], was["precision"]),
        *(number, spec.zero_stage, spec.precision),
    )


def _token_shards(spec: TrainSpecification) -> None:
    named = [("mixture", uri) for uri in spec.mixture] + [("held_out", uri) for uri in spec.held_out.values()]
    tokenizers = {"text": spec.locate(spec.text_tokenizer), "image": spec.locate(spec.image_tokenizer)}
    current = fingerprints(tokenizers.values())
    for field, uri in named:
        manifest = Manifest.find(spec.locate(uri))
        if manifest is None:
            raise SpecificationError(
                f"{field}: no token shards are published at {spec.locate(uri)}; run the job tokenize for them first"
            )
        if not manifest.row_groups:
            raise SpecificationError(f"{field}: {spec.locate(uri)} holds {manifest.kind!r} without token shards")
        for modality, place in tokenizers.items():
            recorded = _tokenized_with(manifest, f"{modality}_tokenizer", place)
            if recorded and current[place] and recorded != current[place]:
                raise SpecificationError(
                    f"{field}: the token shards at {spec.locate(uri)} were tokenized with another {modality} tokenizer "
                    f"than the one now at {place}; run the job tokenize again"
                )


def _tokenized_with(manifest: Manifest, field: str, place: str) -> str | None:
    """The fingerprint that a tokenizer had when the token shards were made, if their manifest records one.

    It is recorded under the tokenizer's location of then, which the job's specification tells: all may have moved.
    """
    try:
        made_by = TokenizeSpecification.model_validate(manifest.specification)
    except ValidationError:
        return manifest.inputs.get(place)
    return manifest.inputs.get(made_by.locate(getattr(made_by, field)))


def _vocabulary(spec: TrainSpecification) -> Vocabulary:
    """The vocabulary of the text tokenizer, checked against the image tokenizer."""
    text, image = spec.locate(spec.text_tokenizer), spec.locate(spec.image_tokenizer)
    found = _read("text_tokenizer", storage.join(text, model_vocabulary.FILE), "train_text_tokenizer", Vocabulary)
    shape = _read(
        "image_tokenizer", storage.join(image, model_config.FILE), "train_image_tokenizer", ImageTokenizerConfig
    )
    if shape.codebook_size != len(found.image_codes):
        raise SpecificationError(
            f"the text tokenizer at {text} has {len(found.image_codes)} image codes, the image tokenizer at {image} "
            f"{shape.codebook_size}: train the text tokenizer with image_codes: {shape.codebook_size}"
        )
    return found


def _read(field: str, uri: str, job: str, kind: Any) -> Any:
    try:
        return kind.model_validate_json(storage.read_bytes(uri))
    except storage.NotFound as error:
        raise SpecificationError(f"{field}: there is no {uri}; run the job {job} first") from error
    except ValidationError as error:
        raise SpecificationError(f"{field}: {uri} is not valid: {error}") from error


def _initial(spec: TrainSpecification) -> str | None:
    """The model directory that `initial` names: a stage's output, a model directory, or models:/..."""
    if spec.initial is None:
        return None
    if spec.initial.startswith("models:"):
        return tracking.model_source(spec.initial, spec.tracking)
    uri = spec.locate(spec.initial)
    if Manifest.find(storage.join(uri, MODEL)) is not None:
        return storage.join(uri, MODEL)
    if storage.exists(storage.join(uri, model_config.FILE)):
        return uri
    raise SpecificationError(f"initial: {uri} holds neither a finished stage nor a model directory")


def _model(spec: TrainSpecification, vocabulary: Vocabulary, initial: str | None) -> ModelConfig:
    """The architecture: the given one or that of `initial`, with the vocabulary's size and the given dropout."""
    if initial is not None:
        found: ModelConfig = _read("initial", storage.join(initial, model_config.FILE), "pretrain", ModelConfig)
    else:
        assert spec.model is not None  # the specification has checked it
        found = spec.model
    size = found.vocabulary_size or vocabulary.size
    if size != vocabulary.size:
        raise SpecificationError(
            f"the model has {size} ids, the vocabulary at {spec.locate(spec.text_tokenizer)} {vocabulary.size}: "
            "leave model.vocabulary_size away to take the vocabulary's"
        )
    dropout = found.dropout if spec.dropout is None else spec.dropout
    return found.model_copy(update={"vocabulary_size": size, "dropout": dropout})


def _continued(spec: TrainSpecification) -> Checkpoint | None:
    """The checkpoint whose optimizer and schedule this stage goes on with."""
    if not spec.continue_schedule:
        return None
    assert spec.initial is not None  # the specification has checked it
    found = None if spec.initial.startswith("models:") else checkpoint.newest(spec.locate(spec.initial))
    if found is None:
        raise SpecificationError(
            f"continue_schedule: {spec.initial} has no checkpoint to take optimizer and step count from"
        )
    return found


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


def _publish(given: TrainSpecification, assignment: Assignment, report: dict[str, Any]) -> Manifest:
    """Register the model if asked to, then write the stage's manifest, with the specification as it was given."""
    spec = assignment.spec
    uri = storage.join(assignment.output, MODEL)
    model = Manifest.read(uri)
    if spec.register_as:
        report["model_uri"] = tracking.register(spec.tracking, spec.register_as, uri, assignment.run.id, spec.alias)
    files = [entry.model_copy(update={"path": f"{MODEL}/{entry.path}"}) for entry in model.files]
    files.append(FileEntry.of(f"{MODEL}/{MANIFEST}", storage.read_bytes(storage.join(uri, MANIFEST))))
    others = [spec.locate(held) for held in spec.held_out.values()]
    others += [spec.locate(given.mixture_of.stage)] if given.mixture_of else []
    manifest = Manifest(
        kind=KIND,
        files=files,
        specification=given.model_dump(mode="json"),
        report={**report, "model": MODEL},
        inputs=assignment.inputs | fingerprints(others),
    )
    manifest.write(assignment.output)
    return manifest
