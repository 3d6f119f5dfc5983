"""`calumma evaluate data fetch`: benchmarks from their publishers' repositories on a hub, or from a mirror, and whether
they are the ones that were there before.

A list of checksums (`checksums.json`: name -> file -> sha256) is written at the first fetch and held against later
ones; another list, say a colleague's, can be given. Beside that it is told which files are the published ones, by
the checksums that `published` knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import NamedTuple

from calumma.platform import storage
from calumma.platform.evaluation.data.published import Verdict, verdict
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import sha256

CHECKSUMS = "checksums.json"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Checksums = dict[str, dict[str, str]]


class Source(NamedTuple):
    """A publisher's repository of data on the hub, and which of its files are of use; `instead`: where else to look,
    told to the person where the hub has no copy by the publisher."""

    repository: str | None
    patterns: tuple[str, ...] = ("*",)
    instead: str = ""


SOURCES: dict[str, Source] = {
    "piqa": Source("baber/piqa", ("*.parquet", "*.jsonl", "*.lst"), "yonatanbisk.com/piqa"),
    "siqa": Source("lighteval/siqa", ("*.parquet", "*.jsonl"), "maartensap.com/social-iqa"),
    "hellaswag": Source("Rowan/hellaswag", ("*.parquet", "*.jsonl"), "rowanzellers.com/hellaswag"),
    "winogrande": Source("allenai/winogrande", ("winogrande_xl/*",), "winogrande.allenai.org"),
    "arc_easy": Source("allenai/ai2_arc", ("ARC-Easy/*",), "allenai.org/data/arc"),
    "arc_challenge": Source("allenai/ai2_arc", ("ARC-Challenge/*",), "allenai.org/data/arc"),
    "openbookqa": Source("allenai/openbookqa", ("main/*",), "allenai.org/data/open-book-qa"),
    "boolq": Source("aps/super_glue", ("boolq/*",), "github.com/google-research-datasets/boolean-questions"),
    "gsm8k": Source("openai/gsm8k", ("main/*",), "github.com/openai/grade-school-math"),
    "math": Source("EleutherAI/hendrycks_math", ("*.parquet",), "github.com/hendrycks/math"),
    "mmlu": Source("cais/mmlu", ("*/test-*", "*/dev-*"), "github.com/hendrycks/test"),
    "coco": Source(None, instead="cocodataset.org (val2014) and Karpathy's dataset_coco.json"),
    "flickr30k": Source(None, instead="shannon.cs.illinois.edu/DenotationGraph and Karpathy's dataset_flickr30k.json"),
    "vqav2": Source(None, instead="visualqa.org/download.html"),
    "okvqa": Source(None, instead="okvqa.allenai.org"),
    "squad": Source(None, instead="rajpurkar.github.io/SQuAD-explorer (dev-v2.0.json)"),
    "mnist": Source(None, instead="github.com/cvdfoundation/mnist"),
    "following": Source(None, instead="github.com/djghosh13/geneval (evaluation_metadata.jsonl)"),
}


@dataclass
class Fetched:
    """What was done: files by benchmark, what has other checksums than the list, and what could not be had.

    `verdicts`: of each file, by its benchmark and path, whether it is the one that was published."""

    files: dict[str, int] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def told(self, name: str) -> str:
        """How many of a benchmark's files are the published ones."""
        own = [verdict for path, verdict in self.verdicts.items() if path.startswith(f"{name}/")]
        words = {"published": "as published", "other": "not as published", "unknown": "of unknown publication"}
        counts = [f"{own.count(verdict):,} {words[verdict]}" for verdict in words if verdict in own]
        return ", ".join(counts)


def fetch(
    target: str, names: list[str], mirror: str | None = None, checksums: str | None = None
) -> Iterator[tuple[str, Fetched]]:
    """Benchmark after benchmark, copied below `target`: from `mirror`/NAME, or the publisher's repository on the hub.

    What is there already is checked and not copied again. Raises SpecificationError, StorageError."""
    unknown = sorted(set(names) - set(SOURCES))
    if unknown:
        raise SpecificationError(
            f"there is no benchmark {', '.join(unknown)} to fetch; there are: {', '.join(SOURCES)}"
        )
    known = _read(checksums or storage.join(target, CHECKSUMS), required=checksums is not None)
    done = Fetched()
    for name in names or SOURCES:
        source = SOURCES[name]
        if mirror is None and source.repository is None:
            done.missing[name] = (
                f"its publisher keeps it elsewhere: {source.instead}. Put the files below {target}/{name}"
            )
            yield name, done
            continue
        base = storage.join(mirror, name) if mirror else f"hf://datasets/{source.repository}"
        try:
            found = _copy(base, storage.join(target, name), ("*",) if mirror else source.patterns)
        except storage.StorageError as error:
            done.missing[name] = f"{base} cannot be had ({error}); see {source.instead or 'its publisher'}"
            yield name, done
            continue
        own = known.setdefault(name, {})
        for path, digest in found.items():
            if own.setdefault(path, digest) != digest:
                done.changed.append(f"{name}/{path}")
            done.verdicts[f"{name}/{path}"] = verdict(name, path, storage.join(target, name, path), digest)
        done.changed += [f"{name}/{path} (not there any more)" for path in own if path not in found]
        done.files[name] = len(found)
        storage.write_bytes(storage.join(target, CHECKSUMS), json.dumps(known, indent=1, sort_keys=True).encode())
        yield name, done


def check(target: str, checksums: str | None = None) -> list[str]:
    """Files that are missing or are not those of the list. Raises SpecificationError where there is no list."""
    known = _read(checksums or storage.join(target, CHECKSUMS), required=True)
    wrong = []
    for name, files in known.items():
        for path, digest in files.items():
            uri = storage.join(target, name, path)
            if not storage.exists(uri):
                wrong.append(f"{uri} is missing")
            elif sha256(uri) != digest:
                wrong.append(f"{uri} is another file than the list says")
    return wrong


def against_list(target: str, name: str) -> tuple[list[str], list[str]]:
    """Of a benchmark's files what is missing or other than the list beside the data says, if there is one; and those
    that are others than was published. Pictures are looked for, and not read."""
    known = _read(storage.join(target, CHECKSUMS), required=False).get(name, {})
    folder = storage.join(target, name)
    present = {uri[len(folder.rstrip("/")) + 1 :]: uri for uri in storage.list_inputs(folder).sizes}
    wrong = [f"{path} is missing, which {CHECKSUMS} has" for path in known if path not in present]
    unlike = []
    for path, uri in present.items():
        if path.lower().endswith(PICTURES):
            continue
        digest = sha256(uri)
        if known.get(path, digest) != digest:
            wrong.append(f"{path} is another file than {CHECKSUMS} says")
        if verdict(name, path, uri, digest) == "other":
            unlike.append(path)
    return wrong, unlike


def verdicts(target: str, checksums: str | None = None) -> Fetched:
    """Of the list's files that are there, whether they are the published ones. Raises SpecificationError."""
    known = _read(checksums or storage.join(target, CHECKSUMS), required=True)
    found = Fetched()
    for name, files in known.items():
        for path in files:
            uri = storage.join(target, name, path)
            if storage.exists(uri):
                found.files[name] = found.files.get(name, 0) + 1
                found.verdicts[f"{name}/{path}"] = verdict(name, path, uri)
    return found


def _read(uri: str, required: bool) -> Checksums:
    try:
        values = json.loads(storage.read_bytes(uri))
    except storage.NotFound as error:
        if required:
            raise SpecificationError(f"there is no list of checksums {uri}; `data fetch` writes one") from error
        return {}
    except ValueError as error:
        raise SpecificationError(f"{uri} is no list of checksums: {error}") from error
    return {str(name): dict(files) for name, files in values.items()}


def _copy(base: str, target: str, patterns: tuple[str, ...]) -> dict[str, str]:
    """Path -> sha256 of what was copied or was there. Raises StorageError, also where nothing matches."""
    sizes = storage.list_inputs(base).sizes
    present = storage.list_inputs(target).sizes if storage.exists(target) else {}
    found = {}
    for uri, size in sizes.items():
        path = uri[len(base.rstrip("/")) + 1 :]
        if not any(fnmatch(path, pattern) for pattern in patterns):
            continue
        place = storage.join(target, path)
        if present.get(place) != size:
            storage.write_bytes(place, storage.read_bytes(uri))
        found[path] = sha256(place)
    if not found:
        raise storage.StorageError(f"there is nothing at {base}")
    return found
