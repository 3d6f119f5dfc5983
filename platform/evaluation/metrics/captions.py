"""CIDEr-D, BLEU and ROUGE-L of captions, as COCO's own evaluation computes them (tylin/coco-caption, pycocoevalcap).

CIDEr: Vedantam et al., arXiv 1411.5726. Words are divided as Stanford's PTB tokenizer divides captions, in Python.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MOST_WORDS = 4  # of an n-gram
SIGMA = 6.0  # CIDEr-D: how much a difference in length may be
BETA = 1.2  # ROUGE-L: how much more recall counts
TINY, SMALL = 1e-15, 1e-9  # BLEU's own guards against zeros

# What stays of a caption: everything but these. Brackets stay, under Stanford's names for them: the reference removes
# only those in capitals, and its tokenizer writes all in small letters.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'))
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_TOKEN = re.compile(
    r"""(?:[a-z]\.){2,}            # u.s.
    | \b(?:mr|mrs|ms|dr|st|jr|sr|vs|prof|no|inc|co|corp|ltd|etc)\.(?=\s+\S)
    | \d+(?:[.,:/]\d+)+            # 3.5, 10:30, 1/2
    | [\w&@#$%]+(?:['’][\w]+)*(?:[-/_.@][\w]+(?:['’][\w]+)*)*
    | \.{2,} | -{2,} | '' | ``
    | \S""",
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?P<word>.+?)(?P<rest>n['’]t|['’](?:s|m|d|re|ve|ll))$")
_JOINED = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}

Words = list[str]
NGrams = Counter[tuple[str, ...]]


def words_of(caption: str) -> Words:
    """Lower-case words without punctuation; contractions divided: "isn't" is "is", "n't"."""
    found: Words = []
    for token in _TOKEN.findall(caption.lower().replace("\n", " ")):
        if token in _JOINED:
            found += _JOINED[token]
        elif (match := _CLITIC.match(token)) is not None:
            found += [*_slashed(match["word"]), match["rest"].replace("’", "'")]
        else:
            found += _slashed(token)
    return [BRACKETS.get(token, token) for token in found if token not in PUNCTUATION]


def _slashed(token: str) -> Words:
    """A percent sign, a dollar or a hash before or behind a number stands for itself."""
    match = re.fullmatch(r"([$#]?)(\d[\d.,]*)(%?)", token)
    return [part for part in match.groups() if part] if match is not None else [token]


class CaptionScores(NamedTuple):
    """Over all captions; `ciders` and `rouges` of each. BLEU of 1 to 4 words."""

    cider: float
    bleus: tuple[float, float, float, float]
    rouge: float
    ciders: list[float]
    rouges: list[float]


def score(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Of one caption an image, and what people wrote of it. Raises ValueError when there are none."""
    if not candidates or len(candidates) != len(references) or not all(references):
        raise ValueError(f"{len(candidates)} captions and {len(references)} lists of references; none may be empty")
    said = [words_of(caption) for caption in candidates]
    known = [[words_of(caption) for caption in captions] for captions in references]
    return score_words(said, known)


def score_words(said: Sequence[Words], known: Sequence[Sequence[Words]]) -> CaptionScores:
    """As `score`, of captions that are divided already."""
    ciders = cider(said, known)
    rouges = [rouge_l(words, others) for words, others in zip(said, known, strict=True)]
    return CaptionScores(
        math.fsum(ciders) / len(ciders), bleu(said, known), math.fsum(rouges) / len(rouges), ciders, rouges
    )


# -- CIDEr-D


def cider(said: Sequence[Words], known: Sequence[Sequence[Words]]) -> list[float]:
    """Of each caption: ten times the mean likeness to its references of n-grams weighted by how rare they are among
    the references of all images, with lengths compared and counts clipped (the D)."""
    grams = [[_ngrams(words) for words in others] for others in known]
    frequency = Counter(gram for others in grams for gram in set().union(*others))
    images = math.log(len(known))
    scores = []
    for words, others in zip(said, grams, strict=True):
        own = _Vector(_ngrams(words), frequency, images)
        likeness = math.fsum(own.likeness(_Vector(other, frequency, images)) for other in others)
        scores.append(10 * likeness / len(others))
    return scores


class _Vector:
    def __init__(self, grams: NGrams, frequency: Counter[tuple[str, ...]], images: float) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MOST_WORDS)]
        self.length = 0
        for gram, count in grams.items():
            self.weights[len(gram) - 1][gram] = count * (images - math.log(max(1.0, frequency[gram])))
            self.length += count if len(gram) == 2 else 0  # pairs of words, as the reference counts
        self.norms = [math.sqrt(math.fsum(value**2 for value in part.values())) for part in self.weights]

    def likeness(self, other: _Vector) -> float:
        """The mean over lengths of n-grams, of what this one, the candidate, has in common with a reference."""
        total = 0.0
        for own, theirs, norm, their_norm in zip(self.weights, other.weights, self.norms, other.norms, strict=True):
            value = math.fsum(
                min(weight, theirs[gram]) * theirs[gram] for gram, weight in own.items() if gram in theirs
            )
            total += value / (norm * their_norm) if norm and their_norm else value
        difference = self.length - other.length
        return total * math.exp(-(difference**2) / (2 * SIGMA**2)) / MOST_WORDS


def _ngrams(words: Words) -> NGrams:
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, MOST_WORDS + 1)
        for start in range(len(words) - length + 1)
    )


# -- BLEU and ROUGE-L


def bleu(said: Sequence[Words], known: Sequence[Sequence[Words]]) -> tuple[float, float, float, float]:
    """Of all captions together, of 1 to 4 words, against the reference closest in length."""
    right, guessed = [0] * MOST_WORDS, [0] * MOST_WORDS
    length = closest = 0
    for words, others in zip(said, known, strict=True):
        most: NGrams = Counter()
        for other in others:
            most |= _ngrams(other)
        for gram, count in _ngrams(words).items():
            right[len(gram) - 1] += min(count, most[gram])
        for size in range(MOST_WORDS):
            guessed[size] += max(0, len(words) - size)
        length += len(words)
        closest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    ratio = (length + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for size in range(MOST_WORDS):
        product *= (right[size] + TINY) / (guessed[size] + SMALL)
        scores.append(product ** (1 / (size + 1)) * brevity)
    return scores[0], scores[1], scores[2], scores[3]


def rouge_l(words: Words, others: Sequence[Words]) -> float:
    """The F-measure of the longest common subsequence, of the best precision and the best recall of all references.
    A caption without words counts as one empty word, as the reference has it."""
    own = words or [""]
    common = [_longest_common(own, other or [""]) for other in others]
    precision = max(length / len(own) for length in common)
    recall = max(length / len(other or [""]) for length, other in zip(common, others, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(one: Words, other: Words) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, theirs in enumerate(other, start=1):
            row.append(before[place - 1] + 1 if word == theirs else max(row[-1], before[place]))
    return row[-1]
