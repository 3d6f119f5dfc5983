"""What documents are compared by: a hash of all content, MinHash bands of the words, a perceptual hash of the image.

A signature is rows of (key, ...): documents that may be alike have a row of the same key. Keys are spread evenly over
64 bits, so that a range of keys is a share of the work.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.curation.specification import DuplicateRules, NearDuplicates
from calumma.platform.curation.steps.words import hashes, is_pair, mix_bits, ngrams, words

HASH_BITS = 64  # of a perceptual hash
EQUAL_PARTS = 2  # parts in which two similar image hashes agree at least
_RUNS_PER_UPDATE = 4096  # runs of words that are permuted together, 4 bytes a permutation each

# -- equal content -----------------------------------------------------------------------------------------------------


def content_hash(document: Document) -> tuple[int, int]:
    """128 bits that documents share which differ only in case, white space and Unicode's compatible forms."""
    digest = hashlib.blake2b(digest_size=16)
    for s in document.segments:
        if isinstance(s, Text):
            parts = ["text", s.role or "", _normalized(s.text)]
        else:
            parts = ["image", s.role or "", hashlib.sha256(image_bytes(s)).hexdigest(), _normalized(s.caption or "")]
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8) + data)
    value = digest.digest()
    return int.from_bytes(value[:8]), int.from_bytes(value[8:])


def image_bytes(image: Image) -> bytes:
    return image.data if isinstance(image.data, bytes) else image.png()


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# -- similar texts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BandLayout:
    """How many bands of how many values a MinHash is cut into."""

    bands: int
    rows: int


@functools.cache
def band_layout(rules: NearDuplicates) -> BandLayout:
    """The layout that separates best at the asked similarity (datasketch's choice)."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=rules.similarity, num_perm=rules.permutations)
    return BandLayout(index.b, index.r)


def minhash(document: Document, rules: NearDuplicates) -> NDArray[np.uint32] | None:
    """MinHash of a document's runs of words, where an image counts as a word; None when there is no whole run."""
    items: list[str | bytes] = []
    for s in document.segments:
        items += words(s.text) if isinstance(s, Text) else [hashlib.sha256(image_bytes(s)).digest()]
    runs = np.unique(ngrams(hashes(items), rules.words) >> np.uint64(32))
    if not len(runs):
        return None
    from datasketch import MinHash

    signature = MinHash(
        rules.permutations, hashfunc=_identity, permutations=_permutations(rules.permutations), scheme="affine32"
    )
    for begin in range(0, len(runs), _RUNS_PER_UPDATE):
        signature.update_batch(runs[begin : begin + _RUNS_PER_UPDATE].tolist())
    return signature.hashvalues


def _identity(value: int) -> int:
    return value


@functools.cache
def _permutations(count: int) -> Any:
    from datasketch import MinHash

    return MinHash(count, seed=1, scheme="affine32").permutations


def band_keys(signature: NDArray[np.uint32], cut: BandLayout) -> list[int]:
    """A key for each band: of two documents that share one, the band's values are equal."""
    keys = []
    for band in range(cut.bands):
        values = signature[band * cut.rows : (band + 1) * cut.rows]
        digest = hashlib.blake2b(values.astype("<u4").tobytes(), digest_size=8, person=b"%d" % band).digest()
        keys.append(int.from_bytes(digest))
    return keys


def sketch(signature: NDArray[np.uint32]) -> bytes:
    """The lowest 4 bits of every value: an eighth of the signature that estimates similarity nearly as well (b-bit
    minwise hashing, Li and König 2010). It travels with every band, so that pairs are checked where they meet."""
    low = (signature & 15).astype(np.uint8)
    return (low[::2] | (low[1::2] << 4)).tobytes()


def similarity(one: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of one sketch with each row of others."""
    different = one ^ others
    equal = ((different & 15) == 0).mean(axis=1) / 2 + ((different >> 4) == 0).mean(axis=1) / 2
    return np.asarray((equal - 1 / 16) / (1 - 1 / 16))


# -- similar images ----------------------------------------------------------------------------------------------------


def image_hash(image: PILImage.Image) -> int:
    """64 bits that change little when an image is scaled or compressed (pHash)."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


def image_keys(value: int, distance: int) -> list[int]:
    """Keys such that two hashes of at most this distance share one.

    The bits are cut into distance + 2 parts; at least 2 of them must be equal (pigeonhole), so every pair of parts is
    a key. Pairs are longer than single parts: fewer strangers share one.
    """
    parts = distance + EQUAL_PARTS
    edges = [HASH_BITS * n // parts for n in range(parts + 1)]
    masks = [((1 << (end - begin)) - 1) << begin for begin, end in itertools.pairwise(edges)]
    chosen = list(itertools.combinations(range(parts), EQUAL_PARTS))
    keys = np.array([value & sum(masks[part] for part in pair) for pair in chosen], np.uint64)
    salts = mix_bits(np.arange(1, len(chosen) + 1, dtype=np.uint64))
    return [int(key) for key in mix_bits(keys ^ salts)]


# -- rows --------------------------------------------------------------------------------------------------------------

KINDS = ("exact", "near", "images")  # in this order reasons are given


@dataclass
class SignatureRows:
    """Signatures of documents, column by column: `key`, `id`, and by kind what the comparison needs."""

    keys: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, keys: Sequence[int], identity: int, value: Any) -> None:
        self.keys += keys
        self.ids += [identity] * len(keys)
        self.values += [value] * len(keys)

    def __len__(self) -> int:
        return len(self.keys)


def add_signatures(document: Document, identity: int, rules: DuplicateRules, rows: dict[str, SignatureRows]) -> None:
    """Add a document's rows, by kind. Pairs are compared by their image, other documents by their words: captions
    repeat for good reasons, and so do the images of pages and conversations."""
    if rules.exact:
        first, second = content_hash(document)
        rows["exact"].add([first], identity, second)
    if is_pair(document):
        if rules.images is not None:
            value = image_hash(document.images[0].open())
            rows["images"].add(image_keys(value, rules.images.distance), identity, value)
    elif rules.near is not None and (signature := minhash(document, rules.near)) is not None:
        rows["near"].add(band_keys(signature, band_layout(rules.near)), identity, sketch(signature))
