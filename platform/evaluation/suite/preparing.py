"""Before a model is loaded: every task's data read and checked, and what cannot be done told with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.evaluation.benchmarks import drawing
from calumma.platform.evaluation.benchmarks.harness import TextTask
from calumma.platform.evaluation.benchmarks.items import BenchmarkDataError, Item
from calumma.platform.evaluation.benchmarks.registry import BENCHMARKS, Benchmark
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.data.fetching import against_list
from calumma.platform.evaluation.judges.specification import JudgeSpecification
from calumma.platform.evaluation.suite import presets
from calumma.platform.evaluation.suite.specification import MINIATURE, SuiteSpecification
from calumma.platform.evaluation.systems.abilities import Ability, lacking, needed
from calumma.platform.evaluation.systems.prompts import Prompt, System
from calumma.platform.specification import SpecificationError

DEFAULT_JUDGES = {"keywords": JudgeSpecification(kind="keywords")}
SEEING = ("endpoint", "model", "pictures")  # kinds of judges that look at pictures


@dataclass(frozen=True)
class Prepared:
    """A task whose data is there: items to be asked, rows for the harness, or pictures to be copied."""

    task: SuiteTask
    benchmark: Benchmark
    items: list[Item]
    text: TextTask | None = None
    pictures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        return self.text.texts if self.text is not None else [item.text for item in self.items]

    @property
    def needs(self) -> set[Ability]:
        """What a system has to be able to."""
        if self.text is not None:
            return {self.text.needs}
        return needed([Prompt(item.prompt, item.sampling) for item in self.items])


def read_from(spec: SuiteSpecification) -> list[str]:
    """Locations of all that a run reads: another result follows from other content."""
    model = spec.system.model
    own = [] if model is None else [model if model.startswith("models:") else spec.locate(model)]
    data = [] if spec.data == MINIATURE else [spec.locate(spec.data)]
    data += [spec.locate(task.data) for task in spec.tasks if task.data is not None and "/" in task.data]
    data += [spec.locate(task.training_pictures) for task in spec.tasks if task.training_pictures]
    judges = [place for judge in spec.judges.values() for place in (judge.training, judge.held_out) if place]
    return list(dict.fromkeys([*own, *data, *map(spec.locate, [*judges, *spec.training])]))


def prepare(spec: SuiteSpecification, progress: Progress) -> tuple[list[Prepared], dict[str, str]]:
    """Every task's data, read and checked; and what is left out, with the reason.

    All that is missing is told at once: raises BenchmarkDataError, unless `skip_missing`; SpecificationError."""
    tasks = presets.chosen_tasks(spec)
    prepared: list[Prepared] = []
    wrong: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for number, task in enumerate(tasks):
        progress(number / len(tasks) / 20, 1, f"data of {task.name}")
        reason = _not_for(spec, task)
        if reason is not None:
            left_out[task.name] = reason
            continue
        try:
            one = _prepared(spec, task)
            prepared.append(replace(one, notes=_held_against_the_list(spec, task)))
        except BenchmarkDataError as error:
            wrong[task.name] = str(error)
    if wrong and not spec.skip_missing:
        lines = [f"  {name}: {reason}" for name, reason in wrong.items()]
        raise BenchmarkDataError("\n".join([
            f"the data of {len(wrong)} of {len(tasks)} tasks cannot be used:", *lines,
            "Fetch it (calumma evaluate data fetch), choose others by `only`, or leave these out by `skip_missing`",
        ]))  # fmt: skip
    if not prepared:
        raise SpecificationError("no task is left to be done: " + "; ".join((*wrong.values(), *left_out.values())))
    return prepared, {**left_out, **wrong}


def unable(spec: SuiteSpecification, system: System, prepared: Sequence[Prepared]) -> dict[str, str]:
    """Tasks that an endpoint cannot be asked, each with the reason.

    Raises SpecificationError for any, unless `skip_missing`, and where none is left; UnusableSystem."""
    missing = lacking(system, set().union(*(one.needs for one in prepared)))
    found = {
        one.task.name: "; ".join(missing[each] for each in sorted(one.needs & missing.keys()))
        for one in prepared
        if one.needs & missing.keys()
    }
    if found and (not spec.skip_missing or len(found) == len(prepared)):
        reasons = dict.fromkeys(found.values())
        lines = [f"  {', '.join(name for name in found if found[name] == reason)}: {reason}" for reason in reasons]
        raise SpecificationError("\n".join([
            f"{spec.system.url} cannot be asked {len(found)} of {len(prepared)} tasks:", *lines,
            "Choose others by `only`, or leave these out by `skip_missing`",
        ]))  # fmt: skip
    return found


def _not_for(spec: SuiteSpecification, task: SuiteTask) -> str | None:
    """Why a task of the suite cannot be done with this system and these judges; None where it can."""
    benchmark = BENCHMARKS[task.benchmark]
    if benchmark.way == "tokenizer" and spec.system.model is None:
        return "an endpoint does not give its image tokenizer"
    if benchmark.way == "harness" and spec.skip_missing and find_spec("lm_eval") is None:
        return "lm-evaluation-harness is not installed: pip install 'calumma[evaluation]'"
    if benchmark.needs == "a judge of pictures" and not judges_of(spec, task, sees=True):
        return "no judge is named that looks at pictures (`judges`, of the kind endpoint, model or pictures)"
    return None


def judges_of(spec: SuiteSpecification, task: SuiteTask, sees: bool) -> dict[str, JudgeSpecification]:
    """Those who look at a task's answers, or pictures."""
    named = {name: spec.judges[name] for name in task.judges} if task.judges else dict(spec.judges)
    if sees:
        return {name: judge for name, judge in named.items() if judge.kind in SEEING}
    return named or DEFAULT_JUDGES


def data_location(spec: SuiteSpecification, task: SuiteTask) -> str:
    from calumma.platform.evaluation.miniatures.write import ensure_miniatures

    if spec.data != MINIATURE:
        base = spec.locate(spec.data)
    else:
        base = storage.join(spec.locate("evaluations"), MINIATURE)
        ensure_miniatures(base)
    if task.data is None or "/" not in task.data:
        return storage.join(base, task.data or task.name)
    return spec.locate(task.data)


def _held_against_the_list(spec: SuiteSpecification, task: SuiteTask) -> tuple[str, ...]:
    """What the page says of a benchmark of another version than was published. Raises BenchmarkDataError where its
    files are not those that were fetched."""
    if spec.data == MINIATURE or (task.data is not None and "/" in task.data):
        return ()
    wrong, unlike = against_list(spec.locate(spec.data), task.data or task.name)
    if wrong:
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise BenchmarkDataError(f"{data_location(spec, task)}: {wrong[0]}{more}")
    return tuple(f"of another version than was published: {path}" for path in unlike)


def _prepared(spec: SuiteSpecification, task: SuiteTask) -> Prepared:
    location, benchmark = data_location(spec, task), BENCHMARKS[task.benchmark]
    if benchmark.way == "harness":
        return Prepared(task, benchmark, [], TextTask(task, location))
    if benchmark.way == "tokenizer":
        return Prepared(task, benchmark, [], pictures=tuple(drawing.read_pictures(task, location)))
    assert benchmark.read is not None
    return Prepared(task, benchmark, benchmark.read(task, location, spec.seed))
