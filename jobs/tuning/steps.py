"""The steps of a fine-tuning: look, curate, divide, tokenize, train, register. Each is kept when it is done.

OUT/curate.yaml, tokenize.yaml, finetune.yaml: what each job was asked, to be run again with `calumma job run`
OUT/base/ (an imported model)  OUT/data/  OUT/tuned/model/  OUT/tuned/adapter/ (of a low-rank one)  OUT/report.html
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.jobs.specifications.table import job_function
from calumma.jobs.tuning import examples, settings, split
from calumma.jobs.tuning.settings import Base, Machine, Options
from calumma.model import config as model_config
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER, missing_files
from calumma.platform import storage
from calumma.platform.cluster import connection, runner
from calumma.platform.cluster.progress import Display, Progress
from calumma.platform.specification import JobSpecification, SpecificationError
from calumma.platform.tokenizing.specification import PreferenceTokensSpecification, TokenizeSpecification
from calumma.platform.tracking import registry
from calumma.platform.training.publication import MODEL_FOLDER
from calumma.platform.training.specification import FinetuneSpecification

if TYPE_CHECKING:
    from calumma.jobs.tuning.samples import Sample
    from calumma.platform.sources.specification import Source
    from calumma.platform.storage.manifest import Manifest


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuning made. `before`, `after`: losses of the held-out examples, by name."""

    options: Options
    specification: FinetuneSpecification
    manifest: Manifest
    found: examples.Examples
    parts: split.Parts
    samples: list[Sample]
    before: dict[str, float]
    after: dict[str, float]
    skipped: bool

    @property
    def model(self) -> str:
        """What to serve."""
        return str(self.manifest.report["model_uri"])

    @property
    def serve_command(self) -> list[str]:
        tracking = self.options.tracking_uri
        return ["calumma", "serve", "start", self.model, *(["--tracking-uri", tracking] if tracking else [])]


@dataclass(frozen=True)
class Prepared:
    """Examples as token shards: what was found, how many there are, and the job that made them."""

    found: examples.Examples
    parts: split.Parts
    tokens: TokenizeSpecification | PreferenceTokensSpecification


def finetune(
    options: Options,
    source_format: str | None,
    source_options: dict[str, Any],
    display: Display,
    force: bool = False,
) -> Outcome:
    """Do all steps, or those that are not done yet. Raises WrongExamples, SpecificationError, and what the jobs do."""
    from calumma.jobs.tuning import samples

    machine = Machine.here()
    options.out.mkdir(parents=True, exist_ok=True)
    with display.step("look at the examples") as progress:
        pairs = examples.are_preferences(options.data)
        asked_of_pairs = {"--preference": options.preference, "--image-weight": options.image_weight}
        for name, given in asked_of_pairs.items():
            if given is not None and not pairs:
                raise examples.WrongExamples(
                    f"{options.data}: {name} takes pairs, records with `chosen` and `rejected`, and it has none"
                )
        source = None if pairs else examples.find_source(options.data, source_format, source_options)
        found = examples.check(source, options.max_bad_share, progress=progress) if source else examples.Examples()
    with display.step("look at the model"):
        base = base_model(options)
    if source is not None:
        prepared = _examples(options, base, source, found, machine, display, force)
    else:
        prepared = _pairs(options, base, machine, display, force)
    spec = settings.training(options, base, prepared.parts, prepared.tokens, _row_groups(prepared.tokens), machine)
    _write(spec)
    done, kept = None if force else runner.reusable_result(spec), samples.read(options.root)
    if done is not None and kept is not None:
        display.skipped("finetune")
        return Outcome(options, spec, done, prepared.found, prepared.parts, kept.samples, kept.before, kept.after, True)
    storage.delete(storage.join(options.root, samples.FILE))
    asked = 0 if pairs else options.samples
    with connection.embedded(logs=options.out / "logs"):
        with display.step("answers before") as progress:
            first = samples.answers_of(base.directory, spec, asked, machine, progress)
        with display.step("finetune") as progress:
            manifest, _ = runner.run_job(spec, job_function(spec.job), progress, force)
        with display.step("answers after") as progress:
            model = storage.join(spec.output_uri, MODEL_FOLDER)
            last = samples.answers_of(model, spec, asked, machine, progress)
    after = last.losses or manifest.report["held_out"].get("examples", {})
    answered = [before.with_after(after) for before, after in zip(first.samples, last.samples, strict=True)]
    samples.write(options.root, samples.Kept(answered, first.losses, after))
    return Outcome(
        options, spec, manifest, prepared.found, prepared.parts, answered, first.losses, after, done is not None
    )


def _examples(
    options: Options,
    base: Base,
    source: Source,
    found: examples.Examples,
    machine: Machine,
    display: Display,
    force: bool,
) -> Prepared:
    _run(settings.curation(options, source), display, force)
    with display.step("divide the examples") as progress:
        parts = _divide(options, base, source, progress)
    tokens = settings.tokenization(options, base, parts, machine)
    _run(tokens, display, force)
    return Prepared(found, parts, tokens)


def _pairs(options: Options, base: Base, machine: Machine, display: Display, force: bool) -> Prepared:
    tokens = settings.pairs(options, base, machine)
    manifest = _run(tokens, display, force)
    sides = manifest.report["sources"]
    counts = [sides.get(part, {}).get("pairs", 0) for part in (split.TRAIN, split.HELD_OUT)]
    wrong = {reason: (found["pairs"], found["first"]) for reason, found in manifest.report["wrong"].items()}
    found = examples.Examples(documents=manifest.report["pairs"], faults=wrong)
    return Prepared(found, split.Parts(counts[0], counts[1], sum(manifest.tokens.values()), tokens.context), tokens)


def base_model(options: Options) -> Base:
    """The model directory that is tuned. A Hugging Face folder is imported first. Raises SpecificationError."""
    given = options.model
    if not given.startswith("models:") and "://" not in given:
        given = str(Path(given).expanduser().absolute())
    directory = registry.model_source(given, options.tracking).rstrip("/")
    if storage.exists(storage.join(directory, MODEL_FOLDER, model_config.FILE)):
        directory = storage.join(directory, MODEL_FOLDER)  # of a stage
    if not storage.exists(storage.join(directory, model_config.FILE)):
        raise SpecificationError(
            f"there is no model at {given}: give a model directory, the output of a stage, a Hugging Face folder, or "
            "models:/NAME@ALIAS"
        )
    if "model_type" in json.loads(storage.read_bytes(storage.join(directory, model_config.FILE))):
        given = directory = _imported(options, directory)
    if missing := missing_files(lambda name: storage.exists(storage.join(directory, name))):
        raise SpecificationError(f"{directory} is not a whole model directory: {', '.join(missing)} missing")
    config = ModelConfig.model_validate_json(storage.read_bytes(storage.join(directory, model_config.FILE)))
    shape = storage.read_bytes(storage.join(directory, IMAGE_TOKENIZER, model_config.FILE))
    images = ImageTokenizerConfig.model_validate_json(shape)
    return Base(given, directory, config, images.codes_per_image)


def _imported(options: Options, source: str) -> str:
    """A Hugging Face folder as a model directory in OUT/base, made once. Raises ConversionError."""
    from calumma.model.convert import import_hugging_face

    destination = options.out.expanduser().absolute() / "base"
    if not destination.exists():
        with storage.local_copy(source) as folder:
            import_hugging_face(folder, destination)
    return str(destination)


def _divide(options: Options, base: Base, source: Source, progress: Progress) -> split.Parts:
    from calumma.model.tokenizers.text import TextTokenizer

    with storage.local_copy(base.directory) as folder:
        tokenizer = TextTokenizer.read(folder)
    curated, folder_uri = f"{options.root}/data/curated/{source.name}", f"{options.root}/data"
    return split.split(curated, folder_uri, options.held_out, tokenizer, base.image_length, progress)


def _row_groups(tokens: JobSpecification) -> int:
    from calumma.platform.storage.manifest import Manifest

    return Manifest.read(storage.join(tokens.output_uri, split.TRAIN)).row_groups


def _run(spec: JobSpecification, display: Display, force: bool) -> Manifest:
    """One job without a cluster; its specification stays beside what it makes."""
    _write(spec)
    if not force and (done := runner.reusable_result(spec)) is not None:
        display.skipped(spec.job)
        return done
    with display.step(spec.job) as progress:
        return runner.run_job(spec, job_function(spec.job), progress, force)[0]


def _write(spec: JobSpecification) -> None:
    import yaml

    values = {"job": spec.job} | spec.model_dump(mode="json", exclude_defaults=True)
    file = f"{spec.storage}/{spec.job}.yaml"
    text = f"# calumma job run {spec.job} --config {file}\n" + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True
    )
    storage.write_bytes(file, text.encode())
