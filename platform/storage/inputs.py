"""Locations that are read: a file, everything below a folder or prefix, or what a pattern matches.

Unlike `sizes`, which is for writing, copying and deleting, this follows links to folders (each real folder is read
once, so that a link to one above it ends), gives an object beside the prefix of its name, and understands `*`, `?`,
`[…]`, `**` and braces (`{00000..00099}.tar`, `{train,val}`) where there is nothing of the literal name.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path

from calumma.platform.storage import filesystems
from calumma.platform.storage.client import s3_client
from calumma.platform.storage.error_translation import translated_errors
from calumma.platform.storage.files import exists
from calumma.platform.storage.s3 import remote_sizes
from calumma.platform.storage.uri import StorageError, bucket_and_key, is_foreign, is_remote, local_path

MOST_NAMES = 100_000  # that the braces of one location may stand for
_WILDCARD = re.compile(r"[*?\[]")
_SIGN = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([a-zA-Z])\.\.([a-zA-Z])")


@dataclass
class Listing:
    """What is at a location. `sizes`: URI -> bytes, sorted. `missing`: names that braces ask for and that there are
    not; `broken`: links that lead nowhere, and what is neither file nor folder."""

    sizes: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def list_inputs(location: str) -> Listing:
    """What a location stands for. Raises StorageError."""
    found = Listing()
    with translated_errors(location, "list"):
        if is_foreign(location):
            _add_foreign(found, location)
        elif not is_pattern(location):
            _add_literal(found, location)
        else:
            for name in expand_braces(location):
                before = len(found.sizes)
                if _WILDCARD.search(_path(name)):
                    base, components = _base_and_components(name)
                    _add_matches(found, base, components)
                else:
                    _add_literal(found, name)
                    if len(found.sizes) == before:
                        found.missing.append(name)
    if is_pattern(location) and not is_remote(location):
        _drop_second_ways(found)
    found.sizes = dict(sorted(found.sizes.items()))
    return found


def _drop_second_ways(found: Listing) -> None:
    """Of the ways by which matches lead to one file, through links to folders, the shortest is kept, unless hidden."""
    real: dict[str, str] = {}
    kept: dict[str, str] = {}
    for path in sorted((*found.sizes, *found.broken), key=lambda path: ("/." in path, len(path), path)):
        folder, _, name = path.rpartition("/")
        if folder not in real:
            real[folder] = os.path.realpath(folder or ("/" if path.startswith("/") else "."))
        kept.setdefault(f"{real[folder]}/{name}", path)
    ways = set(kept.values())
    found.sizes = {path: size for path, size in found.sizes.items() if path in ways}
    found.broken = sorted(ways.intersection(found.broken))


def is_pattern(location: str) -> bool:
    """Whether a location is to be understood as a pattern. Raises StorageError."""
    special = _WILDCARD.search(_path(location)) or expand_braces(location) != [location]
    return bool(special) and not exists(location)


def literal_folder(location: str) -> str:
    """The folder that all of a location is below: itself, or what stands before a pattern's first sign."""
    if not is_pattern(location):
        return location
    literal = _SIGN.split(location, maxsplit=1)[0]
    return literal.rpartition("/")[0] if "/" in literal else "."


def expand_braces(pattern: str) -> list[str]:
    """`a{1..3}.{x,y}` -> the six names; braces with neither a comma nor a range stand for themselves. Raises
    StorageError above MOST_NAMES."""
    names = [""]
    rest = pattern
    while rest:
        begin, alternatives, end = _first_braces(rest)
        inner = [name for alternative in alternatives for name in expand_braces(alternative)] or [""]
        if len(names) * len(inner) > MOST_NAMES:
            raise StorageError(f"{pattern}: its braces stand for more than {MOST_NAMES:,} names")
        names = [f"{name}{begin}{each}" for name in names for each in inner]
        rest = end
    return names


def _first_braces(text: str) -> tuple[str, list[str], str]:
    """(what stands before the first braces, their alternatives, what follows); no alternatives where there are none."""
    for match in re.finditer(r"\{", text):
        depth, places = 0, [match.start()]
        for place in range(match.start(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 1 and text[place] == ",":
                places.append(place)
            if depth == 0:
                parts = [text[a + 1 : b] for a, b in zip(places, [*places[1:], place], strict=True)]
                alternatives = parts if len(parts) > 1 else _range(parts[0])
                if alternatives:
                    return text[: match.start()], alternatives, text[place + 1 :]
                break
    return text, [], ""


def _range(words: str) -> list[str]:
    """`08..11` -> 08, 09, 10, 11; `a..c` -> a, b, c; nothing for other words."""
    match = _RANGE.fullmatch(words)
    if match is None:
        return []
    letters = match[4] is not None
    first, last = (ord(match[4]), ord(match[5])) if letters else (int(match[1]), int(match[2]))
    step = max(1, abs(int(match[3] or 1)))
    if abs(last - first) // step > MOST_NAMES:
        raise StorageError(f"{{{words}}} stands for more than {MOST_NAMES:,} names")
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if letters:
        return [chr(number) for number in numbers]
    padded = any(re.match(r"-?0\d", end) for end in (match[1], match[2]))
    width = max(len(match[1]), len(match[2])) if padded else 0
    return [f"{number:0{width}d}" for number in numbers]


# -- what matches ------------------------------------------------------------------------------------------------------


def _path(location: str) -> str:
    """The part of a location that may be a pattern: a bucket is none."""
    return bucket_and_key(location)[1] if is_remote(location) else location


def _base_and_components(pattern: str) -> tuple[str, list[str]]:
    """The literal folder that a pattern begins with, and the components from its first sign on."""
    remote = is_remote(pattern)
    root = f"s3://{bucket_and_key(pattern)[0]}" if remote else ""
    path = _path(pattern) if remote else str(local_path(pattern))
    components = path.rstrip("/").split("/")
    first = next(number for number, part in enumerate(components) if _WILDCARD.search(part))
    base = "/".join(components[:first]) if remote else "/".join(components[:first]) or ("/" if path[:1] == "/" else ".")
    return (f"{root}/{base}" if base else root) if remote else base, components[first:]


def _add_matches(found: Listing, folder: str, components: list[str]) -> None:
    head, rest = components[0], components[1:]
    if head == "**":
        below = Listing()
        _add_below(below, folder)
        matches = re.compile(f"{_regex(components)}(/.*)?" if rest else ".*", re.DOTALL)
        prefix = len(folder.rstrip("/")) + 1 if folder != "." else 0
        for uri, size in below.sizes.items():
            if matches.fullmatch(uri[prefix:]):
                found.sizes[uri] = size
        found.broken += below.broken
    elif not _WILDCARD.search(head):
        if rest:
            _add_matches(found, _below(folder, head), rest)
        else:
            _add_literal(found, _below(folder, head))
    else:
        files, folders = _children(folder)
        matches = re.compile(translate(head))
        found.sizes |= {uri: size for name, (uri, size) in files.items() if not rest and matches.match(name)}
        for name in folders:
            if matches.match(name):
                if rest:
                    _add_matches(found, _below(folder, name), rest)
                else:
                    _add_below(found, _below(folder, name))


def _regex(components: list[str]) -> str:
    parts = []
    for number, part in enumerate(components):
        if part == "**":
            parts.append("(?:[^/]+/)*")
        else:
            inner = translate(part).removeprefix("(?s:").removesuffix(")\\Z").replace(".*", "[^/]*")
            parts.append(inner + ("/" if number + 1 < len(components) else ""))
    return "".join(parts)


def _below(folder: str, name: str) -> str:
    """As `join`, but the empty name of a key that begins with `/` is kept, and `.` is not told."""
    if is_remote(folder):
        return f"{folder}/{name}"
    return name if folder == "." else f"{folder.rstrip('/')}/{name}"


def _children(folder: str) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """Name -> (URI, bytes) of the files in a folder, and the names of the folders in it."""
    files: dict[str, tuple[str, int]] = {}
    folders: list[str] = []
    if is_remote(folder):
        bucket, key = bucket_and_key(folder)
        prefix = f"{key}/" if key else ""
        for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            folders += [item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", ())]
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):
                    files[item["Key"][len(prefix) :]] = (f"s3://{bucket}/{item['Key']}", item["Size"])
        return files, folders
    if not local_path(folder).is_dir():
        return files, folders
    for entry in sorted(os.scandir(local_path(folder)), key=lambda entry: entry.name):
        if entry.is_dir():
            folders.append(entry.name)
        elif entry.is_file() and not _unfinished(entry.name):
            files[entry.name] = (_below(folder, entry.name), entry.stat().st_size)
    return files, folders


def _add_foreign(found: Listing, location: str) -> None:
    """A file, all below a folder, or what a pattern matches of all that its literal folder has."""
    for name in expand_braces(location) if is_pattern(location) else [location]:
        if _WILDCARD.search(_path(name)):
            parts = name.split("/")
            first = next(number for number, part in enumerate(parts) if number > 1 and _WILDCARD.search(part))
            folder = "/".join(parts[:first])
            matches = re.compile(f"{_regex(parts[first:])}(/.*)?", re.DOTALL)
            below = filesystems.sizes(folder)
            sizes = {uri: size for uri, size in below if matches.fullmatch(uri[len(folder) + 1 :])}
        else:
            sizes = dict(filesystems.sizes(name))
        found.sizes |= sizes
        if not sizes and name != location:
            found.missing.append(name)


# -- what is below -----------------------------------------------------------------------------------------------------


def _add_literal(found: Listing, location: str) -> None:
    """A file, all below a folder, or both where an object and a prefix have one name."""
    if not is_remote(location):
        path = local_path(location)
        if path.is_file():
            found.sizes[str(path)] = path.stat().st_size
            return
    _add_below(found, location)
    if is_remote(location) and (key := bucket_and_key(location)[1]):
        bucket = bucket_and_key(location)[0]
        if f"s3://{bucket}/{key}" not in found.sizes:
            # The first of all keys that begin so is the name itself.
            page = s3_client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            found.sizes |= {
                f"s3://{bucket}/{key}": item["Size"]
                for item in page.get("Contents", ())
                if item["Key"] == key and item["Size"]  # an empty one marks a folder
            }


def _add_below(found: Listing, folder: str) -> None:
    if is_remote(folder):
        found.sizes.update(remote_sizes(folder))
    elif local_path(folder).is_dir():
        _add_folder(found, str(local_path(folder)))


def _add_folder(found: Listing, root: str) -> None:
    """Every file below a folder. What is behind links comes last, so that files go by their own names."""
    seen: set[tuple[int, int]] = set()
    links = [root]
    while links:
        links.sort(key=lambda path: (Path(path).name.startswith("."), path))
        pending = [links.pop(0)]
        while pending:
            folder = pending.pop()
            about = Path(folder).stat()
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                path = entry.path.removeprefix("./") if root == "." else entry.path
                try:
                    mode = entry.stat()
                except (FileNotFoundError, NotADirectoryError):  # deleted since it was listed, or a link to nothing
                    if entry.is_symlink():
                        found.broken.append(path)
                    continue
                except OSError:  # a link to itself
                    found.broken.append(path)
                    continue
                if stat.S_ISDIR(mode.st_mode):
                    (links if entry.is_symlink() else pending).append(path)
                elif not stat.S_ISREG(mode.st_mode):
                    found.broken.append(path)
                elif not _unfinished(entry.name):
                    found.sizes[path] = mode.st_size


def _unfinished(name: str) -> bool:
    """Whether a name is of a temporary file of ours (see `replace_file`)."""
    return name.startswith(".") and name.endswith(".tmp")
