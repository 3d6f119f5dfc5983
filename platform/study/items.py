"""What is judged: each prompt with two systems' answers, or with one's; and on which side which answer stands.

Sides are a function of the study's seed and the prompts alone: over the judgements of a pair of systems each of them
stands left as often as right, within one, in every category, whoever judges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from calumma.platform.study.judgement import Kind


@dataclass(frozen=True)
class Item:
    """`systems`: two to compare, or one, in the order of their names. `left_first`: which of them stands left for the
    first annotator; the sides change from one annotator to the next."""

    id: str
    prompt: str
    category: str
    systems: tuple[str, ...]
    left_first: bool = True

    def shown(self, seat: int) -> tuple[str, ...]:
        """The systems in the order in which the seat's annotator sees them."""
        return self.systems if self.left_first == (seat % 2 == 0) else self.systems[::-1]


def make_items(
    prompts: Iterable[tuple[str, str]], systems: Sequence[str], kind: Kind, seed: int, seats: int
) -> list[Item]:
    """prompts: (id, category). The items come in an order that tells nothing either."""
    ordered, found = sorted(systems), []
    groups = list(combinations(ordered, 2)) if kind == "preference" else [(name,) for name in ordered]
    prompts = list(prompts)
    for group in groups:
        hashed = sorted((category, _hash(seed, prompt, *group), prompt) for prompt, category in prompts)
        left = bool(hashed) and hashed[0][1] < "8"
        for category, identity, prompt in hashed:
            found.append(Item(identity, prompt, category, group, left))
            # An odd number of seats gives one side more; an even one both the same.
            left = not left if seats % 2 else _hash(seed, "even", identity) < "8"
    return sorted(found, key=lambda item: item.id)


def _hash(seed: int, *words: str) -> str:
    said = "\0".join([str(seed), *words]).encode()
    return hashlib.blake2b(said, digest_size=10, person=b"calumma study").hexdigest()
