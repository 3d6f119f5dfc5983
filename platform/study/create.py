"""The answers of all systems to all prompts, put into the study's folder one by one.

Invariants: an answer that was given is in storage before the next are asked for, and is never asked for again; a system
that is away leaves the others' work going on; the study itself (`study.json`) is written when all answers are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from calumma.model.document import Document, Image, Segment, Text, UnreadableImage
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress, no_progress
from calumma.platform.evaluation.systems.opening import open_system
from calumma.platform.evaluation.systems.prompts import Answer, Prompt, Sampling, System, UnusableSystem
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.shards.documents import to_parquet
from calumma.platform.study.prompts import Prompt as StudyPrompt
from calumma.platform.study.prompts import read_prompts, storable
from calumma.platform.study.specification import StudySpecification

STUDY = "study.json"
ROUND = 2  # times what a system answers at once: asked for, then stored
Opener = Callable[[SystemSpecification], AbstractContextManager[System]]


class AnswersMissing(RuntimeError):
    """Some answers could not be had; the message says which, and why. All others are kept."""


@dataclass
class Created:
    """`failed`: by system, prompts that it does not answer, with what it says."""

    prompts: int
    asked: int = 0
    kept: int = 0  # of an earlier run
    failed: dict[str, dict[str, str]] = field(default_factory=dict)


def create(
    spec: StudySpecification,
    progress: Progress = no_progress,
    leave_out: bool = False,
    opener: Opener | None = None,
) -> Created:
    """Make the study in its folder. `leave_out`: prompts that a system does not answer are left out of its items.

    Raises SpecificationError, StorageError, and AnswersMissing after everything that could be had is stored.
    """
    spec = spec.absolute()
    prompts = read_prompts(spec)
    storage.check_writable(spec.output)
    opened = opener or (lambda system: open_system(system, spec.resources, spec.tracking))
    files = {s.title: {p.id: answer_file(spec, s, p) for p in prompts} for s in spec.systems}
    there = {storage.relative(uri, spec.output) for uri in storage.list_files(spec.output)}
    done = Created(len(prompts))
    total, kept = len(prompts) * len(spec.systems), sum(f in there for of in files.values() for f in of.values())
    done.kept = kept
    away: dict[str, str] = {}
    for system in spec.systems:
        wanted = [prompt for prompt in prompts if files[system.title][prompt.id] not in there]
        if not wanted:
            continue

        def told(answered: int, title: str = system.title) -> None:
            progress(done.kept + done.asked + answered, total, title)

        told(0)
        try:
            with opened(system) as answering:
                step = ROUND * (system.concurrency if system.url else system.batch)
                for start in range(0, len(wanted), step):
                    _ask(spec, system.title, answering, wanted[start : start + step], files[system.title], done, told)
        except UnusableSystem as error:
            away[system.title] = str(error)
    if away or (done.failed and not leave_out):
        raise AnswersMissing(_told(done, away, total))
    _publish(spec, prompts, files, done.failed)
    return done


def _ask(
    spec: StudySpecification,
    name: str,
    system: System,
    prompts: list[StudyPrompt],
    files: dict[str, str],
    done: Created,
    told: Callable[[int], None],
) -> None:
    asked = [Prompt(p.conversation, sampling(spec, p.id)) for p in prompts]
    answers = system.answer(asked, lambda answered, _: told(answered))
    for prompt, answer in zip(prompts, answers, strict=True):
        try:
            given = _given(answer)
        except ValueError as error:
            done.failed.setdefault(name, {})[prompt.id] = str(error)
            continue
        document = Document((*prompt.conversation.segments, *given), source=spec.name)
        storage.write_bytes(storage.join(spec.output, files[prompt.id]), to_parquet([document]))
        done.asked += 1


def _given(answer: Answer) -> list[Segment]:
    """What annotators are shown: texts, and images that are images. Raises ValueError where there is nothing."""
    if answer.error:
        raise ValueError(answer.error)
    segments: list[Segment] = []
    for s in answer.document.segments:
        if isinstance(s, Text):
            segments.append(Text(storable(s.text), "assistant"))
        else:
            try:
                segments.append(Image(Image(s.open()).png(), None, "assistant"))
            except UnreadableImage as error:
                raise ValueError(f"its answer has something that is no image: {error}") from error
    return segments


def sampling(spec: StudySpecification, prompt: str) -> Sampling:
    given = spec.sampling
    seed = int.from_bytes(hashlib.blake2b(f"{spec.seed} {prompt}".encode(), digest_size=4).digest()) >> 1
    return Sampling(given.mode, given.max_tokens, given.temperature, given.top_p, seed, max_images=given.max_images)


def answer_file(spec: StudySpecification, system: SystemSpecification, prompt: StudyPrompt) -> str:
    """Where an answer is, below the study's folder. Another prompt, system or way of answering is another file."""
    who = system.model_dump(include={"model", "url", "served_model", "images", "dtype"})
    said = [who, spec.sampling.model_dump(), spec.seed, prompt.id]
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=10)
    for s in prompt.conversation.segments:
        digest.update(f"{s.role} ".encode() + (s.text.encode(errors="replace") if isinstance(s, Text) else s.png()))
    folder = "".join(c if c.isalnum() or c in "._-" else "_" for c in system.title)
    return f"answers/{folder}/{digest.hexdigest()}.parquet"


def _publish(
    spec: StudySpecification,
    prompts: list[StudyPrompt],
    files: dict[str, dict[str, str]],
    failed: dict[str, dict[str, str]],
) -> None:
    storage.write_bytes(
        storage.join(spec.output, "prompts.parquet"), to_parquet([prompt.conversation for prompt in prompts])
    )
    study = {
        "specification": spec.model_dump(mode="json"),
        "prompts": [{"id": prompt.id, "category": prompt.category} for prompt in prompts],
        "answers": {
            name: {prompt: file for prompt, file in of.items() if prompt not in failed.get(name, {})}
            for name, of in files.items()
        },
    }
    storage.write_bytes(storage.join(spec.output, STUDY), json.dumps(study, indent=1, ensure_ascii=False).encode())


def _told(done: Created, away: dict[str, str], total: int) -> str:
    lines = [f"{done.kept + done.asked} of {total} answers are stored, and stay."]
    lines += [f"{name} cannot be used: {why}" for name, why in away.items()]
    for name, failed in done.failed.items():
        shown = list(failed.items())[:5]
        lines.append(f"{name} does not answer {len(failed)} prompts: " + "; ".join(f"{p}: {why}" for p, why in shown))
    lines.append("The same command asks for what is missing alone" + (
        "; with --leave-out the study goes on without those answers." if done.failed and not away else "."
    ))  # fmt: skip
    return "\n".join(lines)
