"""The records of one JSON array, which may be far larger than memory.

The ends of elements are found by counting brackets outside strings, and each element is parsed alone, as a line of JSON
is: the same record gives the same result in both, and a bad one loses itself. Where damage hides the end of an element,
reading goes on at the next object that is made like those before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from calumma.platform.sources.files import BadInput, File, json_type
from calumma.platform.sources.formats.records.json_values import KeyTwice, parse
from calumma.platform.storage import StorageError

Row = tuple[str, dict[str, Any]]

LONGEST_LINE = 256 << 20  # bytes; a conversation with its images as data URLs is one line, or one element
CHUNK_BYTES = 64 << 10  # that are read at once
DEEPEST_NESTING = 1000  # brackets in each other; Python's parser gives up there too
DOUBTFUL = 1 << 20  # bytes of an element from which on it may be damage that hides its end
TRIES = 200  # objects that are looked at for a record behind damage
SHAPES = 8  # first keys of records that are remembered, to know one again
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACE = b" \t\r\n"
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
TOKEN = re.compile(STRING + rb'|[][{}"]', re.DOTALL)
SCALAR = re.compile(STRING + rb'|[^][{},"\s]+', re.DOTALL)
MISSES = 20  # elements that do not end where the next seems to begin, until that is looked for no more
FIRST_KEY = re.compile(rb"\{\s*(" + STRING + rb")\s*:", re.DOTALL)


class _Unclear(Exception):
    """Where an element ends cannot be told."""


def json_array(file: File, read: bytes = b"") -> Iterator[Row | BadInput]:
    """The elements of the array that a file's content is; `read`: what of it is read already."""
    return _ArrayReader(file, read).rows()


def _object_end(data: bytes, start: int) -> int | None:
    """Where the object that begins at `start` ends; None where there is not enough data, and 0 for what is nested too
    deep."""
    depth = 0
    for match in TOKEN.finditer(data, start):
        token = data[match.start()]
        if token == 0x22:
            if match.end() - match.start() == 1:
                return None
        elif (depth := depth + (1 if token in b"[{" else -1)) == 0:
            return match.end()
        elif depth > DEEPEST_NESTING:
            return 0
    return None


class _ArrayReader:
    def __init__(self, file: File, read: bytes) -> None:
        self._file = file
        self._data = read  # read, and not yet taken
        self._ended = False  # the file, or what stands before a damage
        self._damage: OSError | None = None
        self._shapes: dict[bytes, frozenset[str]] = {}  # first key of a record, as written -> its keys
        self._between: re.Pattern[bytes] | None = None  # the end of a record, and how the next begins
        self._start = b"["  # how the last record that is remembered begins
        self._misses = 0

    def rows(self) -> Iterator[Row | BadInput]:
        number = -1
        begins = True
        place = self._file.at("item ")
        while True:
            number += 1
            for row in self._sound_records():
                yield f"{place}{number}", row
                number += 1
            name = f"{place}{number}"
            try:
                if begins:
                    self._open()
                    begins = False
                element = self._element()
            except _Unclear as error:
                damage = self._take_damage(name)
                lost, found = self._skip_to_record(damage is None)
                where = "here" if found else "from here on"
                damage = damage or BadInput(name, f"the array is damaged {where}: {error}")
                yield replace(damage, bytes_lost=min(damage.bytes_lost + lost, self._file.size))
                if not found:
                    return
                continue
            if element is None:
                if (damage := self._take_damage(name)) is not None:
                    yield damage
                return
            yield self._record(name, element)

    def _record(self, name: str, element: bytes) -> Row | BadInput:
        try:
            row = parse(element)
        except KeyTwice as error:
            return BadInput(name, str(error))
        except (ValueError, RecursionError) as error:
            # Damage to a quotation mark hides where strings end: the next records may stand in this one.
            place = self._find_record(element, 1, TRIES)[0]
            if place is None:
                return BadInput(name, f"not JSON: {error}")
            self._data = element[place:] + self._data
            return BadInput(name, f"the array is damaged here: {error}", place)
        if not isinstance(row, dict):
            return BadInput(name, f"holds {json_type(row)}, not an object")
        self._remember(element, row)
        return name, row

    def _sound_records(self) -> Iterator[dict[str, Any]]:
        """The next elements that are sound and end where another record seems to begin: what is valid JSON up to there
        is an element. Finding such a place takes a tenth of the time that counting brackets does."""
        if self._between is None or self._misses > MISSES or self._data[:1] != b"{":
            return
        data, begin = self._data, 0
        for match in self._between.finditer(data):
            element = data[begin : match.start() + 1]
            try:
                row = parse(element)
            except (ValueError, RecursionError):
                self._misses += 1
                break
            begin = match.end()
            self._remember(element, row)
            yield row
        self._data = data[begin:]

    def _remember(self, element: bytes, row: dict[str, Any]) -> None:
        if element.startswith(self._start):
            return
        if (match := FIRST_KEY.match(element)) and match[1] not in self._shapes and len(self._shapes) < SHAPES:
            self._shapes[match[1]] = frozenset(row)
        if match:
            self._start = match[0]
            begin = rb"\}[ \t\r\n]*+,[ \t\r\n]*+(?=\{\s*" + re.escape(match[1]) + rb"\s*:)"
            self._between = self._between or re.compile(begin)

    # -- elements ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        while len(self._data) < len(BYTE_ORDER_MARK) and self._more():
            pass
        self._data = self._data.removeprefix(BYTE_ORDER_MARK)
        if self._next() != b"[":
            raise _Unclear("it does not begin with [")
        self._data = self._data[1:]
        if self._next() == b"{" and (match := FIRST_KEY.match(self._data)):
            self._shapes[match[1]] = frozenset()

    def _element(self) -> bytes | None:
        """The next element; None behind the last."""
        first = self._next()
        if first == b"]":
            self._data = self._data[1:]
            if self._next():
                raise _Unclear("more follows its end")
            return None
        if not first:
            raise _Unclear("it has no end")
        end = self._end_of_scalar() if first not in b"[{" else self._end_of_brackets()
        element = self._data[:end]
        # What follows tells whether that was its end.
        place = end
        while not (rest := self._data[place:].lstrip(SPACE)) and self._more():
            pass
        follows = rest[:1]
        if follows not in (b",", b"]", b""):
            raise _Unclear("no comma follows")
        place = len(self._data) - len(rest)
        self._data = self._data[place + (follows == b",") :].lstrip(SPACE)
        return element

    def _end_of_scalar(self) -> int:
        while True:
            match = SCALAR.match(self._data)
            if match and (self._ended or match.end() < len(self._data)):
                return match.end()
            if self._ended or self._data[:1] in b",}" or len(self._data) > LONGEST_LINE:
                raise _Unclear("no value begins here")
            self._grow()

    def _end_of_brackets(self) -> int:
        depth = place = 0
        doubtful = DOUBTFUL
        while True:
            unfinished = False
            for match in TOKEN.finditer(self._data, place):
                token = self._data[match.start()]
                if token == 0x22:
                    if match.end() - match.start() == 1:  # a string that goes on
                        place, unfinished = match.start(), True
                        break
                elif token in b"[{":
                    depth += 1
                    if depth > DEEPEST_NESTING:
                        raise _Unclear(f"more than {DEEPEST_NESTING:,} brackets in each other")
                else:
                    depth -= 1
                    if depth == 0:
                        return match.end()
            if not unfinished:
                place = len(self._data)
            if self._ended:
                raise _Unclear("it breaks off")
            if len(self._data) > LONGEST_LINE:
                raise _Unclear(f"longer than {LONGEST_LINE:,} bytes")
            if len(self._data) > doubtful:
                doubtful = 2 * len(self._data)
                if self._find_record(self._data, 1, TRIES)[0] is not None:
                    raise _Unclear("it does not end before the next begins")
            self._grow()

    # -- damage --------------------------------------------------------------------------------------------------------

    def _take_damage(self, name: str) -> BadInput | None:
        """The damage that reading came to, if it did; what it cut goes with it."""
        if self._damage is None:
            return None
        damage, ends = self._file.damage(name, self._damage)
        self._damage, self._data, self._ended = None, b"", ends
        return damage

    def _skip_to_record(self, behind: bool) -> tuple[int, bool]:
        """Skip to the next record, `behind` the first byte: how many bytes, and whether there is one."""
        lost, tries = 0, TRIES
        if not self._shapes:
            self._guess_shape()
        while True:
            place, unknown, tried = self._find_record(self._data, int(behind), tries)
            if place is not None:
                self._data = self._data[place:]
                return lost + place, True
            tries -= tried
            skipped = unknown if tries > 0 and len(self._data) - unknown <= LONGEST_LINE else len(self._data)
            if skipped:
                lost, self._data, behind = lost + skipped, self._data[skipped:], False
            if not self._grow():
                damage = self._take_damage("")
                if damage is None or self._ended:
                    return lost + len(self._data) + (damage.bytes_lost if damage else 0), False
                lost, behind = lost + damage.bytes_lost, False

    def _guess_shape(self) -> None:
        """What a record is like where the first is damaged: like the longest object in sight, which is in no other."""
        longest = 0
        for candidate in islice(FIRST_KEY.finditer(self._data, 1), TRIES):
            end = _object_end(self._data, candidate.start())
            if end and end - candidate.start() > longest:
                try:
                    row = json.loads(self._data[candidate.start() : end])
                except (ValueError, RecursionError):
                    continue
                longest = end - candidate.start()
                self._shapes = {candidate[1]: frozenset(row)}

    def _find_record(self, data: bytes, begin: int, tries: int) -> tuple[int | None, int, int]:
        """Where in `data` a whole record like those before begins, from where on one may begin when there is more data,
        and how many objects were tried."""
        if not self._shapes or tries <= 0:
            return None, len(data), 0
        unknown = tried = 0
        keys = b"|".join(re.escape(key) for key in self._shapes)
        for candidate in re.compile(rb"\{\s*(" + keys + rb")\s*:").finditer(data, begin):
            start = candidate.start()
            tried += 1
            end = _object_end(data, start)
            if end is None:
                unknown = unknown or start
            elif end and data[end : end + CHUNK_BYTES].lstrip(SPACE)[:1] in (b",", b"]", b""):
                try:
                    row = json.loads(data[start:end])
                except (ValueError, RecursionError):
                    continue
                shape = self._shapes[candidate[1]]
                if isinstance(row, dict) and 2 * len(shape & row.keys()) >= len(shape):
                    return start, start, tried
            if tried >= tries:
                return None, len(data), tried
        return None, unknown or max(begin, len(data) - CHUNK_BYTES), tried

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _next(self) -> bytes:
        """The next byte that is no space, where the data now begins; none at the end."""
        while not (data := self._data.lstrip(SPACE)) and self._more():
            pass
        self._data = data
        return data[:1]

    def _grow(self) -> bool:
        """Read as much again as there is: an element is looked through a few times, however long it is."""
        wanted = max(CHUNK_BYTES, len(self._data))
        parts = [self._data]
        while wanted > 0 and (data := self._read()):
            parts.append(data)
            wanted -= len(data)
        self._data = b"".join(parts)
        return len(parts) > 1

    def _more(self) -> bool:
        data = self._read()
        self._data += data
        return bool(data)

    def _read(self) -> bytes:
        if self._ended:
            return b""
        try:
            content = self._file.content
            data = content.read1(CHUNK_BYTES) or content.read1(1)  # damage is told behind the end
        except StorageError:
            raise
        except OSError as error:
            self._damage, data = error, b""
        self._ended = not data
        return data
