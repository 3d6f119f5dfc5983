"""Answers to questions: VQA's accuracy over ten people's answers, SQuAD's exact match and F1, MNIST's digits.

VQA: github.com/GT-Vision-Lab/VQA; SQuAD: its evaluate-v1.1.py and evaluate-v2.0.py, which agree in these.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# Punctuation in the order in which VQA's evaluation takes it away.
_PUNCTUATION = (";", ":", "/", "'", "[", "]", '"', "(", ")", "=", "+", "\\", "_", ">", "<", "@", "`", ",", "?")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_PERIODS = 32  # taken away at most: VQA's evaluation gives re.UNICODE, which is 32, where the count stands
_COMMA = re.compile(r"(\d)(,)(\d)")
_CONTRACTED = """\
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""


def _without_apostrophes(word: str) -> list[str]:
    """What may be typed for a contraction: some or all of its apostrophes left out."""
    parts = word.split("'")
    joins = itertools.product(("", "'"), repeat=len(parts) - 1)
    spelled = ["".join(itertools.chain.from_iterable(zip(parts, (*join, ""), strict=True))) for join in joins]
    return [form for form in spelled if form != word]


CONTRACTIONS = {form: word for word in _CONTRACTED.split() for form in _without_apostrophes(word)}


def vqa_answer(answer: str) -> str:
    """An answer as VQA compares it: without punctuation and articles, digits for number words."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def without_punctuation(text: str) -> str:
    """A mark vanishes where it stands beside a space, or where the text has a comma within a number; else a space
    takes its place. Periods vanish unless a digit follows."""
    result = text
    for mark in _PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or _COMMA.search(text) is not None
        result = result.replace(mark, "" if apart else " ")
    return _PERIOD.sub("", result, count=_PERIODS)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """min(1, people who said the same / 3), the mean over all ways to leave one out. Raises ValueError on none."""
    if not people:
        raise ValueError("there are no answers of people to compare with")
    own = vqa_answer(answer)
    known = [without_punctuation(each) for each in people] if len(set(people)) > 1 else list(people)
    same = sum(each == own for each in known)
    shares = [min(1.0, (same - (each == own)) / 3) for each in known]
    return sum(shares) / len(shares)


def squad_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous space."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def squad_exact(answer: str, known: Sequence[str]) -> float:
    """1 where it is one of the known answers; of a question without an answer (SQuAD 2), where it is empty."""
    return max((float(squad_answer(answer) == squad_answer(each)) for each in known or ("",)), default=0.0)


def squad_f1(answer: str, known: Sequence[str]) -> float:
    """The best F-measure of words in common with a known answer."""
    return max(_f1(squad_answer(answer).split(), squad_answer(each).split()) for each in known or ("",))


def _f1(own: list[str], theirs: list[str]) -> float:
    if not own or not theirs:
        return float(own == theirs)
    common = (Counter(own) & Counter(theirs)).total()
    if not common:
        return 0.0
    precision, recall = common / len(own), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def first_line(text: str) -> str:
    """A short answer: what stands on the first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
