"""MNIST's idx files, and those of its kind (Fashion-MNIST, KMNIST, EMNIST): images in one, their labels in another.

https://github.com/cvdfoundation/mnist; the form is described on Yann LeCun's page of MNIST. EMNIST's images lie on
their side, as MATLAB writes them column by column, and a mapping beside them says which characters its labels are.
https://www.nist.gov/itl/products-and-services/emnist-dataset
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Collection, Iterator

from PIL import Image as PILImage

from calumma.model.document import Image
from calumma.platform import storage
from calumma.platform.sources.compression import SUFFIXES as COMPRESSED
from calumma.platform.sources.files import BadInput, Draft, File, Malformed
from calumma.platform.sources.registry import ReaderItem, reader
from calumma.platform.storage import StorageError

PACKED = ("", *COMPRESSED)
SUFFIXES = tuple(f"{dot}idx3-ubyte{packed}" for dot in ("-", ".") for packed in PACKED)
LARGEST_IMAGE = 1 << 26  # pixels
LARGEST_LABELS = 1 << 30
LARGEST_MAPPING = 1 << 20
EMNIST = re.compile(r"(emnist-\w+?)-(?:train|test)-images[-.]idx3", re.IGNORECASE)


def _choose(uris: list[str]) -> tuple[Collection[str], Collection[str]]:
    """Of a file and the same packed (torchvision keeps both) one is read."""
    images = {uri for uri in uris if uri.lower().endswith(SUFFIXES)}
    packed = {uri for uri in images if any(uri.endswith(p) and uri.removesuffix(p) in images for p in COMPRESSED)}
    along = {uri for uri in uris if "idx1-ubyte" in uri.lower() or uri.lower().endswith("-mapping.txt")}
    return images - packed, along | packed


@reader("mnist", SUFFIXES, choose=_choose)
def mnist(file: File, *, names: list[str] | None = None, transposed: bool | None = None) -> Iterator[ReaderItem]:
    """train-images-idx3-ubyte(.gz) with train-labels-idx1-ubyte(.gz) beside it: pairs of an image and its digit, or
    of `names` the one that has its number: [T-shirt, trouser, …]. Files that are named as EMNIST's are, are set upright
    (`transposed` says it of others) and have the characters of the mapping beside them as captions.
    """
    labels = _labels(file)
    emnist = EMNIST.match(file.uri.rpartition("/")[2])
    turn = emnist is not None if transposed is None else transposed
    characters = _mapping(file, emnist[1]) if emnist and names is None else {}
    count, height, width = _header(lambda size: _read(file, size), 3, "images")
    if not 0 < height * width <= LARGEST_IMAGE:
        raise Malformed(f"its images are {height:,} by {width:,}")
    for number in range(count):
        place = file.at(f"image {number}")
        try:
            pixels = _read(file, height * width)
        except Malformed as damage:
            lost = max(1, round((count - number) / count * file.size))
            yield BadInput(place, f"{count - number:,} of {count:,} images are lost: {damage}", lost)
            return
        if number >= len(labels):
            yield BadInput(place, f"has no label; there are {len(labels):,} labels for {count:,} images")
        elif names is not None and labels[number] >= len(names):
            yield BadInput(place, f"its label is {labels[number]}, and `names` has {len(names)}")
        else:
            buffer = io.BytesIO()
            image = PILImage.frombytes("L", (width, height), pixels)
            (image.transpose(PILImage.Transpose.TRANSPOSE) if turn else image).save(buffer, "PNG")
            numeral = characters.get(labels[number], str(labels[number]))
            label = numeral if names is None else names[labels[number]]
            yield Draft((Image(buffer.getvalue(), label),), place)
    if file.content.peek(1):
        file.notes.warn(file.uri, "what follows its last image is not read")
    if len(labels) > count:
        file.notes.skip("labels", "of no image", len(labels) - count)


def _read(file: File, size: int) -> bytes:
    try:
        data = file.content.read(size)
    except StorageError:
        raise
    except OSError as error:
        raise Malformed(f"the file is damaged: {error}") from error
    if len(data) < size:
        raise Malformed("the file ends early")
    return data


def _labels(file: File) -> bytes:
    """Raises Malformed where they are not beside the file."""
    folder, slash, base = file.uri.rpartition("/")
    name = folder + slash + base.replace("images", "labels").replace("idx3", "idx1")
    base = next((name.removesuffix(packed) for packed in COMPRESSED if name.endswith(packed)), name)
    for packed in PACKED:
        try:
            with storage.open_read(base + packed) as raw:
                stream = io.BytesIO(File(base + packed, raw, file.images).read_all(LARGEST_LABELS))
        except storage.NotFound:
            continue
        (count,) = _header(stream.read, 1, "labels")
        return stream.read()[:count]
    raise Malformed(f"its labels, {base.rpartition('/')[2]}, are not beside it")


def _mapping(file: File, name: str) -> dict[int, str]:
    """Label -> character, from lines of a label and the code of its character (or codes: upper and lower case). Without
    a mapping the labels stand for themselves, which is told."""
    uri = f"{file.uri.rpartition('/')[0]}/{name}-mapping.txt" if "/" in file.uri else f"{name}-mapping.txt"
    try:
        with storage.open_read(uri) as raw:
            lines = File(uri, raw, file.images).read_all(LARGEST_MAPPING).decode().splitlines()
        return {int(label): chr(int(code)) for label, code, *_ in (line.split() for line in lines if line.strip())}
    except storage.NotFound:
        file.notes.warn(file.uri, f"{name}-mapping.txt is not beside it: captions are the numbers of its labels")
    except (ValueError, OverflowError) as error:
        raise Malformed(f"{name}-mapping.txt is not a label and the code of its character a line: {error}") from error
    return {}


def _header(read: Callable[[int], bytes], dimensions: int, what: str) -> tuple[int, ...]:
    magic = read(4)
    if magic != bytes((0, 0, 8, dimensions)):
        raise Malformed(f"is no idx file of {what}: it begins with {magic.hex(' ') or 'nothing'}")
    sizes = read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise Malformed("the file ends early")
    return struct.unpack(f">{dimensions}I", sizes)
