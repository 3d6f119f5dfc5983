"""The quickstart: documents, then seven jobs with the shipped recipes, evaluation, and questions over HTTP.

Nothing in it is special: a step is a job specification, run by `run_job`, and finished when its manifest stands and
what it was made from is still the same.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from calumma.jobs.quickstart import documents
from calumma.jobs.quickstart.begun import begin
from calumma.jobs.quickstart.course import CLUSTER, FROM_IMAGE_TOKENIZER, Course, Extent, Step
from calumma.jobs.quickstart.display import Board, Row
from calumma.jobs.quickstart.documents import FAST, FULL, DocumentsSpecification
from calumma.jobs.quickstart.questions import Answer, ask, questions
from calumma.jobs.specifications.reading import read_specification
from calumma.jobs.specifications.table import JOBS, job_function
from calumma.platform.cluster import connection, runner
from calumma.platform.cluster.progress import Progress
from calumma.platform.evaluation.specification import EvaluateSpecification, PictureSampling
from calumma.platform.reports.contact_sheet import Cell
from calumma.platform.specification import JobSpecification, SpecificationError, Tracking
from calumma.platform.training.specification import FinetuneSpecification
from calumma.platform.training.standby.handed_on import handing_on

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from rich.console import Console

    from calumma.platform.storage.manifest import Manifest
    from calumma.platform.tracking.run import Run

OVERRIDES = "fast.yaml"  # what --fast changes, beside the recipes
LARGE = "large.yaml"  # what --large changes
PORTS = 50  # how many ports from the wished one on are tried
STEPS = (
    Step("documents", "Documents", 10),
    Step("curate", "Curation", 11),
    Step("train_text_tokenizer", "Text tokenizer", 1),
    Step("train_image_tokenizer", "Image tokenizer", 42),
    Step("tokenize", "Token shards", 22),
    Step("stage1", "Pre-training, stage 1", 50),
    Step("stage2", "Pre-training, stage 2", 16),
    Step("finetune", "Fine-tuning", 98),
    Step("evaluate", "Evaluation", 12),
    Step("serve", "Serving and questions", 20),
)
MEASURED = {
    "recognition_accuracy": "Recognition: held-out scan to word",
    "generation_accuracy": "Generation: word to picture, judged",
    "generation_distinct": "Generation: drawings that no other equals",
    "generation_diversity_of_real": "Generation: how much drawings of a word differ, over how much scans do",
    "judge_accuracy": "The judge itself, on held-out scans",
    "interleaved_valid": "Interleaved: alternation valid",
    "interleaved_words": "Interleaved: all words right",
    "interleaved_digits": "Interleaved: pictures right, judged",
    **FROM_IMAGE_TOKENIZER,
}


def _documents(shared: dict[str, Any], extent: Extent) -> DocumentsSpecification:
    return DocumentsSpecification(**shared, sizes=FAST if extent.fast else FULL)


def _samples(spec: DocumentsSpecification) -> dict[str, list[Cell]]:
    parts = zip(("train", "held_out"), documents.scans(spec), strict=True)
    return {part: [Cell(s.picture(), s.word) for s in scans[:40]] for part, scans in parts}


DIGITS = Course(
    name="quickstart",
    recipes="recipes/quickstart",
    lead="evaluated on scans it had never seen",
    steps=STEPS,
    documents=_documents,
    write=documents.write,
    samples=_samples,
    questions=lambda spec: questions(documents.scans(spec)[1]),
    measured=MEASURED,
    targets={"recognition_accuracy": 0.90, "generation_accuracy": 0.85, "interleaved_valid": 1.0},
    kinds={
        "recognition": "Picture to word",
        "generation": "Word to picture",
        "interleaved": "Words and pictures in turn",
    },
    sheets={
        "generation": "Digits the model drew, each above the word it was asked for",
        "interleaved": "Pictures in interleaved answers, each above the word the model put before it",
        "recognition": "Held-out scans, each above the word the model read",
        "generation_confusion": "What was asked for (rows) and what the judge saw in the drawing (columns)",
        "recognition_confusion": "What a held-out scan shows (rows) and what the model read (columns)",
    },
    reconstructions="Held-out scans (above) and what is left of them after the image tokenizer (below)",
)


class AnswersSpecification(JobSpecification):
    """Serve a model, ask it the three kinds of question over HTTP, keep the answers."""

    job: Literal["serve"] = "serve"
    output: str = "answers"
    model: str
    documents: str  # URI of those whose held-out pictures are asked about
    pictures: PictureSampling  # as they were measured


@dataclass(frozen=True)
class Options:
    """`storage`: URI or folder; default: below the working folder. `port`: of the server, or the next free one.
    `large`: for a GPU; `sets`: a folder of pictures in place of those that ship, where the course has such. `seed`: of
    all that is trained and drawn; the documents and their split are the same with any."""

    workdir: Path
    storage: str | None = None
    fast: bool = False
    port: int = 8000
    course: Course = DIGITS
    large: bool = False
    sets: str | None = None
    seed: int = 0

    @property
    def root(self) -> str:
        """Absolute storage root."""
        location = self.storage or str(self.workdir / "storage")
        return location if "://" in location else str(Path(location).expanduser().absolute())

    @property
    def tracking(self) -> Tracking:
        return Tracking(
            uri=f"sqlite:///{self.workdir.absolute() / 'mlflow' / 'mlflow.db'}", experiment=self.course.name
        )


@dataclass(frozen=True)
class QuickstartResult:
    """Every step's specification, manifest and seconds (measured in this call or an earlier one), by its name."""

    options: Options
    specifications: dict[str, JobSpecification]
    manifests: dict[str, Manifest]
    seconds: dict[str, float]
    ran: list[str]

    @property
    def model_uri(self) -> str:
        """The fine-tuned model in the registry."""
        spec = self.specifications["serve"]
        assert isinstance(spec, AnswersSpecification)
        return spec.model

    @property
    def tracking_uri(self) -> str:
        return str(self.options.tracking.uri)


def step_specification(step: str, options: Options) -> JobSpecification:
    """What a step does. Raises SpecificationError."""
    shared: dict[str, Any] = {"storage": options.root, "tracking": options.tracking}
    documents_spec = options.course.documents(shared, options)
    if step == "documents":
        return documents_spec
    if step == "serve":
        model = _model_uri(options)
        evaluated = step_specification("evaluate", options)
        assert isinstance(evaluated, EvaluateSpecification)
        return AnswersSpecification(
            **shared,
            seed=options.seed,
            model=model,
            documents=documents_spec.output_uri,
            pictures=evaluated.pictures,
        )
    recipes = resources.files("calumma.jobs") / options.course.recipes
    with resources.as_file(recipes) as folder:
        file = folder / f"{step}.yaml"
        changed = OVERRIDES if options.fast else LARGE if options.large else None
        overrides = _flattened((yaml.safe_load((folder / changed).read_text())[step] or {}) if changed else {})
        overrides |= {"storage": options.root, "tracking": options.tracking.model_dump(), "run_name": step}
        overrides |= {"seed": options.seed}
        job = yaml.safe_load(file.read_text())["job"]
        # JSON is YAML: values survive whatever characters they hold
        return read_specification(
            JOBS[job], file, [f"{field}={json.dumps(value)}" for field, value in overrides.items()]
        )


def _model_uri(options: Options) -> str:
    tuned = step_specification("finetune", options)
    assert isinstance(tuned, FinetuneSpecification)
    return f"models:/{tuned.register_as}@{tuned.alias}"


def _flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def quickstart(options: Options, console: Console) -> QuickstartResult:
    """Run every step that is not finished, in one cluster that is started when the first of them needs it.

    Raises what the steps raise; KeyboardInterrupt leaves finished steps finished and no process behind.
    """
    options.workdir.mkdir(parents=True, exist_ok=True)
    steps = options.course.steps
    specs = {step.name: step_specification(step.name, options) for step in steps}
    step_times = _StepTimes(options.workdir / "seconds.json")
    manifests: dict[str, Manifest] = {}
    ran: list[str] = []
    with Board(_display_rows(steps), console) as board, ExitStack() as stack:
        workers = stack.enter_context(handing_on())  # from each training to the next
        for step in steps:
            spec = specs[step.name]
            if step.name == "evaluate":
                workers.close()  # no training is left
            if (reusable := _reusable_result(spec)) is not None:
                manifests[step.name] = reusable
                board.skip(step.name, step_times.values.get(step.name))
                continue
            if step.name != "documents" and CLUSTER.name not in ran:
                with board.step(CLUSTER.name):
                    stack.enter_context(connection.embedded(lean=not options.large, logs=options.workdir / "logs"))
                ran.append(CLUSTER.name)
                step_times.record(CLUSTER.name, board.seconds(CLUSTER.name))
            begin(spec, options.root, manifests)
            with board.step(step.name) as progress:
                manifests[step.name] = _run(spec, options, progress)
            step_times.record(step.name, board.seconds(step.name))
            ran.append(step.name)
        if CLUSTER.name not in ran:
            board.skip(CLUSTER.name, None, "not needed")
    return QuickstartResult(options, specs, manifests, dict(step_times.values), ran)


def _display_rows(steps: Sequence[Step]) -> list[Row]:
    first, *others = (Row(s.name, s.title, s.usual) for s in steps)
    return [first, Row(CLUSTER.name, CLUSTER.title, CLUSTER.usual), *others]


def _reusable_result(spec: JobSpecification) -> Manifest | None:
    """The manifest of a finished step. A model that the registry does not know, or no longer, is registered again."""
    manifest = runner.reusable_result(spec)
    if manifest is not None and isinstance(spec, FinetuneSpecification) and spec.register_as:
        from calumma.platform import storage
        from calumma.platform.tracking import registry
        from calumma.platform.tracking.job_run import job_run
        from calumma.platform.tracking.server import TrackingError

        model = storage.join(spec.output_uri, "model")
        try:
            registered = registry.model_source(f"models:/{spec.register_as}@{spec.alias}", spec.tracking)
        except TrackingError:
            registered = None
        if registered != registry.registered_copy(model):
            with job_run(spec) as run:
                registry.register(spec.tracking, spec.register_as, model, run.id, spec.alias)
    return manifest


def _run(spec: JobSpecification, options: Options, progress: Progress) -> Manifest:
    if spec.job == "documents":
        return _tracked_documents(spec, options.course, progress)
    if isinstance(spec, AnswersSpecification):
        return _tracked_answers(spec, options, progress)
    return runner.run_job(spec, job_function(spec.job), progress)[0]


def _tracked_documents(spec: JobSpecification, course: Course, progress: Progress) -> Manifest:
    from calumma.platform.reports.contact_sheet import contact_sheet
    from calumma.platform.tracking.job_run import job_run

    with job_run(spec) as run:
        manifest = course.write(spec, progress)
        run.log_metrics({f"documents/{name}": float(n) for name, n in manifest.report["documents"].items()})
        for part, cells in course.samples(spec).items():
            run.log_image(contact_sheet(cells, columns=10), f"samples/{part}.png")
        return manifest


# -- serving ----------------------------------------------------------------------------------------------------------


def _tracked_answers(spec: AnswersSpecification, options: Options, progress: Progress) -> Manifest:
    from calumma.platform import storage
    from calumma.platform.storage.manifest import FileEntry, Manifest
    from calumma.platform.tracking.fingerprints import fingerprints
    from calumma.platform.tracking.job_run import job_run

    inputs = fingerprints([spec.model, spec.documents], spec.tracking)
    asked = options.course.questions(step_specification("documents", options))
    answers: list[Answer] = []
    with job_run(spec) as run:
        progress(0, len(asked) + 1, f"deploying {spec.model}")
        with _serving(spec, options.port) as (url, model):
            for number, question in enumerate(asked):
                progress(number + 1, len(asked) + 1, question.text)
                answers.append(ask(url, model, question, spec.seed + number))
        progress(len(asked) + 1, len(asked) + 1, f"{len(asked)} answers")
        run.log_metrics({"seconds_a_question": sum(a.seconds for a in answers) / len(answers)})
        _log_pictures(run, answers)
    output = spec.output_uri
    data = json.dumps([answer.model_dump() for answer in answers], indent=1, ensure_ascii=False).encode()
    storage.write_bytes(storage.join(output, "answers.json"), data)
    manifest = Manifest(
        kind="answers",
        files=[FileEntry.from_bytes("answers.json", data, rows=len(answers))],
        specification=spec.model_dump(mode="json"),
        report={"run": run.id},
        inputs=inputs,
    )
    manifest.write(output)
    return manifest


@contextmanager
def _serving(spec: AnswersSpecification, port: int) -> Iterator[tuple[str, str]]:
    """(URL, model name) of the registered model behind Ray Serve, for the length of the block."""
    from calumma.serve.deploy.endpoint import deploy, undeploy
    from calumma.serve.settings import SamplingDefaults, ServeSettings

    name = spec.model.removeprefix("models:/").partition("@")[0]
    drawn = spec.pictures
    sampling = SamplingDefaults(
        image_temperature=drawn.temperature,
        image_top_p=drawn.top_p,
        guidance_text=drawn.guidance_text,
        guidance_image=drawn.guidance_image,
    )
    settings = ServeSettings(
        model=spec.model, tracking=spec.tracking, name=name, port=free_port(port), sampling=sampling
    )
    url = deploy(settings)
    try:
        yield url, name
    finally:
        undeploy(name)


def free_port(first: int) -> int:
    """`first`, or the next port nobody listens on. Raises SpecificationError when none of fifty is free."""
    for port in range(first, min(first + PORTS, 65536)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SpecificationError(f"no port from {first} to {first + PORTS - 1} is free; choose another with --port")


def _log_pictures(run: Run, answers: list[Answer]) -> None:
    from calumma.model.document import Image

    for number, answer in enumerate(answers):
        for place, part in enumerate(p for p in answer.parts if p.kind == "image"):
            picture: PILImage.Image = Image(part.png()).open()
            run.log_image(picture, f"answers/{number}-{answer.kind}-{place}.png")


# -- memory -----------------------------------------------------------------------------------------------------------


class _StepTimes:
    """Seconds of every step, kept in the working folder over several calls."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def record(self, step: str, seconds: float) -> None:
        self.values[step] = round(seconds, 1)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n")
        temporary.replace(self._file)


def read_answers(outcome: QuickstartResult) -> list[Answer]:
    """The answers that the last step kept."""
    from calumma.platform import storage

    place = storage.join(outcome.specifications["serve"].output_uri, "answers.json")
    return [Answer.model_validate(answer) for answer in json.loads(storage.read_bytes(place))]
